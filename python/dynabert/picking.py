"""Choose the subnet to deploy: the most accurate one that meets a latency budget.

Candidates are the subnets of the trained uniform grid that were both evaluated and timed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dynabert.evaluation import ScoredSubnet
from dynabert.latency import LatencyTable
from dynabert.subnet import SubnetConfig

Percentile = Literal["median", "p20", "p80", "p99"]
PERCENTILES: tuple[Percentile, ...] = ("median", "p20", "p80", "p99")


@dataclass(frozen=True)
class Pick:
    """The chosen subnet.

    Attributes:
        subnet: What to pass as ``model(..., subnet=...)``.
        primary: Its score on the task.
        latency_ms: Its latency at the percentile asked for.
        budget_ms: The budget it meets.
        percentile: The percentile of latency that was held to the budget.
        untimed: Names of evaluated subnets that were no candidates because the table has no latency
            for them.
    """

    subnet: SubnetConfig
    primary: float
    latency_ms: float
    budget_ms: float
    percentile: Percentile
    untimed: tuple[str, ...]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other point beats, from the fastest to the best.

    A point (latency, score) is beaten by one that is at most as slow and at least as good, and
    better in one of the two. Of equal points the first stands for all.

    Example:
        >>> pareto_front([(4.0, 0.90), (2.0, 0.85), (3.0, 0.84), (2.5, 0.85)])
        [1, 0]
    """
    front: list[int] = []
    best = float("-inf")
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i)):
        if points[index][1] > best:
            front.append(index)
            best = points[index][1]
    return front


def check_request(budget_ms: float, percentile: str) -> None:
    """Refuse what `pick` would refuse, before anything is measured for it.

    Raises:
        ValueError: A budget that is not a positive number, or an unknown percentile.
    """
    if percentile not in PERCENTILES:
        raise ValueError(
            f"pick: percentile={percentile!r}, expected one of {', '.join(PERCENTILES)}. "
            "p80 is the usual choice."
        )
    if not 0 < budget_ms < float("inf"):
        raise ValueError(
            f"pick: budget_ms={budget_ms}, expected a positive number of milliseconds. "
            "Give the longest acceptable latency of one batch."
        )


def pick(
    grid: Sequence[ScoredSubnet],
    latency: LatencyTable,
    budget_ms: float,
    percentile: Percentile = "p80",
) -> Pick:
    """The most accurate subnet within the budget; of equally accurate ones the fastest.

    Args:
        grid: Scores, one row per subnet.
        latency: Latencies on the machine that will serve, in milliseconds.
        budget_ms: Longest acceptable latency of one batch, in milliseconds.
        percentile: Which percentile of the measured latencies must fit.

    Raises:
        ValueError: A budget that is not a positive number, an unknown percentile, no subnet that
            was both evaluated and timed, or none within the budget; the last names the fastest.

    Example:
        >>> choice = pick(grid, latency, budget_ms=10.0)  # doctest: +SKIP
        >>> model(**inputs, subnet=choice.subnet)  # doctest: +SKIP
    """
    check_request(budget_ms, percentile)
    timed = [(row, latency.row(row.subnet)) for row in grid]
    candidates = [(row, times.at(percentile)) for row, times in timed if times is not None]
    untimed = tuple(row.subnet.name for row, times in timed if times is None)
    if not candidates:
        raise ValueError(
            f"pick: grid=[{', '.join(untimed)}], expected subnets that the latency table holds "
            f"({', '.join(row.subnet.name for row in latency.rows)}). "
            "Measure the latency of the evaluated subnets."
        )
    within = [(row, ms) for row, ms in candidates if ms <= budget_ms]
    if not within:
        fastest, fastest_ms = min(candidates, key=lambda item: item[1])
        enough = math.ceil(fastest_ms * 100) / 100
        raise ValueError(
            f"pick: budget_ms={budget_ms:g}, expected at least {enough:g}. "
            f"The fastest subnet, {fastest.subnet.name}, takes {fastest_ms:.3g} ms ({percentile})."
        )
    best, best_ms = min(within, key=lambda item: (-item[0].primary, item[1]))
    return Pick(best.subnet, best.primary, best_ms, budget_ms, percentile, untimed)
