"""The comparison of int8 with float32: its numbers, its limits and its record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import BertTokenizer

from benchmarks import int8_quality
from dynabert import DynaBertConfig, DynaBertForSequenceClassification
from dynabert_kernels.ops import _cpu

WORDS = ["good", "bad", "film", "a", "very", "not"]
BACKENDS = [
    "reference",
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(
            _cpu.kernels_missing() is not None, reason=str(_cpu.kernels_missing())
        ),
    ),
]


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A random classifier of sentences, with its tokeniser."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = {word: index for index, word in enumerate(special + WORDS)}
    torch.manual_seed(0)
    config = DynaBertConfig(
        vocab_size=len(vocab),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=24,
        initializer_range=0.2,
    )
    folder = tmp_path / "model"
    DynaBertForSequenceClassification(config).save_pretrained(folder)
    BertTokenizer(vocab=vocab).save_pretrained(folder)
    return folder


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "SST-2"
    folder.mkdir(parents=True)
    lines = [f"{' '.join(WORDS[:end])} film\t{end % 2}" for end in range(1, len(WORDS))]
    (folder / "dev.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    return folder.parent


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_row_for_each_subnet(
    model_dir: Path, data_dir: Path, tmp_path: Path, backend: str
) -> None:
    out = tmp_path / "results" / "rows.jsonl"
    arguments = ["--model", str(model_dir), "--data-dir", str(data_dir), "--task", "sst2"]
    arguments += ["--backend", backend, "--out", str(out)]
    status = int8_quality.main(arguments)
    assert int8_quality.main(arguments) == status
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    half = len(rows) // 2
    drop = ("date",)
    first, again = (
        [{key: value for key, value in row.items() if key not in drop} for row in part]
        for part in (rows[:half], rows[half:])
    )
    assert first == again
    assert len({(row["width"], row["depth"]) for row in first}) == half > 4
    assert status == (0 if all(row["holds"] for row in first) else 1)
    for row in first:
        # Random weights decide narrowly, so rows may change sides; logits stay near.
        assert 0 < row["relative_error"] < 0.1
        assert row["agreement"] == pytest.approx(1 - row["num_disagreeing"] / row["num_rows"])
        assert row["num_rows"] == 5
        assert (row["task"], row["metric"], row["backend"]) == ("sst2", "accuracy", backend)
        assert {"commit", "machine", "model", "score_float32", "score_int8"} <= set(row)
    assert str(tmp_path) not in out.read_text()


@pytest.mark.parametrize(
    ("error", "agreement", "expected"),
    [(0.02, 0.99, True), (0.0201, 1.0, False), (0.0, 0.989, False), (float("nan"), 1.0, False)],
)
def test_both_limits_count(error: float, agreement: float, expected: bool) -> None:
    assert int8_quality.holds({"relative_error": error, "agreement": agreement}) is expected


def test_a_model_alone_needs_a_task(model_dir: Path, data_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"^int8_quality: --task is missing\."):
        int8_quality.main(["--model", str(model_dir), "--data-dir", str(data_dir)])
