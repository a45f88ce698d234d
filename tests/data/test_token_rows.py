"""Tagged sentences as rows of tokens."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from dynabert.data.collators import DynamicPadCollator
from dynabert.data.examples import TaggedSentence
from dynabert.data.token_rows import encode_sentences

NAMES = ("O", "B-X", "I-X")
PLANES = TaggedSentence(("a", "planes", "is", "films"), (0, 1, 2, 1), 4)
SHORT = TaggedSentence(("good",), (1,), 9)


def test_the_first_token_of_a_word_has_its_tag(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = encode_sentences([PLANES, SHORT], tokenizer, 32)
    first, second = rows[0], rows[1]
    tokens = tokenizer.convert_ids_to_tokens(first["input_ids"])
    assert tokens == ["[CLS]", "a", "plane", "##s", "is", "film", "##s", "[SEP]"]
    assert first["labels"] == [-100, 0, 1, -100, 2, 1, -100, -100]
    assert first["length"] == len(first["input_ids"]) == rows.lengths[0]
    assert second["labels"] == [-100, 1, -100]


def test_byte_level_words_are_tokenised_as_in_a_text(
    byte_level_tokenizer: PreTrainedTokenizerBase,
) -> None:
    sentence = TaggedSentence(("great", "great", "é"), (1, 2, 1))
    row = encode_sentences([sentence], byte_level_tokenizer, 32)[0]
    assert row["input_ids"] == byte_level_tokenizer("great great é")["input_ids"]
    tokens = byte_level_tokenizer.convert_ids_to_tokens(row["input_ids"])
    assert tokens == ["<s>", "g", "r", "eat", "Ġgreat", "Ġ", "Ã", "©", "</s>"]
    assert row["labels"] == [-100, 1, -100, -100, 2, -100, 1, -100, -100]
    assert "token_type_ids" not in row


@pytest.mark.parametrize("max_length", [3, 4, 5, 6, 7, 8, 32])
@pytest.mark.parametrize("side", ["right", "left"])
def test_every_word_is_predicted_once_however_short_a_row(
    tokenizer: PreTrainedTokenizerBase, max_length: int, side: str
) -> None:
    tokenizer.truncation_side = side
    sentences = [SHORT, PLANES, PLANES]
    rows = encode_sentences(sentences, tokenizer, max_length)
    assert max(rows.lengths) <= max_length
    labels = [[tag for tag in rows[i]["labels"] if tag != -100] for i in range(len(rows))]
    assert all(labels)  # no row without anything to learn
    assert sum(map(len, labels)) == 9
    assert rows.predicted_tags(labels, NAMES) == rows.right_tags(NAMES)
    assert rows.right_tags(NAMES)[1] == ["O", "B-X", "I-X", "B-X"]


def test_a_word_without_tokens_is_outside(tokenizer: PreTrainedTokenizerBase) -> None:
    sentence = TaggedSentence(("a", "\u200b", "film"), (1, 2, 2))
    rows = encode_sentences([sentence], tokenizer, 32)
    assert rows[0]["labels"] == [-100, 1, 2, -100]
    assert rows.predicted_tags([[1, 2]], NAMES) == [["B-X", "O", "I-X"]]
    assert rows.predicted_tags([[1, 0]], ("NN", "VB", "DT")) == [["VB", "NN", "NN"]]


@pytest.mark.parametrize("side", ["right", "left"])
def test_batch_ignores_padding(tokenizer: PreTrainedTokenizerBase, side: str) -> None:
    tokenizer.padding_side = side
    rows = encode_sentences([PLANES, SHORT], tokenizer, 32)
    batch = DynamicPadCollator(tokenizer)([rows[0], rows[1]])
    assert batch["labels"].shape == batch["input_ids"].shape == (2, 8)
    assert batch["labels"].dtype == torch.int64
    padding = batch["attention_mask"] == 0
    assert padding.sum() == 5
    assert (batch["labels"][padding] == -100).all()
    assert batch["labels"][~padding].tolist() == rows[0]["labels"] + rows[1]["labels"]


def test_bad_input_is_refused(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"sentences=\[\], expected at least one"):
        encode_sentences([], tokenizer, 32)
    with pytest.raises(ValueError, match="max_length=2, expected more than 2"):
        encode_sentences([SHORT], tokenizer, 2)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(ValueError, match="tokenizer=BertTokenizer, expected a fast one"):
        encode_sentences([SHORT], tokenizer, 32)
