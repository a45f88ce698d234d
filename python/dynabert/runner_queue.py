"""Which call runs next, and at which candidate: the one with the earliest deadline, as good as all
waiting ones can afford.

Standard library only; times are seconds of one clock unless the name says ms.
"""

from __future__ import annotations

import threading
from bisect import insort
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, islice

# Calls further back are not looked at: it is chosen again before their turn. To look at 64 of them
# takes 66 us at most with 12 candidates (one core of an AMD EPYC).
_LOOK_AHEAD = 64
_numbers = count()


@dataclass(order=True)
class WaitingCall:
    """A call that wants to run.

    Attributes:
        deadline: When it should be done.
        number: Calls of the same deadline run in this order.
        table_ms: Tabled latency of each candidate for it.
        waiting: Calls like this one that wait in a queue of the caller's, not necessarily whole.
    """

    deadline: float
    number: int = field(default_factory=lambda: next(_numbers), init=False)
    table_ms: Sequence[float] = field(compare=False)
    waiting: float = field(default=0.0, compare=False)
    _turn: threading.Lock = field(default_factory=threading.Lock, compare=False, init=False)


class DeadlineQueue:
    """Lets calls of many threads run one at a time, the earliest deadline first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[WaitingCall] = []
        self._is_busy = False
        self.most_waiting = 0

    def __len__(self) -> int:
        """Calls that wait now; the one that runs is not among them."""
        return len(self._waiting)

    @contextmanager
    def turn(self, call: WaitingCall) -> Iterator[None]:
        """Waits until it is the turn of `call`, which lasts as long as the context."""
        self._wait(call)
        try:
            yield
        finally:
            self._pass_on()

    def next_calls(self) -> list[WaitingCall]:
        """Those that wait now, in the order of their turns; at most as many as matter."""
        with self._lock:
            return list(islice(self._waiting, _LOOK_AHEAD))

    def _wait(self, call: WaitingCall) -> None:
        with self._lock:
            if not self._is_busy:
                self._is_busy = True
                return
            call._turn.acquire()
            insort(self._waiting, call)
            self.most_waiting = max(self.most_waiting, len(self._waiting))
        try:
            call._turn.acquire()  # until `_pass_on` releases it
        except BaseException:  # interrupted: nobody may wait for a call that will not run
            with self._lock:
                was_waiting = call in self._waiting
                if was_waiting:
                    self._waiting.remove(call)
            if not was_waiting:
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.pop(0)._turn.release()
            else:
                self._is_busy = False


@dataclass(frozen=True)
class Choice:
    """What a call runs at.

    Attributes:
        candidate: Index of the candidate.
        predicted_ms: How long that takes at most, at the percentile of the margin.
        factor: Expected over tabled latency of it.
        fits: Whether the call is then in time; if not, `candidate` is the fastest.
    """

    candidate: int
    predicted_ms: float
    factor: float
    fits: bool


def choose(
    now: float,
    call: WaitingCall,
    behind: Sequence[WaitingCall],
    factors: Sequence[float],
    margin_ms: float,
) -> Choice:
    """The best candidate with which `call`, and those behind it, are in time.

    Every call is counted at the same candidate, since what is given to the first is taken from the
    others. A call that would be late even if all ran at the fastest candidate holds nobody back.
    ``call.waiting`` calls are taken to have the deadline of `call`, as if all had come with it.

    Args:
        now: The time.
        call: What runs next.
        behind: What waits, in the order of the turns.
        factors: Expected over tabled latency of each candidate, the best candidate first.
        margin_ms: To keep free before every deadline.
    """
    own_ms = [ms * factor for ms, factor in zip(call.table_ms, factors, strict=True)]
    fastest = min(range(len(own_ms)), key=own_ms.__getitem__)

    def chosen(candidate: int, fits: bool = True) -> Choice:
        return Choice(candidate, own_ms[candidate] + margin_ms, factors[candidate], fits)

    slack_ms = (call.deadline - now) * 1e3 - margin_ms
    if own_ms[fastest] > slack_ms:
        return chosen(fastest, fits=False)
    # With as many of those in the caller's queue as can be in time.
    run_alike = min(1 + call.waiting, slack_ms / own_ms[fastest]) if own_ms[fastest] else 1.0

    def finish_times(candidate: int) -> Iterator[float]:
        factor = factors[candidate]
        end_ms = now * 1e3 + margin_ms + own_ms[candidate] * (1 + call.waiting)
        for waiting in behind:
            end_ms += waiting.table_ms[candidate] * factor
            yield end_ms / 1e3

    deadlines = [  # infinite for who cannot be in time
        waiting.deadline if end <= waiting.deadline else float("inf")
        for end, waiting in zip(finish_times(fastest), behind, strict=True)
    ]
    for candidate in range(fastest):
        if own_ms[candidate] * run_alike <= slack_ms and all(
            end <= deadline
            for end, deadline in zip(finish_times(candidate), deadlines, strict=True)
        ):
            return chosen(candidate)
    return chosen(fastest)
