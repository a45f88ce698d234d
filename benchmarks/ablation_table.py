"""Tables and sentences from the records of `benchmarks.ablation`; every number is computed here.

Scores are shown times 100. A spread is the standard deviation over seeds; a difference is taken
seed by seed, over the seeds both sides have.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]

MAIN = "rewiring+distillation"
ABLATIONS = ("no-rewiring+distillation", "rewiring+labels", "no-rewiring+labels")
EXTRAS = ("rewiring+distillation+final", "rewiring+distillation+sandwich")
TEACHER = "teacher"
ALONE = "alone"
_FULL = "w1-d1"
_NOTHING = "-"


@dataclass(frozen=True)
class Scores:
    """One number per seed, as a fraction."""

    by_seed: Mapping[int, float]

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.by_seed.values())

    def minus(self, other: Scores) -> Scores:
        """Differences, for the seeds that both have."""
        common = sorted(set(self.by_seed) & set(other.by_seed))
        return Scores({seed: self.by_seed[seed] - other.by_seed[seed] for seed in common})

    def text(self, digits: int = 2) -> str:
        """Mean and spread, times 100."""
        if not self.by_seed:
            return _NOTHING
        text = f"{100 * self.mean:.{digits}f}"
        if len(self.by_seed) > 1:
            text += f" ± {100 * statistics.stdev(self.by_seed.values()):.{digits}f}"
        return text

    def signed(self) -> str:
        """Mean and range of a difference, times 100."""
        if not self.by_seed:
            return _NOTHING
        text = f"{100 * self.mean:+.2f}"
        if len(self.by_seed) > 1:
            low, high = min(self.by_seed.values()), max(self.by_seed.values())
            text += f" ({100 * low:+.2f} to {100 * high:+.2f})"
        return text

    def seeds_above(self) -> str:
        """In how many seeds a difference is above zero."""
        return f"{sum(v > 0 for v in self.by_seed.values())} of {len(self.by_seed)} seeds"


class TaskRecords:
    """The records of one task."""

    def __init__(self, name: str, records: Sequence[Record]) -> None:
        self.name = name
        self._by_variant: dict[str, dict[int, Record]] = {}
        for record in records:
            self._by_variant.setdefault(record["variant"], {})[record["seed"]] = record
        self.metric = records[0]["metric"]
        self.settings = records[0]["settings"]
        self.seeds = sorted({record["seed"] for record in records})
        self.validation_rows = records[0]["validation_rows"]
        elastic = [r for r in records if not _is_alone(r["variant"]) and len(r["scores"]) > 1]
        self.cells: list[str] = list(elastic[0]["scores"]) if elastic else []
        self.small_cells = [cell for cell in self.cells if cell != _FULL]

    def has(self, variant: str) -> bool:
        """Whether a variant, or all single sizes together, has a record."""
        if variant == ALONE:
            return any(map(_is_alone, self._by_variant))
        return variant in self._by_variant

    def records(self, variant: str) -> list[Record]:
        """All records of a variant, or of all single sizes."""
        return [
            record
            for name, by_seed in self._by_variant.items()
            if name == variant or (variant == ALONE and _is_alone(name))
            for record in by_seed.values()
        ]

    def cell(self, variant: str, cell: str) -> Scores:
        """Scores of one size."""
        name = f"{ALONE} {cell}" if variant == ALONE else variant
        found = self._by_variant.get(name, {})
        return Scores({s: r["scores"][cell] for s, r in found.items() if cell in r["scores"]})

    def mean(self, variant: str, cells: Sequence[str]) -> Scores:
        """Means over `cells`, for the seeds that have all of them."""
        by_cell = [self.cell(variant, cell).by_seed for cell in cells]
        if not by_cell:
            return Scores({})
        seeds = sorted(set.intersection(*map(set, by_cell)))
        return Scores({seed: statistics.fmean(cell[seed] for cell in by_cell) for seed in seeds})

    def difference(self, variant: str) -> Scores:
        """How far the mean of a variant is above that of rewiring + distillation; single sizes are
        held against the same sizes of it."""
        cells = self.small_cells if variant == ALONE else self.cells
        return self.mean(variant, cells).minus(self.mean(MAIN, cells))

    def per_seed(self, variant: str, field: str) -> float:
        """Mean over seeds of a cost; that of single sizes is their sum."""
        totals: dict[int, float] = {}
        for record in self.records(variant):
            totals[record["seed"]] = totals.get(record["seed"], 0) + record[field]
        return statistics.fmean(totals.values())


def render(records: Sequence[Record], source: str) -> str:
    """The whole document as Markdown.

    Args:
        records: Lines of a results file, in any order; the last of several with the same task,
            variant and seed counts.
        source: Name of that file.
    """
    names = list(dict.fromkeys(record["task"] for record in records))
    tasks = [TaskRecords(name, [r for r in records if r["task"] == name]) for name in names]
    machines = dict.fromkeys(_machine(record["machine"]) for record in records)
    parts = [
        "# What each part of the training is worth",
        f"Made from the {len(records)} lines of `{source}` by `python -m benchmarks.ablation "
        f"table`. Measured on {'; '.join(machines)}. Scores are times 100, with the standard "
        "deviation over seeds; differences are taken seed by seed, with their range.",
    ]
    if len(tasks) > 1:
        parts += ["## All tasks", _overview(tasks), _bullets(_overall_findings(tasks))]
    for task in tasks:
        parts += [f"## {task.name}: {task.metric}", _setting(task)]
        if task.cells:
            parts += ["Grid means:", _means(task), "Sizes:", _sizes(task)]
            parts += [_bullets(_findings(task))]
    return "\n\n".join(parts) + "\n"


def _machine(machine: Record) -> str:
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    return (
        f"{machine['hardware']}, {threads}, torch {machine['torch']}, transformers "
        f"{machine['transformers']}"
    )


def _setting(task: TaskRecords) -> str:
    values = task.settings
    single = values["width_epochs"] + values["width_depth_epochs"]
    return (
        f"Teacher: {values['teacher_epochs']:g} epochs on {values['teacher_rows']} rows, "
        f"{task.cell(TEACHER, _FULL).text()}. Variants: {values['rows']} rows, epochs "
        f"{values['width_epochs']:g} (width), {values['width_depth_epochs']:g} (width-depth), "
        f"{values['final_epochs']:g} (final), {single:g} (single sizes); batch "
        f"{values['batch_size']}, learning rate {values['learning_rate']:g}. Scored on "
        f"{task.validation_rows} validation rows, which also choose the best epoch. "
        f"Seeds: {', '.join(map(str, task.seeds))}."
    )


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _shown(task: TaskRecords, *, alone: bool = True) -> list[str]:
    variants = (MAIN, *ABLATIONS, *EXTRAS, *((ALONE,) if alone else ()))
    return [variant for variant in variants if task.has(variant)]


def _overview(tasks: Sequence[TaskRecords]) -> str:
    """Differences of the grid mean to rewiring + distillation, by task."""
    variants = [v for v in (*ABLATIONS, *EXTRAS, ALONE) if any(task.has(v) for task in tasks)]
    head = [f"difference to {MAIN}", *(f"{task.name}, {task.metric}" for task in tasks)]
    return _table(head, [[v, *(task.difference(v).signed() for task in tasks)] for v in variants])


def _means(task: TaskRecords) -> str:
    head = ["variant", "seeds", "all sizes", "all but the full one", f"difference to {MAIN}"]
    head += ["optimiser steps", "full-network passes", "seconds"]
    lines = []
    for variant in _shown(task):
        small = task.mean(variant, task.small_cells)
        seconds = [r["seconds"] for r in task.records(variant) if not r["resumed"]]
        is_whole = len(seconds) == len(task.records(variant))
        lines.append(
            [
                variant,
                str(len(small.by_seed)),
                task.mean(variant, task.cells).text(),
                small.text(),
                _NOTHING if variant == MAIN else task.difference(variant).signed(),
                f"{task.per_seed(variant, 'steps'):.0f}",
                f"{task.per_seed(variant, 'full_passes'):.0f}",
                f"{task.per_seed(variant, 'seconds'):.0f}" if is_whole else _NOTHING,
            ]
        )
    return _table(head, lines)


def _sizes(task: TaskRecords) -> str:
    lines = [
        [variant, *(task.cell(variant, cell).text(1) for cell in task.cells)]
        for variant in _shown(task)
    ]
    against = [task.cell(MAIN, cell).minus(task.cell(ALONE, cell)) for cell in task.cells]
    if task.has(ALONE) and task.has(MAIN):
        lines.append([f"{MAIN} above {ALONE}", *(scores.signed() for scores in against)])
    return _table(["variant", *task.cells], lines)


def _bullets(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _overall_findings(tasks: Sequence[TaskRecords]) -> list[str]:
    def where(holds: Callable[[TaskRecords], bool | None]) -> str:
        answers = {task.name: holds(task) for task in tasks}
        known = [name for name, answer in answers.items() if answer is not None]
        good = [name for name in known if answers[name]]
        return f"{len(good)} of {len(known)} tasks" + (f" ({', '.join(good)})" if good else "")

    return [
        f"The mean over the grid of {MAIN} is above every ablation's on {where(_beats_ablations)}.",
        f"It is above the single-size networks at each size on {where(_beats_every_size)}, and in "
        f"the mean over sizes on {where(_beats_sizes_in_mean)}.",
    ]


def _beats_ablations(task: TaskRecords) -> bool | None:
    differences = [task.difference(variant) for variant in ABLATIONS]
    if any(not difference.by_seed for difference in differences):
        return None
    return all(difference.mean < 0 for difference in differences)


def _beats_every_size(task: TaskRecords) -> bool | None:
    against = [task.cell(MAIN, cell).minus(task.cell(ALONE, cell)) for cell in task.small_cells]
    if not against or any(not scores.by_seed for scores in against):
        return None
    return all(scores.mean > 0 for scores in against)


def _beats_sizes_in_mean(task: TaskRecords) -> bool | None:
    difference = task.difference(ALONE)
    return difference.mean < 0 if difference.by_seed else None


def _findings(task: TaskRecords) -> list[str]:
    """What the numbers of one task say, for and against."""
    sentences = []
    for variant in ABLATIONS:
        ahead = task.mean(MAIN, task.cells).minus(task.mean(variant, task.cells))
        if ahead.by_seed:
            sentences.append(
                f"{MAIN} is {_above(ahead)} {variant} in the mean over all sizes; above it in "
                f"{ahead.seeds_above()}."
            )
    for variant in EXTRAS:
        change = task.difference(variant)
        if change.by_seed:
            cost = task.per_seed(variant, "full_passes") / task.per_seed(MAIN, "full_passes")
            sentences.append(
                f"{variant} is {_above(change)} {MAIN}, at {cost:.2f} times its full-network "
                "passes."
            )
    return sentences + _findings_on_sizes(task)


def _findings_on_sizes(task: TaskRecords) -> list[str]:
    against = {
        cell: task.cell(MAIN, cell).minus(task.cell(ALONE, cell)) for cell in task.small_cells
    }
    against = {cell: scores for cell, scores in against.items() if scores.by_seed}
    if not against:
        return []
    above = [cell for cell, scores in against.items() if scores.mean > 0]
    others = [f"{cell} {s.signed()}" for cell, s in against.items() if cell not in above]
    verdict = f"Against a network of the same size trained alone, {MAIN} is above at "
    verdict += f"{len(above)} of {len(against)} sizes"
    verdict += f"; not at {', '.join(others)}." if others else "."
    alone = task.records(ALONE)
    passes = [record["full_passes"] for record in alone]
    steps = statistics.fmean(record["steps"] for record in alone)
    return [
        verdict,
        f"Equal budget means equal optimiser steps: {steps:.0f} for every single size, "
        f"{task.per_seed(MAIN, 'steps'):.0f} for all sizes of {MAIN} together. In full-network "
        f"passes (a forward pass of one batch through the whole encoder; backward counts two) one "
        f"size costs {min(passes):.0f} to {max(passes):.0f} and all of them "
        f"{task.per_seed(ALONE, 'full_passes'):.0f}, {MAIN} "
        f"{task.per_seed(MAIN, 'full_passes'):.0f}, since each of its steps trains every size.",
    ]


def _above(difference: Scores) -> str:
    if not difference.mean:
        return "level with"
    return f"{abs(100 * difference.mean):.2f} {'above' if difference.mean > 0 else 'below'}"


def _is_alone(variant: str) -> bool:
    return variant.startswith(f"{ALONE} ")
