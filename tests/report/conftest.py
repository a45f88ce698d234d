"""A tiny classifier with odd sizes, and rows of odd lengths for it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dynabert import DynaBertConfig, DynaBertForSequenceClassification

NUM_LABELS = 3
VOCAB_SIZE = 59


@pytest.fixture
def model() -> DynaBertForSequenceClassification:
    """Three layers of four heads; logits far enough apart that rounding decides no row."""
    config = DynaBertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=20,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=28,
        max_position_embeddings=33,
        num_labels=NUM_LABELS,
        initializer_range=0.3,
    )
    return DynaBertForSequenceClassification(config).eval()


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """41 rows of 1 to 31 tokens, unsorted, each with a class."""
    generator = random.Random(3)
    lengths = [1 + 13 * i % 31 for i in range(41)]
    return [
        {
            "input_ids": [generator.randrange(1, VOCAB_SIZE) for _ in range(length)],
            "labels": generator.randrange(NUM_LABELS),
        }
        for length in lengths
    ]


@pytest.fixture
def pad() -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
    """A collator: the rows as one batch, padded on the right to the longest."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        fill = [longest - len(row["input_ids"]) for row in rows]
        ids = [row["input_ids"] + [0] * n for row, n in zip(rows, fill, strict=True)]
        mask = [[1] * len(row["input_ids"]) + [0] * n for row, n in zip(rows, fill, strict=True)]
        labels = torch.tensor([row["labels"] for row in rows])
        return {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.tensor(mask),
            "labels": labels,
        }

    return collate
