"""Named entities as tags of words: which entities a sequence of tags means, and how well they are
found.

Standard library only. Reads the schemes IOB1, IOB2, IOBES and BILOU alike, by the rules of
conlleval, the script of the CoNLL shared tasks.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

OUTSIDE = "O"
_TAG = re.compile(r"([BIESLU])-(.+)")


class Entity(NamedTuple):
    """Words `start` to before `end` of a sentence, and what they name."""

    kind: str
    start: int
    end: int


def is_entity_tag(tag: str) -> bool:
    """Whether a tag is ``O``, or B-, I-, E-, S-, L- or U- before a kind of entity."""
    return tag == OUTSIDE or _TAG.fullmatch(tag) is not None


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities of one sentence, in their order.

    An entity goes on with I-, E- or L- of the same kind after B- or I-; any other tag but ``O``
    begins one, so that I- without a B- before it does (IOB1), as in conlleval.

    Args:
        tags: The tag of each word; see `is_entity_tag`.

    Example:
        >>> entities(["B-PER", "I-PER", "O", "I-LOC"])
        [Entity(kind='PER', start=0, end=2), Entity(kind='LOC', start=3, end=4)]
    """
    found: list[Entity] = []
    is_open, kind = False, ""  # whether the word before may be followed by more of its entity
    for position, tag in enumerate(tags):
        match = _TAG.fullmatch(tag)
        if match is None:
            is_open = False
            continue
        prefix, former = match[1], kind
        kind = match[2]
        if is_open and prefix in "IEL" and kind == former:
            found[-1] = found[-1]._replace(end=position + 1)
        else:
            found.append(Entity(kind, position, position + 1))
        is_open = prefix in "BI"
    return found


def entity_scores(
    predicted: Iterable[Sequence[str]], truth: Iterable[Sequence[str]]
) -> dict[str, float]:
    """Micro-averaged scores over all sentences; an entity is right if its words and kind are.

    Args:
        predicted: Tags of each sentence.
        truth: The right ones, for the same words.

    Returns:
        ``f1``, ``precision`` and ``recall``, as fractions; 0 where nothing was predicted or there
        is nothing to find.

    Raises:
        ValueError: The two differ in sentences or words.
    """
    counts: Counter[str] = Counter()
    for guess, right in zip(predicted, truth, strict=True):
        if len(guess) != len(right):
            raise ValueError(
                f"entity_scores: {len(guess)} tags for {len(right)} words, expected as many. "
                "Give every word a tag."
            )
        guessed, wanted = set(entities(guess)), set(entities(right))
        counts.update(predicted=len(guessed), truth=len(wanted), both=len(guessed & wanted))
    precision = counts["both"] / max(counts["predicted"], 1)
    recall = counts["both"] / max(counts["truth"], 1)
    f1 = 2 * counts["both"] / max(counts["predicted"] + counts["truth"], 1)
    return {"f1": f1, "precision": precision, "recall": recall}
