"""One peer, alone in this process; blocked on stdin, not spinning, whenever it is not asked to run.

Each line on stdin is a request, each line on the stream that stdout was is its answer, JSON both:

    {"do": "prepare", "job": {...}, "output": FILE}   load, run once, write the output as .npy
        -> {"notes": {...}}
    {"do": "warm", "seconds": s}                      run for a while, untimed
        -> {"calls": n}
    {"do": "round", "seconds": s, "settle": k}        k untimed calls, then samples for s seconds
        -> {"samples_ms": [...]}
    {"do": "profile", "seconds": s, "subnets": [...]} costs only our own runtime knows
        -> {"rows": [...]}
    {"do": "stop"}                                    end

An answer of {"error": "..."} ends the worker. Whatever libraries print goes to stderr.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import numpy as np

from benchmarks.runtimes import Job, Session

_LEAST_SAMPLES = 3  # of a round; a slow peer takes longer rather than being judged by one call


def serve(requests: TextIO, answers: TextIO, load: Callable[[Job], Session]) -> None:
    """Answer requests until told to stop, or until the other end is gone.

    Args:
        requests: Lines of JSON.
        answers: Where lines of JSON go.
        load: Opens the session of a job.
    """
    worker = _Worker(load)
    for line in requests:
        request = json.loads(line)
        if request["do"] == "stop":
            return
        try:
            answer = worker.answer(request)
        except Exception as error:  # whatever a runtime raises is this peer's result
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        if "error" in answer:
            return


class _Worker:
    def __init__(self, load: Callable[[Job], Session]) -> None:
        self._load = load
        self._job: Job | None = None
        self._session: Session | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] == "prepare":
            self._job = Job(**request["job"])
            self._session = self._load(self._job)
            np.save(request["output"], self._session.output())
            return {"notes": self._session.notes}
        if self._session is None or self._job is None:
            raise ValueError(
                f"peer_worker: do={request['do']!r}, expected 'prepare' first. Send the job."
            )
        if request["do"] == "warm":
            return {"calls": _run_for(self._session.run, request["seconds"])}
        if request["do"] == "round":
            for _ in range(request["settle"]):
                self._session.run()
            return {"samples_ms": _samples(self._session.run, request["seconds"])}
        if request["do"] == "profile":
            from benchmarks import own_costs

            return {"rows": own_costs.profile(self._job, request["subnets"], request["seconds"])}
        raise ValueError(
            f"peer_worker: do={request['do']!r}, expected prepare, warm, round, profile or stop."
        )


def _run_for(run: Callable[[], object], seconds: float) -> int:
    end = time.perf_counter() + seconds
    calls = 0
    while calls == 0 or time.perf_counter() < end:
        run()
        calls += 1
    return calls


def _samples(run: Callable[[], object], seconds: float) -> list[float]:
    """Wall time of each call, in milliseconds; none is left out."""
    samples: list[float] = []
    end = time.perf_counter() + seconds
    now = time.perf_counter()
    while now < end or len(samples) < _LEAST_SAMPLES:
        run()
        then, now = now, time.perf_counter()
        samples.append((now - then) * 1e3)
    return samples


def main() -> None:
    """Entry point."""
    # Libraries write to stdout as they like: keep it for answers and give them stderr.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.stdin, answers, _load)


def _load(job: Job) -> Session:
    session: Session = importlib.import_module(f"benchmarks.runtimes.{job.runtime}").open_session(
        job
    )
    return session


if __name__ == "__main__":
    main()
