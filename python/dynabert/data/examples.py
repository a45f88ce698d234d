"""Examples, what a task asks for, and seeded choices among rows. Needs no torch."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

Problem = Literal[
    "classification", "regression", "token-classification", "question-answering", "none"
]
_Item = TypeVar("_Item")


class Example(NamedTuple):
    """One row: a text or a pair of texts and its label; `line` is where its file has it, from 1.

    The label is the index of a class, a score, or None where the task has no labels.
    """

    text: str
    text_pair: str | None
    label: int | float | None
    line: int = 0


class TaggedSentence(NamedTuple):
    """A sentence as words, the index of each word's tag, and the line its first word is on."""

    words: tuple[str, ...]
    tags: tuple[int, ...]
    line: int = 0


class Answer(NamedTuple):
    """An answer as it stands in the context, and the character it begins at."""

    text: str
    start: int


class Question(NamedTuple):
    """A question about a context, and the answers that people have marked in it, at least one."""

    id: str
    question: str
    context: str
    answers: tuple[Answer, ...]


AnyExample = Example | TaggedSentence | Question


@dataclass(frozen=True)
class TaskSpec:
    """What a task asks for.

    Attributes:
        name: Name it is chosen by, for instance ``sst2``.
        problem: ``classification`` or ``regression`` of texts, ``token-classification``,
            ``question-answering``, or ``none`` where there are no labels.
        text_fields: Names of the one or two text columns.
        label_names: Names of the classes or tags, in the order of their indices; empty for other
            problems.
        metrics: Names of the metrics `dynabert.data.metrics.compute_metrics` reports.
        primary_metric: The one that models are compared by; empty where there are no labels.
    """

    name: str
    problem: Problem
    text_fields: tuple[str, ...]
    label_names: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    primary_metric: str = ""

    @property
    def num_labels(self) -> int:
        """Size of the model's output: the number of classes or tags, 1 for a score, 2 for where an
        answer starts and ends, 0 without labels."""
        fixed: dict[Problem, int] = {"regression": 1, "question-answering": 2, "none": 0}
        return fixed.get(self.problem, len(self.label_names))


@dataclass(frozen=True)
class TaskData:
    """A task with its examples.

    Attributes:
        spec: What the task asks for.
        train: Training examples; empty when only validation was asked for. `TaggedSentence` for
            token classification, `Question` for question answering, else `Example`.
        validation: Validation examples, of the same kind.
        source: Where the examples come from, in words.
        fingerprint: SHA-256 over the files (or texts) and the options they were read with.
        train_file: The file that the lines of training examples count in, where there is one.
        validation_file: The same for validation examples.
        options: What was asked for, as plain values: which files, columns and rows.
    """

    spec: TaskSpec
    train: Sequence[AnyExample]
    validation: Sequence[AnyExample]
    source: str
    fingerprint: str
    train_file: Path | None = None
    validation_file: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def holdout_split(examples: Sequence[_Item], n: int, seed: int) -> tuple[list[_Item], list[_Item]]:
    """Set `n` examples apart, for instance to measure importance on rows that are not trained on.

    The choice depends on the seed and the number of examples only, and is the same on every
    machine.

    Args:
        examples: What to split.
        n: Examples to hold out, from 0 to all but one.
        seed: Chooses which.

    Returns:
        The remaining and the held-out examples, each in its former order.

    Raises:
        ValueError: Too many are asked for.
    """
    if not 0 <= n < max(len(examples), 1):
        raise ValueError(
            f"holdout_split: n={n}, expected 0 to {len(examples) - 1}. "
            f"There are {len(examples)} examples, and some must remain."
        )
    held_out = set(_shuffled(len(examples), f"holdout:{seed}")[:n])
    remaining = [item for index, item in enumerate(examples) if index not in held_out]
    return remaining, [examples[index] for index in sorted(held_out)]


def subsample(
    examples: Sequence[_Item], n: int, seed: int, *, balanced: bool = False
) -> list[_Item]:
    """A seeded choice of `n` examples, in their former order; all of them where there are fewer.

    A larger `n` with the same seed contains every smaller one.

    Args:
        examples: What to choose from.
        n: Examples to keep, at least 1.
        seed: Chooses which.
        balanced: Take equally many of each class, as far as there are enough. Classification only.

    Raises:
        ValueError: `n` is not positive, or `balanced` without classes.
    """
    if n < 1:
        raise ValueError(f"subsample: n={n}, expected at least 1. Ask for some rows.")
    order = _shuffled(len(examples), f"subsample:{seed}")
    if balanced:
        by_class: dict[int, list[int]] = defaultdict(list)
        for index in order:
            label = getattr(examples[index], "label", None)
            if not isinstance(label, int):
                raise ValueError(
                    f"subsample: balanced=True with label {label}, expected classes. "
                    "Only classification tasks can be balanced."
                )
            by_class[label].append(index)
        turns = zip_longest(*(by_class[label] for label in sorted(by_class)))
        order = [index for index in chain.from_iterable(turns) if index is not None]
    return [examples[index] for index in sorted(order[:n])]


def _shuffled(count: int, salt: str) -> list[int]:
    """0 to ``count - 1``, ordered by a hash: no random generator whose stream may change."""
    return sorted(
        range(count), key=lambda index: hashlib.sha256(f"{salt}:{index}".encode()).digest()
    )
