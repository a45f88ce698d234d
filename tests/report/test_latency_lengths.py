"""Lengths of real texts, and the batches drawn of them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dynabert.latency_lengths import NUM_BATCHES, Lengths, make_batches, read_lengths

CPU = torch.device("cpu")


def test_lengths_are_those_of_the_tokens(
    byte_level_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = tmp_path / "notes.jsonl"
    rows = [{"note": "ab"}, {"note": " awful"}, {"note": "0123456789"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    got = read_lengths(path, byte_level_tokenizer, seq_len=9, text_column="note")
    # Two bytes; one token, without the space; ten bytes, cut; each between <s> and </s>.
    assert got.tokens == (2 + 2, 2 + 1, 9)
    assert got.name == "notes.jsonl"
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("a\tb\nab\t123\n")
    got = read_lengths(pairs, byte_level_tokenizer, seq_len=20, text_column="a", pair_column="b")
    assert got.tokens == (2 + 3 + byte_level_tokenizer.num_special_tokens_to_add(pair=True),)


def test_a_missing_column_is_named(
    byte_level_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = tmp_path / "notes.csv"
    path.write_text("sentence\nab\n")
    with pytest.raises(ValueError, match=r"notes\.csv line 2: no column 'text' among"):
        read_lengths(path, byte_level_tokenizer, seq_len=9)


@pytest.mark.parametrize("tokens", [(), (3, 0)], ids=["none", "no-token"])
def test_lengths_that_are_none_are_refused(tokens: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected at least one, each 1 or more"):
        Lengths(tokens)


def test_description_tells_distributions_apart() -> None:
    first = Lengths((3, 9, 4), "dev.tsv").describe()
    assert first.startswith("dev.tsv: 3 texts, mean 5.3 tokens, ")
    assert Lengths((9, 4, 3), "dev.tsv").describe() == first
    assert Lengths((3, 8, 5), "dev.tsv").describe() != first
    assert Lengths((3, 9, 40), "dev.tsv").capped(4).describe() == (
        Lengths((3, 4, 4), "dev.tsv").describe()
    )


def test_batches_have_the_lengths_of_the_texts() -> None:
    lengths = Lengths((1, 2, 3, 5, 7, 30))
    batches = make_batches(3, 11, lengths, 50, CPU)
    assert len(batches) == NUM_BATCHES
    drawn: list[int] = []
    for batch in batches:
        mask = batch.attention_mask
        assert mask is not None and mask.shape == batch.input_ids.shape
        sizes = [int(row.sum()) for row in mask]
        assert all(
            row.tolist() == [1] * size + [0] * (mask.shape[1] - size)
            for row, size in zip(mask, sizes, strict=True)
        )
        assert mask.shape[1] == max(sizes)
        assert batch.num_tokens == sum(sizes)
        assert not batch.input_ids[mask == 0].any()
        drawn += sizes
    assert Counter(drawn) == {size: NUM_BATCHES // 2 for size in (1, 2, 3, 5, 7, 11)}
    epochs = {tuple(drawn[start : start + 6]) for start in range(0, len(drawn), 6)}
    assert len(epochs) > 10
    again = make_batches(3, 11, lengths, 50, CPU)
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(batches, again, strict=True))


def test_without_lengths_there_is_one_batch_of_real_tokens() -> None:
    (batch,) = make_batches(3, 11, None, 50, CPU)
    assert batch.attention_mask is None
    assert (batch.input_ids.shape, batch.num_tokens) == ((3, 11), 33)
    assert set(batch.input_ids.flatten().tolist()) <= set(range(50))
    assert len(batch.input_ids.unique()) > 10


@pytest.mark.slow
def test_lengths_of_sst2(shared_data: Path, minilm_dir: Path) -> None:
    path = shared_data / "SST-2" / "dev.tsv"
    tokenizer = AutoTokenizer.from_pretrained(minilm_dir)
    got = read_lengths(path, tokenizer, seq_len=128, text_column="sentence")
    lines = path.read_text().splitlines()[1:]
    texts = [line.split("\t")[0].strip() for line in lines]
    assert got.tokens == tuple(len(tokenizer(text)["input_ids"]) for text in texts)
