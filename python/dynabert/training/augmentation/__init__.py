"""Data augmentation for the stages that learn from a teacher: texts with some words replaced.

`words` says what may be replaced, a `CandidateSource` by what, `variants` draws, `files` keeps the
result on disk. See docs/training.md.

Example:
    >>> model, tokenizer = load_masked_lm("bert-base-uncased")  # doctest: +SKIP
    >>> source = FirstAnswer(
    ...     [MaskedLMSource(model, tokenizer), WordVectorSource("glove.6B.300d.txt")]
    ... )  # doctest: +SKIP
    >>> data = load_task("sst2", data_dir)  # doctest: +SKIP
    >>> write_augmented("aug.jsonl", data.train, source, AugmentationArguments())  # doctest: +SKIP
"""

from dynabert.training.augmentation.files import AugmentedFile, read_augmented, write_augmented
from dynabert.training.augmentation.masked_lm import MaskedLMSource, load_masked_lm
from dynabert.training.augmentation.sources import (
    NUM_CANDIDATES,
    CandidateSource,
    FirstAnswer,
    WordNetSource,
    WordVectorSource,
)
from dynabert.training.augmentation.training_rows import add_augmented
from dynabert.training.augmentation.variants import (
    ATTEMPTS,
    DEFAULT_ATTEMPTS,
    AugmentationArguments,
    AugmentedRow,
    augmented_rows,
    check_task,
)
from dynabert.training.augmentation.words import STOP_WORDS, Word, find_words

__all__ = [
    "ATTEMPTS",
    "DEFAULT_ATTEMPTS",
    "NUM_CANDIDATES",
    "STOP_WORDS",
    "AugmentationArguments",
    "AugmentedFile",
    "AugmentedRow",
    "CandidateSource",
    "FirstAnswer",
    "MaskedLMSource",
    "Word",
    "WordNetSource",
    "WordVectorSource",
    "add_augmented",
    "augmented_rows",
    "check_task",
    "find_words",
    "load_masked_lm",
    "read_augmented",
    "write_augmented",
]
