"""How long real texts are, and batches of such lengths to time a model on.

Letters: B sequences, S longest of them in tokens.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynabert.data.collators import encode
from dynabert.data.examples import Example
from dynabert.data.user_files import Columns, read_user_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_BATCHES = 64
"""Batches drawn of a distribution; the calls of every subnet go through them in the same order."""
_SEED = 0


@dataclass(frozen=True)
class Lengths:
    """Lengths of texts in tokens, special tokens included.

    Attributes:
        tokens: One number per text.
        name: Where the texts are from, for tables.

    Raises:
        ValueError: No lengths, or one below 1.
    """

    tokens: tuple[int, ...]
    name: str = "texts"

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", tuple(self.tokens))
        if not self.tokens or min(self.tokens) < 1:
            raise ValueError(
                f"Lengths: {self.name} has {len(self.tokens)} lengths, the least "
                f"{min(self.tokens, default=None)}, expected at least one, each 1 or more."
            )

    def capped(self, seq_len: int) -> Lengths:
        """The lengths after texts of more than `seq_len` tokens were cut."""
        return replace(self, tokens=tuple(min(length, seq_len) for length in self.tokens))

    def describe(self) -> str:
        """Name, number, mean, and a digest of the lengths: ``dev.tsv: 872 texts, ...``."""
        written = ",".join(map(str, sorted(self.tokens)))
        digest = hashlib.sha256(written.encode()).hexdigest()[:8]
        mean = sum(self.tokens) / len(self.tokens)
        return f"{self.name}: {len(self.tokens)} texts, mean {mean:.1f} tokens, {digest}"


def read_lengths(
    path: Path | str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    text_column: str = "text",
    pair_column: str | None = None,
) -> Lengths:
    """Lengths of the texts of a CSV, TSV or JSONL file, as a tokeniser cuts them.

    Args:
        path: The file; its rows need no label.
        tokenizer: The model's own.
        seq_len: Tokens after which a text is cut.
        text_column: Column of the text.
        pair_column: Column of a second text, where the model reads pairs.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be read or lacks a column; names file and line.
    """
    path = Path(path)
    rows = read_user_file(path, Columns(text_column, pair_column, None))
    examples = [Example(row.text, row.text_pair, None, row.line) for row in rows]
    encoded = encode(examples, tokenizer, seq_len, log_cuts=False)
    return Lengths(tuple(encoded.lengths), path.name)


@dataclass(frozen=True)
class TimedBatch:
    """One batch to time a model on.

    Attributes:
        input_ids: Random token ids, ``[B, S]`` int64.
        attention_mask: 1 where a token is real, ``[B, S]`` int64; None where all are.
        num_tokens: Real tokens.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    num_tokens: int


def make_batches(
    batch_size: int,
    seq_len: int,
    lengths: Lengths | None,
    vocab_size: int,
    device: torch.device,
) -> list[TimedBatch]:
    """Batches of random token ids, the same at every call with the same arguments.

    Without `lengths` one batch without padding and without a mask. With them `NUM_BATCHES` batches,
    each padded on the right to its longest sequence and with its mask, as a tokeniser returns them.
    """
    generator = torch.Generator().manual_seed(_SEED)
    ids = torch.randint(vocab_size, (batch_size, seq_len), generator=generator)
    if lengths is None:
        return [TimedBatch(ids.to(device), None, ids.numel())]
    drawn = _draw(lengths.capped(seq_len).tokens)
    batches = []
    for _ in range(NUM_BATCHES):
        sizes = torch.tensor([next(drawn) for _ in range(batch_size)])
        mask = (torch.arange(int(sizes.max())) < sizes[:, None]).long()
        padded = ids[:, : mask.shape[1]] * mask
        batches.append(TimedBatch(padded.to(device), mask.to(device), int(sizes.sum())))
    return batches


def _draw(lengths: Sequence[int]) -> Iterator[int]:
    """All lengths in a random order, and again in another, without end."""
    shuffled, shuffle = list(lengths), random.Random(_SEED).shuffle
    while True:
        shuffle(shuffled)
        yield from shuffled
