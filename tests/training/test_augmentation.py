"""Which words are replaced, how variants are drawn, and that nothing else of a text changes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynabert.data.examples import Example, TaskSpec
from dynabert.training.augmentation import (
    ATTEMPTS,
    STOP_WORDS,
    AugmentationArguments,
    Word,
    augmented_rows,
    check_task,
    find_words,
)
from tests.training.augmentation_toys import Fixed

SYNONYMS = Fixed(
    {
        "film": ["movie", "picture"],
        "good": ["fine", "great", "nice"],
        "plot": ["story"],
        "café": ["bar"],
        "same": ["Same"],
    }
)
FEW = AugmentationArguments(attempts=7)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The film was good.", ["film", "good"]),
        ("John's friends' O'Brien isn't", ["John", "friends"]),
        ("John\u2019s don\u2019t", ["John"]),
        ("mp3 3D 1990s snake_case 10 -- !", []),
        ("does n't know, we 'll 'film'", ["know", "film"]),
        ("well-known café/bar", ["well", "known", "café", "bar"]),
        ("हिन्दी", []),  # letters and combining marks: no part is a word
        ("", []),
    ],
)
def test_words_are_letters_and_no_stop_words(text: str, expected: list[str]) -> None:
    assert [word.form for word in find_words(text)] == expected


def test_stop_words_may_be_chosen() -> None:
    assert [w.form for w in find_words("Der Film war gut", {"der", "war"})] == ["Film", "gut"]
    assert all(word == word.lower() and word.isalpha() for word in STOP_WORDS)


def test_original_comes_first_and_variants_are_new() -> None:
    rows = augmented_rows([Example("A good film.", None, 1, 12)], SYNONYMS, FEW)
    texts = [row.text for row in rows]
    assert texts[0] == "A good film." and rows[0].attempt == 0
    assert 1 < len(texts) <= 1 + FEW.attempts
    assert len(set(texts)) == len(texts)
    attempts = [row.attempt for row in rows]
    assert attempts == sorted(set(attempts)) and attempts[-1] <= FEW.attempts
    assert {row.line for row in rows} == {12} and {row.text_pair for row in rows} == {None}
    without = augmented_rows(
        [Example("A good film.", None, 1, 12)], SYNONYMS, replace(FEW, keep_original=False)
    )
    assert without == rows[1:]


def test_capitals_are_kept() -> None:
    certain = AugmentationArguments(attempts=9, probability=1.0, keep_original=False)
    rows = augmented_rows([Example("Film FILM film Plot!", None, None)], SYNONYMS, certain)
    for row in rows:
        assert re.fullmatch("(Movie|Picture) (MOVIE|PICTURE) (movie|picture) Story!", row.text)
    assert len(rows) > 1


def test_word_is_no_candidate_for_itself() -> None:
    certain = AugmentationArguments(probability=1.0)
    (row,) = augmented_rows([Example("Same, SAME", None, None)], SYNONYMS, certain)
    assert row.text == "Same, SAME"


def test_each_word_is_replaced_with_the_probability_asked_for() -> None:
    rows = augmented_rows(
        [Example("the plot", None, None, line) for line in range(4000)],
        SYNONYMS,
        AugmentationArguments(attempts=1, probability=0.3, keep_original=False),
    )
    assert 0.27 < len(rows) / 4000 < 0.33  # 4 standard deviations


def test_candidates_are_equally_likely() -> None:
    rows = augmented_rows(
        [Example("good", None, None, line) for line in range(3000)],
        SYNONYMS,
        AugmentationArguments(attempts=1, probability=1.0, keep_original=False),
    )
    counts = [sum(row.text == word for row in rows) for word in ("fine", "great", "nice")]
    assert sum(counts) == 3000 and min(counts) > 900


def test_pairs_are_varied_one_text_at_a_time() -> None:
    # The original code augments the second text beside the last variant of the first.
    example = Example("A good film.", "The plot of a film.", None, 3)
    rows = augmented_rows([example], SYNONYMS, FEW)
    assert rows[0][:2] == example[:2]
    first = [row for row in rows if row.text != example.text]
    second = [row for row in rows if row.text_pair != example.text_pair]
    assert len(first) > 1 and len(second) > 1 and len(first) + len(second) == len(rows) - 1
    assert all(row.text_pair == example.text_pair and 1 <= row.attempt <= 7 for row in first)
    assert all(row.text == example.text and 8 <= row.attempt <= 14 for row in second)


def test_seed_line_and_text_decide() -> None:
    example = Example("A good film with a good plot.", None, None, 5)
    rows = augmented_rows([example], SYNONYMS, FEW)
    others = [Example("A good plot.", "A film.", None, 1), Example("good", None, None, 2)]
    among = augmented_rows([others[0], example, others[1]], SYNONYMS, FEW)
    assert [row for row in among if row.line == 5] == rows
    relabelled = augmented_rows([example._replace(label=1)], SYNONYMS, FEW)
    assert relabelled == rows
    for changed in (replace(FEW, seed=1), replace(FEW, probability=0.9)):
        assert augmented_rows([example], SYNONYMS, changed) != rows
    elsewhere = augmented_rows([example._replace(line=6)], SYNONYMS, FEW)
    assert [row.text for row in elsewhere] != [row.text for row in rows]


def test_ranking_of_equally_good_candidates_does_not_matter() -> None:
    example = Example("A good film.", None, None, 5)
    turned = Fixed({word: found[::-1] for word, found in SYNONYMS.known.items()})
    assert augmented_rows([example], turned, FEW) == augmented_rows([example], SYNONYMS, FEW)


def test_a_text_is_looked_up_once() -> None:
    class Counting(Fixed):
        def candidates(self, words: Sequence[Word]) -> list[list[str]]:
            assert len(words) == len(set(words))
            return super().candidates(words)

    source = Counting(SYNONYMS.known)
    examples = [Example("A good film.", "The plot.", None, line) for line in range(9)]
    assert len({row.line for row in augmented_rows(examples, source, FEW)}) == 9
    assert source.num_calls == 1


TEXTS = st.lists(
    st.one_of(
        st.sampled_from(["film", "Good", "PLOT", "café", "the", "not", "10", "Same", "film's"]),
        st.text(max_size=4),
    ),
    max_size=8,
).map(" ".join)


@given(
    text=TEXTS,
    pair=st.none() | TEXTS,
    line=st.integers(0, 2**40),
    attempts=st.integers(1, 9),
    probability=st.floats(0.01, 1.0),
    seed=st.integers(-(2**63), 2**63),
)
def test_only_replaced_words_change(
    text: str, pair: str | None, line: int, attempts: int, probability: float, seed: int
) -> None:
    arguments = AugmentationArguments(attempts, probability, seed)
    rows = augmented_rows([Example(text, pair, None, line)], SYNONYMS, arguments)
    assert rows[0] == (text, pair, line, 0)
    assert len({row[:2] for row in rows}) == len(rows)
    for row in rows[1:]:
        if row.attempt <= attempts:
            assert row.text_pair == pair and matches(text, row.text)
        else:
            assert pair is not None and row.text_pair is not None
            assert row.text == text and matches(pair, row.text_pair)
            assert row.attempt <= 2 * attempts
    assert len({row.attempt for row in rows}) == len(rows)


def matches(original: str, variant: str) -> bool:
    """Whether `variant` is `original` with some of its words replaced by their candidates."""
    pattern, end = "", 0
    for word in find_words(original):
        known = SYNONYMS.known.get(word.form.lower(), ())
        forms = {word.form, *known, *map(str.title, known), *map(str.upper, known)}
        pattern += re.escape(original[end : word.start]) + f"(?:{'|'.join(forms)})"
        end = word.end
    return re.fullmatch(pattern + re.escape(original[end:]), variant, re.DOTALL) is not None


@pytest.mark.parametrize("problem", ["token-classification", "question-answering"])
def test_tasks_whose_labels_point_at_words_are_refused(problem: Any) -> None:
    spec = TaskSpec("tags", problem, ("text",))
    with pytest.raises(ValueError, match=f"augment: task tags is {problem}, expected one with a"):
        check_task(spec)


def test_tasks_without_labels_are_taken() -> None:
    for problem in ("classification", "regression", "none"):
        check_task(TaskSpec("task", problem, ("text",)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attempts": 0}, "attempts=0, expected at least 1"),
        ({"probability": 0.0}, "probability=0.0, expected a number above 0"),
        ({"probability": 1.1}, "probability=1.1, expected a number above 0, at most 1"),
        ({"probability": float("nan")}, "probability=nan, expected"),
    ],
)
def test_arguments_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"AugmentationArguments: {message}"):
        AugmentationArguments(**changes)


def test_attempts_are_those_of_the_original_code() -> None:
    assert {ATTEMPTS[task] for task in ("cola", "mrpc", "stsb", "rte")} == {30}
    assert (
        {ATTEMPTS[task] for task in ("sst2", "qnli")} == {AugmentationArguments().attempts} == {20}
    )
    assert {ATTEMPTS[task] for task in ("mnli", "mnli-mm", "qqp")} == {10}
