"""A small WordPiece tokeniser, built on the spot."""

from pathlib import Path

import pytest
from transformers import BertTokenizer, PreTrainedTokenizerBase

WORDS = "a plane is taking off the film was good bad very long not at all , . ##s"


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split()]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    loaded: PreTrainedTokenizerBase = BertTokenizer.from_pretrained(tmp_path)
    return loaded
