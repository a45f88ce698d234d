"""The ablation's tables and sentences follow from the records, whichever way the numbers fall."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.ablation_table import ABLATIONS, EXTRAS, MAIN, render

CELLS = ("w1-d1", "w0.5-d1")
PASSES = {MAIN: 100.0, "rewiring+distillation+final": 150.0, "rewiring+distillation+sandwich": 50.0}


def record(variant: str, seed: int, scores: dict[str, float], **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "task": "sst2",
        "variant": variant,
        "seed": seed,
        "metric": "accuracy",
        "scores": scores,
        "validation_rows": 872,
        "steps": 20,
        "full_passes": PASSES.get(variant, 80.0),
        "seconds": 7.0,
        "resumed": False,
        "settings": {
            "rows": 320,
            "teacher_rows": 640,
            "teacher_epochs": 3.0,
            "width_epochs": 1.0,
            "width_depth_epochs": 2.0,
            "final_epochs": 1.0,
            "batch_size": 32,
            "learning_rate": 5e-5,
        },
        "machine": {"hardware": "CPU", "threads": 1, "torch": "2.13", "transformers": "5.23"},
    }
    return {**values, **changes}


def records(**changes: Any) -> list[dict[str, Any]]:
    """Two seeds; the full network 0.9, the half one 0.8 with rewiring and distillation."""
    half = {
        MAIN: 0.80,
        "no-rewiring+distillation": 0.70,
        "rewiring+labels": 0.78,
        "no-rewiring+labels": 0.60,
        "rewiring+distillation+final": 0.82,
        "rewiring+distillation+sandwich": 0.80,
    }
    rows = []
    for seed in (1, 2):
        shift = 0.02 * (seed - 1)
        rows.append(record("teacher", seed, {"w1-d1": 0.91}, **changes))
        for variant, score in half.items():
            scores = {"w1-d1": 0.9, "w0.5-d1": score + shift}
            rows.append(record(variant, seed, scores, **changes))
        rows.append(record("alone w0.5-d1", seed, {"w0.5-d1": 0.79}, full_passes=30.0, **changes))
    return rows


def line(text: str, start: str) -> str:
    (found,) = [row for row in text.splitlines() if row.startswith(start)]
    return found


def lines_between(text: str, start: str, end: str) -> str:
    return text.partition(start)[2].partition(end)[0]


def test_means_spreads_and_differences_are_taken_seed_by_seed() -> None:
    text = render(records(), "made_up.jsonl")
    means = lines_between(text, "Grid means:", "Sizes:")
    assert line(means, f"| {MAIN} |") == (
        f"| {MAIN} | 2 | 85.50 ± 0.71 | 81.00 ± 1.41 | - | 20 | 100 | 7 |"
    )
    assert line(means, "| rewiring+labels |") == (
        "| rewiring+labels | 2 | 84.50 ± 0.71 | 79.00 ± 1.41 | -1.00 (-1.00 to -1.00) | 20 | 80 "
        "| 7 |"
    )
    # Single sizes have no full network: the difference is to the same sizes.
    assert line(means, "| alone |") == (
        "| alone | 2 | - | 79.00 ± 0.00 | -2.00 (-3.00 to -1.00) | 20 | 30 | 7 |"
    )
    sizes = lines_between(text, "Sizes:", "\n- ")
    assert line(sizes, "| alone |") == "| alone | - | 79.0 ± 0.0 |"
    assert line(sizes, f"| {MAIN} above") == (
        f"| {MAIN} above alone | - | +2.00 (+1.00 to +3.00) |"
    )


def test_sentences_say_where_it_wins() -> None:
    text = render(records(), "made_up.jsonl")
    assert "Teacher: 3 epochs on 640 rows, 91.00 ± 0.00." in text
    assert f"{MAIN} is 5.00 above no-rewiring+distillation" in text
    assert "above it in 2 of 2 seeds" in text
    assert f"rewiring+distillation+final is 1.00 above {MAIN}, at 1.50 times" in text
    assert f"rewiring+distillation+sandwich is level with {MAIN}, at 0.50 times" in text
    assert "is above at 1 of 1 sizes." in text
    assert "one size costs 30 to 30 and all of them 30" in text


def test_sentences_say_where_it_loses() -> None:
    rows = records()
    for row in rows:
        if row["variant"] in ("rewiring+labels", "alone w0.5-d1"):
            row["scores"]["w0.5-d1"] = 0.84
    text = render(rows, "made_up.jsonl")
    assert f"{MAIN} is 1.50 below rewiring+labels" in text
    assert "above it in 0 of 2 seeds" in text
    assert "is above at 0 of 1 sizes; not at w0.5-d1 -3.00 (-4.00 to -2.00)." in text


def test_the_overview_counts_tasks() -> None:
    other = records(task="cola", metric="mcc")
    for row in other:
        if row["variant"] == "no-rewiring+labels":
            row["scores"]["w1-d1"] = 1.0
            row["scores"]["w0.5-d1"] = 0.9
    overview = lines_between(
        render([*records(), *other], "made_up.jsonl"), "## All tasks", "## sst2"
    )
    assert line(overview, "| no-rewiring+labels |") == (
        "| no-rewiring+labels | -10.00 (-10.00 to -10.00) | +9.50 (+9.00 to +10.00) |"
    )
    assert "is above every ablation's on 1 of 2 tasks (sst2)." in overview
    assert "at each size on 2 of 2 tasks (sst2, cola)" in overview


def test_an_unfinished_file_shows_what_there_is() -> None:
    rows = [
        row
        for row in records()
        if row["seed"] == 1 or row["variant"] in ("teacher", MAIN, "rewiring+labels")
    ]
    text = render([row for row in rows if row["variant"] not in EXTRAS], "made_up.jsonl")
    means = lines_between(text, "Grid means:", "Sizes:")
    assert line(means, "| no-rewiring+labels |").startswith(
        "| no-rewiring+labels | 1 | 75.00 | 60.00 | -10.00 |"
    )
    assert "above it in 1 of 1 seeds" in text and "above it in 2 of 2 seeds" in text
    assert not any(name in text for name in EXTRAS)

    started = render([record("teacher", 1, {"w1-d1": 0.91})], "made_up.jsonl")
    assert "91.00" in started and "Grid means" not in started


@pytest.mark.parametrize("missing", [MAIN, *ABLATIONS])
def test_no_verdict_without_both_sides(missing: str) -> None:
    tasks = (
        [row for row in records(task=task) if row["variant"] != missing]
        for task in ("sst2", "cola")
    )
    text = render([row for rows in tasks for row in rows], "made_up.jsonl")
    assert "above every ablation's on 0 of 0 tasks." in text


def test_the_last_of_two_lines_counts_and_resumed_seconds_do_not() -> None:
    again = record(MAIN, 2, {"w1-d1": 0.9, "w0.5-d1": 0.9}, resumed=True)
    means = lines_between(render([*records(), again], "made_up.jsonl"), "Grid means:", "Sizes:")
    assert line(means, f"| {MAIN} |") == (
        f"| {MAIN} | 2 | 87.50 ± 3.54 | 85.00 ± 7.07 | - | 20 | 100 | - |"
    )
