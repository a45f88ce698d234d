"""What a search is worth: the best score at equal latency, with what it found and without.

The best of hundreds of scores is partly luck, and so is a choice by the reported scores themselves.
Here every choice is made by the score on other rows than those it is reported on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from dynabert.subnet import SubnetConfig


@dataclass(frozen=True)
class Measured:
    """A subnet that was scored on two sets of rows, and timed.

    Attributes:
        subnet: The subnet.
        choice_score: Score on the rows that choose.
        score: Score on the rows that are reported on.
        latency_ms: Measured latency, in milliseconds.
        is_uniform: Whether it is a cell of the uniform grid.
    """

    subnet: SubnetConfig
    choice_score: float
    score: float
    latency_ms: float
    is_uniform: bool


@dataclass(frozen=True)
class Gain:
    """What is chosen at one budget, the latency of a subnet of the uniform grid.

    Attributes:
        budget_ms: The budget, in milliseconds.
        uniform: The choice from the uniform grid.
        best: The choice from everything.
    """

    budget_ms: float
    uniform: Measured
    best: Measured

    @property
    def score(self) -> float:
        """By how much the score is better, on the rows that are reported on."""
        return self.best.score - self.uniform.score


@dataclass(frozen=True)
class SearchGain:
    """The gain over the uniform grid.

    Attributes:
        at: At the latency of each subnet of the uniform grid, from the fastest.
        uniform_mean: Mean score over all budgets from the fastest to the slowest of these, chosen
            from the uniform grid: the area under the score at equal latency.
        best_mean: The same, chosen from everything.
    """

    at: tuple[Gain, ...]
    uniform_mean: float
    best_mean: float

    @classmethod
    def of(cls, measured: Sequence[Measured]) -> SearchGain:
        """Compare the choices from all subnets with those from the uniform ones.

        Raises:
            ValueError: There is no uniform subnet.
        """
        uniform = [each for each in measured if each.is_uniform]
        if not uniform:
            raise ValueError(
                "SearchGain: measured has no subnet of the uniform grid, expected at least one."
            )
        budgets = sorted({each.latency_ms for each in uniform})
        gains = [
            Gain(budget, _chosen(uniform, budget), _chosen(measured, budget)) for budget in budgets
        ]
        span = (budgets[0], budgets[-1])
        return cls(tuple(gains), _mean_score(uniform, *span), _mean_score(measured, *span))

    def to_json(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "uniform_mean": self.uniform_mean,
            "best_mean": self.best_mean,
            "at": [
                {
                    "budget_ms": gain.budget_ms,
                    "uniform": gain.uniform.subnet.name,
                    "uniform_score": gain.uniform.score,
                    "best": gain.best.subnet.name,
                    "best_score": gain.best.score,
                    "best_latency_ms": gain.best.latency_ms,
                    "gain": gain.score,
                }
                for gain in self.at
            ],
        }


def _chosen(measured: Sequence[Measured], budget_ms: float) -> Measured:
    within = [each for each in measured if each.latency_ms <= budget_ms]
    return max(within, key=lambda each: (each.choice_score, -each.latency_ms))


def _mean_score(measured: Sequence[Measured], low_ms: float, high_ms: float) -> float:
    """Mean over budgets from `low_ms` to `high_ms` of the score of what is chosen."""
    if low_ms == high_ms:
        return _chosen(measured, low_ms).score
    between = {each.latency_ms for each in measured if low_ms < each.latency_ms < high_ms}
    area = math.fsum(
        _chosen(measured, left).score * (right - left)
        for left, right in pairwise(sorted({low_ms, high_ms, *between}))
    )
    return area / (high_ms - low_ms)
