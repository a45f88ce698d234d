"""Sources, models and tokenisers small enough to be seen through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaTokenizer,
)

from dynabert.training.augmentation import Word

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = ("film", "movie", "plot", "good", "bad", "great", "nice", "story", "plane", "was", "the")
_SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "initializer_range": 0.3,  # at 0.02 a tiny network hardly depends on its input
}


class Fixed:
    """Knows the candidates of some words by heart, and counts the calls."""

    def __init__(self, known: Mapping[str, Sequence[str]]) -> None:
        self.known = known
        self.num_calls = 0

    @property
    def identity(self) -> dict[str, Any]:
        return {"kind": "fixed", "known": {k: list(v) for k, v in self.known.items()}}

    def candidates(self, words: Sequence[Word]) -> list[list[str]]:
        self.num_calls += 1
        return [list(self.known.get(word.form.lower(), ())) for word in words]


def bert(seed: int = 0) -> tuple[BertForMaskedLM, PreTrainedTokenizerBase]:
    """A BERT of 64 positions whose vocabulary has whole words, tails, marks and a number."""
    pieces = [*SPECIAL, *WORDS, "##s", "##ing", ".", ",", "10", "café"]
    tokenizer = BertTokenizer(vocab={piece: index for index, piece in enumerate(pieces)})
    torch.manual_seed(seed)
    config = BertConfig(vocab_size=len(pieces), max_position_embeddings=64, **_SIZES)
    return BertForMaskedLM(config).eval(), tokenizer


def roberta(seed: int = 0) -> tuple[RobertaForMaskedLM, PreTrainedTokenizerBase]:
    """A RoBERTa of 64 positions: byte-level pieces for the words after a space, and for a tail."""
    marks = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    pieces = [*marks, *"Ġabcdefghijklmnopqrstuvwxyz.,Ã©"]
    merges = []
    for whole in ("ing", *(f"Ġ{word}" for word in WORDS)):
        for end in range(2, len(whole) + 1):
            if whole[:end] not in pieces:
                pieces.append(whole[:end])
                merges.append((whole[: end - 1], whole[end - 1]))
    tokenizer = RobertaTokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)}, merges=merges
    )
    torch.manual_seed(seed)
    config = RobertaConfig(
        vocab_size=len(pieces), max_position_embeddings=66, type_vocab_size=1, **_SIZES
    )
    return RobertaForMaskedLM(config).eval(), tokenizer


def plain_candidates(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    word: Word,
    allowed: Mapping[int, str],
    count: int,
) -> list[str]:
    """Candidates of a single-piece word by the book: one sentence at a time, every score."""
    inputs = tokenizer(word.text, word.text, return_offsets_mapping=True, return_tensors="pt")
    (offsets,) = inputs.pop("offset_mapping").tolist()
    token = offsets.index([word.start, word.end])
    inputs["input_ids"][0, token] = tokenizer.mask_token_id
    with torch.no_grad():
        scores = model(**inputs).logits[0, token]
    ranked = sorted(allowed, key=lambda id_: (-float(scores[id_]), id_))
    return [allowed[id_] for id_ in ranked if allowed[id_] != word.form.lower()][:count]
