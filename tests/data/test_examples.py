from collections import Counter

import pytest

from dynabert.data.examples import Example, TaskSpec, holdout_split, subsample

EXAMPLES = [Example(f"text {row}", None, row % 3 if row < 30 else 0, row) for row in range(101)]


@pytest.mark.parametrize("n", [0, 1, 37, 100])
def test_holdout_is_a_partition_in_order(n: int) -> None:
    rest, held_out = holdout_split(EXAMPLES, n, seed=3)
    assert len(held_out) == n
    assert sorted(rest + held_out, key=lambda example: example.line) == EXAMPLES
    assert rest == sorted(rest, key=lambda example: example.line)


def test_holdout_depends_on_the_seed_and_nothing_else() -> None:
    first = holdout_split(EXAMPLES, 20, seed=1)[1]
    assert holdout_split(EXAMPLES, 20, seed=1)[1] == first
    assert holdout_split(EXAMPLES, 20, seed=2)[1] != first


@pytest.mark.parametrize("n", [-1, 101, 500])
def test_holdout_must_leave_something(n: int) -> None:
    with pytest.raises(ValueError, match=f"n={n}, expected 0 to 100"):
        holdout_split(EXAMPLES, n, seed=0)


def test_choices_are_the_same_on_every_machine_and_version() -> None:
    assert holdout_split(range(20), 4, seed=0)[1] == [4, 7, 8, 9]
    assert [example.line for example in subsample(EXAMPLES, 5, seed=0)] == [3, 61, 66, 77, 91]


def test_larger_subsample_contains_the_smaller() -> None:
    small, large = subsample(EXAMPLES, 10, seed=5), subsample(EXAMPLES, 60, seed=5)
    assert len(small) == 10
    assert len(large) == 60
    assert set(small) < set(large)
    assert large == sorted(large, key=lambda example: example.line)


def test_subsample_of_fewer_rows_is_all_of_them() -> None:
    assert subsample(EXAMPLES, 1000, seed=0) == EXAMPLES


@pytest.mark.parametrize(("n", "counts"), [(9, [3, 3, 3]), (40, [20, 10, 10])])
def test_balanced_takes_turns_until_a_class_runs_out(n: int, counts: list[int]) -> None:
    chosen = Counter(example.label for example in subsample(EXAMPLES, n, seed=0, balanced=True))
    assert [chosen[label] for label in range(3)] == counts


def test_subsample_refuses_nothing_and_balanced_scores() -> None:
    with pytest.raises(ValueError, match="n=0, expected at least 1"):
        subsample(EXAMPLES, 0, seed=0)
    with pytest.raises(ValueError, match=r"balanced=True with label 0\.5, expected classes"):
        subsample([Example("a", None, 0.5)], 1, seed=0, balanced=True)


@pytest.mark.parametrize(
    ("problem", "names", "expected"),
    [("classification", ("a", "b", "c"), 3), ("regression", (), 1), ("none", (), 0)],
)
def test_num_labels(problem: str, names: tuple[str, ...], expected: int) -> None:
    assert TaskSpec("t", problem, ("text",), names).num_labels == expected  # type: ignore[arg-type]
