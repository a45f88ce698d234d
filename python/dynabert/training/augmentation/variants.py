"""Variants of a text: some of its words, drawn at random, in other words' places.

TinyBERT's data augmentation (Jiao et al., 2020), with the texts of a pair taken one at a time.
Needs no label.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dynabert.data.examples import Example, TaskSpec
from dynabert.training.augmentation.sources import CandidateSource
from dynabert.training.augmentation.words import STOP_WORDS, Word, find_words, with_case_of

DEFAULT_ATTEMPTS = 20
ATTEMPTS = {
    "mnli": 10,
    "mnli-mm": 10,
    "qqp": 10,
    "sst2": 20,
    "qnli": 20,
    "cola": 30,
    "mrpc": 30,
    "stsb": 30,
    "rte": 30,
}
"""Attempts per text by task, as in the original code; `DEFAULT_ATTEMPTS` for others."""

_Replaceable = list[tuple[Word, list[str]]]


@dataclass(frozen=True)
class AugmentationArguments:
    """How variants are drawn. Checked on construction."""

    attempts: int = DEFAULT_ATTEMPTS
    """Draws per text; each that gives a new text is a variant."""
    probability: float = 0.4
    """Chance of each word to be replaced in one attempt."""
    seed: int = 0
    """With the text and its line, decides every draw."""
    keep_original: bool = True
    """Give each row itself before its variants."""
    stop_words: frozenset[str] = field(default=STOP_WORDS, repr=False)
    """Words never replaced, in lower case."""

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(
                f"AugmentationArguments: attempts={self.attempts}, expected at least 1."
            )
        if not 0 < self.probability <= 1:
            raise ValueError(
                f"AugmentationArguments: probability={self.probability}, expected a number above "
                "0, at most 1. It is the chance of a word to be replaced."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; the stop-words as a digest."""
        words = "\n".join(sorted(self.stop_words))
        return {
            "attempts": self.attempts,
            "probability": self.probability,
            "seed": self.seed,
            "keep_original": self.keep_original,
            "stop_words": hashlib.sha256(words.encode()).hexdigest(),
        }


class AugmentedRow(NamedTuple):
    """A variant of one row, or the row itself, where `attempt` is 0.

    The attempts at the second text of a pair are numbered on from those at the first. `line` is
    that of the row it was made from.
    """

    text: str
    text_pair: str | None
    line: int
    attempt: int


def check_task(spec: TaskSpec) -> None:
    """Refuse a task whose labels point at words of the text.

    Raises:
        ValueError: It is one.
    """
    if spec.problem in ("token-classification", "question-answering"):
        raise ValueError(
            f"augment: task {spec.name} is {spec.problem}, expected one with a label or score for "
            "each text, or without labels. Replaced words would not fit its labels."
        )


def augmented_rows(
    examples: Sequence[Example], source: CandidateSource, arguments: AugmentationArguments
) -> list[AugmentedRow]:
    """Every row and its variants, in the order of the rows.

    In each attempt every word that has candidates is replaced with the given probability by one of
    them, all equally likely. Everything between replaced words stays as it is, and an initial
    capital too. Of a pair one text is varied at a time, beside the other as it was.

    What comes of a row depends on its text, its line, `source` and `arguments` only.

    Args:
        examples: Rows to vary; labels are not looked at. All words are looked up at once:
            `write_augmented` goes through long lists part by part.
        source: Proposes replacements.
        arguments: How variants are drawn.
    """
    texts = dict.fromkeys(
        text for e in examples for text in (e.text, e.text_pair) if text is not None
    )
    words = {text: find_words(text, arguments.stop_words) for text in texts}
    found = iter(source.candidates([word for text in texts for word in words[text]]))
    choices = {text: _replaceable(words[text], found) for text in texts}
    rows = []
    for example in examples:
        text, pair, line = example.text, example.text_pair, example.line
        if arguments.keep_original:
            rows.append(AugmentedRow(text, pair, line, 0))
        for attempt, variant in _variants(text, choices[text], f"{line}:0", arguments):
            rows.append(AugmentedRow(variant, pair, line, attempt))
        if pair is not None:
            for attempt, variant in _variants(pair, choices[pair], f"{line}:1", arguments):
                rows.append(AugmentedRow(text, variant, line, arguments.attempts + attempt))
    return rows


def _replaceable(words: Sequence[Word], found: Iterator[list[str]]) -> _Replaceable:
    """The words that have candidates, spelt as they are. `found` is advanced by one for each word.

    Sorted: one choice is as good as another, and sources may rank equally good ones either way.
    """
    replaceable = []
    for word in words:
        spelt = {with_case_of(word.form, candidate) for candidate in next(found) if candidate}
        if choices := sorted(spelt - {word.form}):
            replaceable.append((word, choices))
    return replaceable


def _variants(
    text: str, replaceable: _Replaceable, place: str, arguments: AugmentationArguments
) -> Iterator[tuple[int, str]]:
    """New texts, each with the number of the attempt that gave it, from 1."""
    # Of Python's generator, `random()` alone is promised never to change.
    draw = random.Random(f"{arguments.seed}:{place}:{text}").random
    seen = {text}
    for attempt in range(1, arguments.attempts + 1):
        parts = []
        end = 0
        for word, choices in replaceable:
            if draw() < arguments.probability:
                parts += [text[end : word.start], choices[int(draw() * len(choices))]]
                end = word.end
        variant = "".join([*parts, text[end:]])
        if variant not in seen:
            seen.add(variant)
            yield attempt, variant
