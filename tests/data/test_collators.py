import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from dynabert.data import collators
from dynabert.data.collators import DynamicPadCollator, EncodedDataset, encode
from dynabert.data.examples import Example

SINGLES = [
    Example("a plane is taking off", None, 1),
    Example("the film was good", None, 0),
    Example("unseen", None, 1),
]
PAIRS = [
    Example("a plane is taking off", "the film was good .", 3.5),
    Example("good", "bad", 0.0),
]


@pytest.mark.parametrize("examples", [SINGLES, PAIRS], ids=["single", "pair"])
def test_rows_equal_the_tokenizer_one_at_a_time(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> None:
    dataset = encode(examples, tokenizer, 64)
    assert len(dataset) == len(examples)
    for row, example in zip(list(dataset), examples, strict=True):  # type: ignore[call-overload]
        expected = tokenizer(example.text, example.text_pair)
        assert row["input_ids"] == expected["input_ids"]
        assert row["token_type_ids"] == expected["token_type_ids"]
        assert row["length"] == len(expected["input_ids"])
        assert row["labels"] == example.label
        assert type(row["labels"]) is type(example.label)


def test_chunks_change_nothing(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = SINGLES * 3
    whole = encode(examples, tokenizer, 5)
    monkeypatch.setattr(collators, "CHUNK_ROWS", 2)
    chunked = encode(examples, tokenizer, 5)
    assert [chunked[row] for row in range(9)] == [whole[row] for row in range(9)]
    assert chunked.num_truncated == whole.num_truncated == 6


def test_truncation_is_counted(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        dataset = encode(SINGLES, tokenizer, 6)
    assert dataset.lengths == [6, 6, 3]
    assert dataset.num_truncated == 1
    assert "1 of 3 rows were longer than 6 tokens and were cut" in caplog.text
    caplog.clear()
    encode(SINGLES, tokenizer, 7)
    assert not caplog.records


def test_a_row_longer_than_the_model_is_named(tokenizer: PreTrainedTokenizerBase) -> None:
    examples = [example._replace(line=line) for line, example in enumerate(SINGLES, start=7)]
    # The first has 7 tokens.
    assert encode(examples, tokenizer, 4, longest=7).num_truncated == 2
    with pytest.raises(ValueError, match=r"encode: line 7: a text of 7 tokens, expected at most 6"):
        encode(examples, tokenizer, 4, longest=6)
    with pytest.raises(ValueError, match=r"encode: a/train\.csv line 7: a text of 7 tokens"):
        encode(examples, tokenizer, 6, longest=6, file=Path("a/train.csv"))


def test_tokenizer_is_called_once(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = type(tokenizer).__call__

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return original(self, *arguments, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", counted)
    dataset = encode(SINGLES, tokenizer, 64)
    _ = [dataset[row] for row in range(3)]
    assert len(calls) == 1


def test_index_out_of_range_ends_iteration(tokenizer: PreTrainedTokenizerBase) -> None:
    dataset = encode(SINGLES, tokenizer, 64)
    assert dataset[-1] == dataset[2]
    with pytest.raises(IndexError):
        dataset[3]


@pytest.mark.parametrize(
    ("examples", "max_length", "message"),
    [
        ([], 64, r"examples=\[\], expected at least one"),
        (SINGLES, 3, r"max_length=3, expected more than 3"),
        ([SINGLES[0], PAIRS[0]], 64, r"only some examples have a text_pair"),
        ([SINGLES[0], Example("a", None, None)], 64, r"only some examples have a label"),
    ],
    ids=["empty", "no-room", "mixed-pairs", "mixed-labels"],
)
def test_bad_input_is_refused(
    tokenizer: PreTrainedTokenizerBase, examples: list[Example], max_length: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        encode(examples, tokenizer, max_length)


@pytest.mark.parametrize("side", ["right", "left"])
def test_batch_is_padded_to_its_longest_row(tokenizer: PreTrainedTokenizerBase, side: str) -> None:
    tokenizer.padding_side = side
    dataset = encode(SINGLES, tokenizer, 64)
    batch = DynamicPadCollator(tokenizer)([dataset[0], dataset[2]])
    expected = tokenizer(["a plane is taking off", "unseen"], padding=True, return_tensors="pt")
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert torch.equal(batch[name], expected[name]), name
        assert batch[name].dtype == torch.int64
    assert batch["labels"].tolist() == [1, 1]
    assert batch["labels"].dtype == torch.int64
    assert "length" not in batch


def test_scores_are_float32(tokenizer: PreTrainedTokenizerBase) -> None:
    dataset = encode(PAIRS, tokenizer, 64)
    labels = DynamicPadCollator(tokenizer)([dataset[0], dataset[1]])["labels"]
    assert labels.dtype == torch.float32
    assert labels.tolist() == [3.5, 0.0]


def test_no_labels_no_token_types(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"input_ids": [2, 5, 3]}, {"input_ids": [2, 3]}]
    batch = DynamicPadCollator(tokenizer)(rows)
    assert sorted(batch) == ["attention_mask", "input_ids"]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    unlabelled = encode([example._replace(label=None) for example in SINGLES], tokenizer, 64)
    assert "labels" not in unlabelled[0]


@pytest.mark.parametrize(("multiple", "seq_len"), [(1, 7), (7, 7), (8, 8), (5, 10)])
def test_padding_to_a_multiple(
    tokenizer: PreTrainedTokenizerBase, multiple: int, seq_len: int
) -> None:
    row = encode(SINGLES, tokenizer, 64)[0]
    batch = DynamicPadCollator(tokenizer, pad_to_multiple_of=multiple)([row])
    assert batch["input_ids"].shape == (1, seq_len)
    assert int(batch["attention_mask"].sum()) == 7


def test_collator_refuses_what_it_cannot_pad(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="pad_to_multiple_of=0, expected 1 or more"):
        DynamicPadCollator(tokenizer, pad_to_multiple_of=0)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="pad_token_id=None, expected a padding token"):
        DynamicPadCollator(tokenizer)


def test_unequal_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="columns differ in their lengths"):
        EncodedDataset({"input_ids": [[1, 2]], "token_type_ids": [[0]]}, None)
