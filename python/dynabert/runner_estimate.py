"""How long a call of each candidate will take: measured tables, corrected by every call that ran.

Standard library only. The estimate of candidate s for a batch is

    table_s(work) * exp(shared + own_s) + margin

- ``table_s`` interpolates what was measured over the *work* of a batch, ``tokens + share *
  sum(length ** 2)``: real tokens, and what attention adds for every pair of them. Without padding,
  the operations of a forward pass are proportional to it.
- ``shared`` and ``own_s`` follow the logarithm of real over tabled time, exponentially weighted:
  a machine that slowed down moves all candidates, what is peculiar to one moves that one.
- ``margin`` is the percentile of the latest errors, in milliseconds, since what disturbs a call
  (another process on its core) takes its time whatever the size of the call. Of n errors it is the
  one of rank ``ceil(percentile * (n + 1))``, so that the next error, if it is like them, exceeds it
  no more often than the percentile says (split conformal prediction).
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Together: six calls after a machine got twice as slow, their candidate is known to within 10 %.
SHARED_RATE = 0.25
OWN_RATE = 0.1
# What an accident taught about a candidate that has not run since is half forgotten in 140 calls.
FADING = 0.005
# A call that was disturbed teaches the corrections no more than one that took 1.65 times as long.
MOST_SURPRISE = 0.5
# Errors kept. At the 99th percentile one accident among them leaves no trace, two do.
WINDOW = 256
# A refused call measures nothing, so it takes what was learnt this much back towards the table.
RELAXING = 0.05


@dataclass(frozen=True)
class MeasuredPoint:
    """Median latencies of all candidates at one amount of work.

    Attributes:
        work: Work of the batch that was timed, in tokens; positive.
        latency_ms: Median latency of each candidate.
    """

    work: float
    latency_ms: tuple[float, ...]


class LatencyEstimate:
    """The estimate of every candidate; not safe under threads.

    Args:
        points: What was measured, at least one point.
        percentile: Share of the calls, in percent, that should take no longer than estimated.
        errors_ms: Differences of measured times from their median, to begin with.

    Attributes:
        factors: Expected over tabled latency of each candidate.
        margin_ms: What is added to an expected latency.
    """

    def __init__(
        self,
        points: Sequence[MeasuredPoint],
        *,
        percentile: float,
        errors_ms: Iterable[float] = (),
    ) -> None:
        latencies: dict[float, tuple[float, ...]] = {}
        longest = (0.0,) * len(points[0].latency_ms)
        for point in sorted(points, key=lambda point: point.work):
            # More work never takes less time; where it did, that was noise.
            longest = tuple(map(max, zip(longest, point.latency_ms, strict=True)))
            latencies[point.work] = longest
        self._works, self._columns = list(latencies), list(latencies.values())
        self._share = percentile / 100
        self._shared = 0.0
        self._own = [0.0] * len(self._columns[0])
        errors = list(errors_ms)
        thinned = errors[:: math.ceil(len(errors) / WINDOW) or 1]
        self._errors_ms: deque[float] = deque(thinned, maxlen=WINDOW)
        self._ordered_errors = sorted(self._errors_ms)
        self._update()

    def table_ms(self, work: float) -> list[float]:
        """Tabled latency of every candidate, in milliseconds; the same whatever has run since.

        Straight lines between measured points, and beyond the last as the last of them goes on. A
        single point is taken as a constant below it and as a proportion above: rather too long.
        """
        works, columns = self._works, self._columns
        if len(works) == 1:
            share = max(1.0, work / works[0])
            return [ms * share for ms in columns[0]]
        right = min(max(bisect_right(works, work), 1), len(works) - 1)
        low, high = works[right - 1], works[right]
        share = (work - low) / (high - low)
        between = zip(columns[right - 1], columns[right], strict=True)
        if share >= 0:
            return [a + share * (b - a) for a, b in between]
        # Below the first point the line must not run into nothing.
        return [max(a + share * (b - a), a * work / low) for a, b in between]

    def observe(self, candidate: int, table_ms: float, latency_ms: float) -> None:
        """Learn from a call: which candidate ran, what the table says, how long it really took."""
        self._keep(latency_ms - table_ms * self.factors[candidate])
        surprise = math.log(latency_ms / table_ms) - self._shared - self._own[candidate]
        surprise = min(max(surprise, -MOST_SURPRISE), MOST_SURPRISE)
        self._own = [own * (1 - FADING) for own in self._own]
        self._own[candidate] += OWN_RATE * surprise
        self._shared += SHARED_RATE * surprise
        self._update()

    def relax(self) -> None:
        """Take every correction, and the margin, a step back towards the table."""
        self._shared *= 1 - RELAXING
        self._own = [own * (1 - RELAXING) for own in self._own]
        self._errors_ms = deque((ms * (1 - RELAXING) for ms in self._errors_ms), maxlen=WINDOW)
        self._ordered_errors = sorted(self._errors_ms)
        self._update()

    def _keep(self, error_ms: float) -> None:
        if len(self._errors_ms) == WINDOW:
            del self._ordered_errors[bisect_left(self._ordered_errors, self._errors_ms[0])]
        self._errors_ms.append(error_ms)
        insort(self._ordered_errors, error_ms)

    def _update(self) -> None:
        self.factors: Sequence[float] = [math.exp(self._shared + own) for own in self._own]
        count = len(self._ordered_errors)
        rank = min(math.ceil(self._share * (count + 1)), count)
        self.margin_ms = max(0.0, self._ordered_errors[rank - 1]) if count else 0.0
