"""Whose turn it is, and what it may take: choices against brute force, turns of real threads."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence

import pytest

from dynabert.runner_queue import DeadlineQueue, WaitingCall, choose

FACTORS = [1.0, 1.0, 1.0]
MS = (40.0, 20.0, 10.0)


def call(deadline_ms: float, table_ms: Sequence[float] = MS, waiting: float = 0.0) -> WaitingCall:
    return WaitingCall(deadline_ms / 1e3, table_ms, waiting)


def chosen(head: WaitingCall, *behind: WaitingCall, now_ms: float = 0, margin_ms: float = 0) -> int:
    choice = choose(now_ms / 1e3, head, behind, FACTORS, margin_ms)
    assert choice.predicted_ms == head.table_ms[choice.candidate] + margin_ms
    assert choice.fits == (now_ms + choice.predicted_ms <= head.deadline * 1e3)
    return choice.candidate


@pytest.mark.parametrize(
    ("deadline_ms", "margin_ms", "expected"),
    [(40, 0, 0), (39.9, 0, 1), (44, 5, 1), (20, 0, 1), (10, 0, 2), (9, 0, 2), (-5, 0, 2)],
)
def test_a_call_alone_gets_the_best_that_fits(
    deadline_ms: float, margin_ms: float, expected: int
) -> None:
    assert chosen(call(deadline_ms), margin_ms=margin_ms) == expected
    assert chosen(call(deadline_ms + 7), margin_ms=margin_ms, now_ms=7) == expected


def test_those_behind_are_left_their_time() -> None:
    assert chosen(call(100), call(80)) == 0  # 40, 80
    assert chosen(call(100), call(79)) == 1  # 20, 40
    assert chosen(call(100), call(100), call(100)) == 1  # 60; at 40 each the third ends at 120
    assert chosen(call(50), *[call(50)] * 4) == 2
    assert chosen(call(100), call(100), margin_ms=25) == 1  # one margin for all: 25 + 20 + 20


def test_a_call_that_cannot_be_in_time_holds_nobody_back() -> None:
    hopeless = call(15)
    assert chosen(call(200), hopeless) == 0
    assert chosen(call(200), hopeless, call(119)) == 1  # 40 each would be 120
    assert chosen(hopeless, call(200), now_ms=6) == 2


@pytest.mark.parametrize(
    ("waiting", "expected"), [(0, 0), (0.5, 0), (0.6, 1), (2, 1), (2.1, 2), (5, 2), (500, 2)]
)
def test_the_queue_of_the_caller_counts(waiting: float, expected: int) -> None:
    """60 ms for all: 40 * 1.5, 20 * 3, and beyond 10 * 6 there is no help."""
    assert chosen(call(60, waiting=waiting)) == expected


def test_choices_equal_brute_force() -> None:
    """Of random queues: the best candidate whose every call in time is as many as the fastest's."""
    draw = random.Random(3)
    seen = set()
    for _ in range(500):
        queue = [
            call(draw.uniform(5, 200), [ms * draw.choice([0.5, 1, 2]) for ms in MS])
            for _ in range(draw.randint(1, 6))
        ]
        queue.sort()
        factors = [draw.uniform(0.8, 1.3) for _ in MS]
        margin_ms = draw.choice([0.0, 3.0])
        now_ms = draw.uniform(0, 20)

        in_time = []
        for candidate, factor in enumerate(factors):
            ends = [
                now_ms + margin_ms + sum(c.table_ms[candidate] * factor for c in queue[: n + 1])
                for n in range(len(queue))
            ]
            in_time.append({n for n, end in enumerate(ends) if end <= queue[n].deadline * 1e3})
        fastest = min(range(3), key=lambda c: queue[0].table_ms[c] * factors[c])
        expected = fastest
        if 0 in in_time[fastest]:
            expected = next(c for c in range(3) if in_time[fastest] <= in_time[c])
        choice = choose(now_ms / 1e3, queue[0], queue[1:], factors, margin_ms)
        assert choice.candidate == expected
        assert choice.fits == (0 in in_time[fastest])
        seen.add((choice.candidate, choice.fits))
    assert seen >= {(0, True), (1, True), (2, True), (2, False)}


def wait_until_waiting(queue: DeadlineQueue, number: int) -> None:
    while len(queue) < number:
        threading.Event().wait(1e-4)


def test_turns_go_by_deadline_and_one_at_a_time() -> None:
    queue = DeadlineQueue()
    deadlines = [30.0, 10.0, 20.0, 10.0, 5.0]
    order: list[int] = []
    running = 0

    def work(number: int) -> None:
        nonlocal running
        with queue.turn(calls[number]):
            running += 1
            assert running == 1
            order.append(number)
            running -= 1

    calls = [call(ms) for ms in deadlines]
    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(calls))]
    with queue.turn(call(1000.0)):
        for thread in threads:
            thread.start()
        wait_until_waiting(queue, len(threads))
        assert [waiting.deadline for waiting in queue.next_calls()] == sorted(
            waiting.deadline for waiting in calls
        )
        assert order == []
    for thread in threads:
        thread.join()
    assert order == [4, 1, 3, 2, 0]
    assert (len(queue), queue.most_waiting) == (0, 5)


class _InterruptedLock:
    """A lock whose second `acquire`, the one that waits, ends like one that Ctrl+C interrupts."""

    def __init__(self) -> None:
        self.num_acquired = 0

    def acquire(self) -> bool:
        self.num_acquired += 1
        if self.num_acquired > 1:
            raise KeyboardInterrupt
        return True


def test_an_interrupted_call_leaves_the_queue() -> None:
    queue = DeadlineQueue()
    interrupted = call(1.0)
    interrupted._turn = _InterruptedLock()  # type: ignore[assignment]
    with queue.turn(call(5.0)):
        with pytest.raises(KeyboardInterrupt), queue.turn(interrupted):
            pytest.fail("it had no turn")
        assert len(queue) == 0
    with queue.turn(call(5.0)):
        assert len(queue) == 0


def test_a_failed_call_passes_its_turn_on() -> None:
    queue = DeadlineQueue()
    with pytest.raises(RuntimeError), queue.turn(call(5.0)):
        raise RuntimeError
    with queue.turn(call(5.0)):
        assert len(queue) == 0
