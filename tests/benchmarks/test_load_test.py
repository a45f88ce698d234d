"""The load test's arithmetic, and its client against a server of a few lines."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from itertools import pairwise, repeat
from pathlib import Path
from typing import Any

import pytest

from benchmarks.load_test import (
    Answer,
    Client,
    Phase,
    Request,
    accuracy,
    closed_loop,
    open_loop,
    poisson_times,
    read_requests,
    summary,
)

PHASES = [Phase("calm", 50.0, 0.5), Phase("burst", 100.0, 2.0)]


def answer(latency_ms: float, classes: list[int], subnet: str = "w1-d1", batch: int = 1) -> Answer:
    response = {
        "predictions": [{"class": index} for index in classes],
        "subnet": subnet,
        "model_ms": latency_ms / 2,
        "server_ms": latency_ms - 3,
        "requests_in_batch": batch,
    }
    return Answer("burst", 0.0, latency_ms, Request(("a", "b"), (0, 1)), response)


def test_arrivals_are_a_poisson_process_of_the_load_asked_for() -> None:
    times = poisson_times(PHASES, capacity=40.0, seed=2)
    instants = [time for _, time in times]
    assert instants == sorted(instants)
    assert all((time < 50) == (phase == "calm") for phase, time in times)
    calm = [time for phase, time in times if phase == "calm"]
    burst = [time for phase, time in times if phase == "burst"]
    assert len(calm) == pytest.approx(20 * 50, rel=0.1)  # a standard deviation is 3 %
    assert len(burst) == pytest.approx(80 * 100, rel=0.04)
    gaps = [b - a for a, b in pairwise(burst)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert variance == pytest.approx(mean**2, rel=0.1)  # as exponential gaps have it
    assert poisson_times(PHASES, capacity=40.0, seed=2) == times


def test_requests_are_rows_of_the_file_and_the_same_for_the_same_seed(tmp_path: Path) -> None:
    path = tmp_path / "dev.tsv"
    path.write_text('sentence\tlabel\na "fine film\t1\nbad\t0\nso so\t0\n')
    requests = read_requests(path, 2, seed=1)
    rows = {'a "fine film': 1, "bad": 0, "so so": 0}
    seen = [next(requests) for _ in range(20)]
    for request in seen:
        assert len(set(request.texts)) == 2
        assert [rows[text] for text in request.texts] == list(request.labels)
    assert {text for request in seen for text in request.texts} == set(rows)
    again = read_requests(path, 2, seed=1)
    assert [next(again) for _ in range(20)] == seen


def test_summary_counts_what_was_in_time_and_right() -> None:
    answers = [
        answer(10.0, [0, 1]),
        answer(20.0, [0, 0], "w0.5-d1", batch=3),
        answer(30.0, [1, 0], "w0.5-d1", batch=3),
        answer(100.0, [0, 1], "w0.5-d1"),
    ]
    assert accuracy(answers) == 5 / 8
    fields = summary(answers, deadline_ms=30.0)
    assert fields.pop("subnets") == {"w0.5-d1": 0.75, "w1-d1": 0.25}
    assert fields == pytest.approx(
        {
            "n": 4,
            "median_ms": 25.0,
            "p99_ms": 97.9,
            "max_ms": 100.0,
            "in_time": 0.75,
            "accuracy": 0.625,
            "mean_batch": 2.0,
            "model_median_ms": 12.5,
            "http_median_ms": 3.0,
            "http_p99_ms": 3.0,
        }
    )


def with_server(
    work: Callable[[Client, list[dict[str, Any]]], Awaitable[Any]], status: str = "200 OK"
) -> Any:
    """What `work` returns, with a client of a server that answers with the number of the request.

    Every third connection is closed after its answer, as servers do with idle ones.
    """
    bodies: list[dict[str, Any]] = []
    serving: list[asyncio.Task[Any]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.append(asyncio.current_task())  # type: ignore[arg-type]
        while head := await reader.read(4096):
            _, _, body = head.partition(b"\r\n\r\n")
            bodies.append(json.loads(body) if body else {})
            number = len(bodies)
            payload = json.dumps({"number": number, "head": head.decode().split("\r\n")[0]})
            writer.write(
                f"HTTP/1.1 {status}\r\nContent-Length: {len(payload)}\r\n\r\n{payload}".encode()
            )
            if number % 3 == 0:
                break
        writer.close()
        await writer.wait_closed()

    async def main() -> Any:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        client = Client(server.sockets[0].getsockname()[1])
        try:
            return await work(client, bodies)
        finally:
            await client.close()
            await asyncio.gather(*serving)
            server.close()
            await server.wait_closed()

    return asyncio.run(main())


REQUEST = Request(("a film",), (1,))


def test_client_keeps_connections_and_replaces_closed_ones() -> None:
    async def work(client: Client, bodies: list[dict[str, Any]]) -> list[Any]:
        answers = [await client.call("GET", "/counters")]
        for _ in range(8):
            answers.append(await client.predict(REQUEST, 50.0))
            await asyncio.sleep(0)
        assert bodies[1:] == [{"texts": ["a film"], "deadline_ms": 50.0}] * 8
        return answers

    answers = with_server(work)
    assert [each["number"] for each in answers] == list(range(1, 10))
    assert answers[0]["head"] == "GET /counters HTTP/1.1"
    assert answers[1]["head"] == "POST /predict HTTP/1.1"


def test_client_refuses_an_answer_that_is_none() -> None:
    async def work(client: Client, bodies: list[dict[str, Any]]) -> None:
        with pytest.raises(ConnectionError, match=r"POST /predict: http/1\.1 503"):
            await client.predict(REQUEST, 50.0)

    with_server(work, status="503 Service Unavailable")


def test_loops_answer_every_request() -> None:
    async def work(client: Client, bodies: list[dict[str, Any]]) -> None:
        times = [("burst", 0.0)] * 30 + [("calm", 0.01)]
        answers = await open_loop(client, repeat(REQUEST), times, 50.0)
        assert [each.phase for each in answers] == ["burst"] * 30 + ["calm"]
        assert sorted(each.response["number"] for each in answers) == list(range(1, 32))
        assert all(each.latency_ms > 0 for each in answers)
        looped = await closed_loop(client, repeat(REQUEST), concurrency=3, seconds=0.02)
        assert len(looped) == len(bodies) - 31 >= 3

    with_server(work)
