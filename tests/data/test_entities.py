"""Entities and their scores against cases worked out by hand, after conlleval's rules."""

import pytest

from dynabert.data.entities import Entity, entities, entity_scores, is_entity_tag


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("", []),
        ("O O O", []),
        ("B-PER I-PER O B-LOC", [("PER", 0, 2), ("LOC", 3, 4)]),
        ("I-PER I-PER O I-LOC", [("PER", 0, 2), ("LOC", 3, 4)]),
        ("I-PER B-PER I-PER", [("PER", 0, 1), ("PER", 1, 3)]),
        ("B-PER B-PER", [("PER", 0, 1), ("PER", 1, 2)]),
        ("B-PER I-LOC I-LOC", [("PER", 0, 1), ("LOC", 1, 3)]),
        ("I-PER I-LOC I-PER", [("PER", 0, 1), ("LOC", 1, 2), ("PER", 2, 3)]),
        ("B-PER O I-PER", [("PER", 0, 1), ("PER", 2, 3)]),
        ("B-PER I-PER E-PER S-LOC", [("PER", 0, 3), ("LOC", 3, 4)]),
        ("B-PER L-PER U-LOC U-LOC", [("PER", 0, 2), ("LOC", 2, 3), ("LOC", 3, 4)]),
        ("S-PER I-PER", [("PER", 0, 1), ("PER", 1, 2)]),
        ("B-PER E-PER I-PER", [("PER", 0, 2), ("PER", 2, 3)]),
        ("E-PER E-PER", [("PER", 0, 1), ("PER", 1, 2)]),
        ("B-PER E-LOC", [("PER", 0, 1), ("LOC", 1, 2)]),
        ("B-A-B I-A-B", [("A-B", 0, 2)]),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "",
)
def test_entities_of_a_sentence(tags: str, expected: list[tuple[str, int, int]]) -> None:
    assert entities(tags.split()) == [Entity(*entity) for entity in expected]


@pytest.mark.parametrize(
    ("predicted", "truth", "precision", "recall", "f1"),
    [
        (["B-PER I-PER O B-LOC"], ["B-PER I-PER O B-LOC"], 1, 1, 1),
        # IOB1 means the same entities.
        (["I-PER I-PER O I-LOC"], ["B-PER I-PER O B-LOC"], 1, 1, 1),
        # A part of the words, or another kind, is not the entity.
        (["B-PER O O B-LOC"], ["B-PER I-PER O B-LOC"], 1 / 2, 1 / 2, 1 / 2),
        (["B-ORG I-ORG O B-LOC"], ["B-PER I-PER O B-LOC"], 1 / 2, 1 / 2, 1 / 2),
        (["B-PER I-LOC"], ["B-PER I-PER"], 0, 0, 0),
        # One of 3 found is one of 2 wanted.
        (["B-PER O", "B-LOC B-LOC"], ["B-PER O", "O B-PER"], 1 / 3, 1 / 2, 2 / 5),
        (["O O"], ["B-PER O"], 0, 0, 0),
        (["B-PER O"], ["O O"], 0, 0, 0),
        (["O O", "O"], ["O O", "O"], 0, 0, 0),
        # The same words of two sentences are two entities.
        (["B-PER", "O"], ["B-PER", "B-PER"], 1, 1 / 2, 2 / 3),
    ],
    ids=[
        "all",
        "iob1",
        "too-short",
        "other-kind",
        "kind-changes",
        "micro",
        "none-predicted",
        "none-there",
        "only-outside",
        "two-sentences",
    ],
)
def test_scores_are_exact_and_micro_averaged(
    predicted: list[str], truth: list[str], precision: float, recall: float, f1: float
) -> None:
    scores = entity_scores([tags.split() for tags in predicted], [t.split() for t in truth])
    assert scores == pytest.approx({"f1": f1, "precision": precision, "recall": recall})


def test_words_must_match() -> None:
    with pytest.raises(ValueError, match="1 tags for 2 words"):
        entity_scores([["O"]], [["O", "O"]])


@pytest.mark.parametrize(
    ("tag", "expected"),
    [("O", True), ("B-PER", True), ("U-x-y", True), ("NN", False), ("B-", False), ("b-PER", False)],
)
def test_is_entity_tag(tag: str, expected: bool) -> None:
    assert is_entity_tag(tag) is expected
