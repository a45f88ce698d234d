"""An elastic server against the same server with the full network only, under a burst of requests.

    python -m benchmarks.load_test --run RUN --data SST-2/dev.tsv \\
        --out benchmarks/results/load_test.jsonl

Starts docs/examples/elastic_server.py twice on loopback, with ``--fixed`` and without, in processes
of their own. With the fixed one it first finds

- the deadline, unless given: 4 times the median latency of one request at a time, and
- its capacity: requests per second with 8 of them always under way.

Then both get the same requests at the same instants (Poisson arrivals, seeded): calm, a burst at
twice that capacity, calm. Nothing waits for an answer before it sends, so a slow server gets no
relief. A latency counts from the instant a request was due, on the client's clock. Each request
carries 16 labelled texts: the model is to be the bottleneck, and of a request of one text HTTP and
the ways between processes take a large part (the first rows say how large). The model has one
thread; HTTP and this client have the other cores.

A row per server and phase: latency, share in time, subnets that ran, and accuracy of the answers.
Ends with status 1 unless in the burst the elastic server answers 99 % in time and the fixed not.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.records import Recorder, describe_machine, format_table
from dynabert.latency_table import hardware_name
from dynabert_kernels.timing import Timing

_SERVER = Path(__file__).resolve().parents[1] / "docs" / "examples" / "elastic_server.py"
_HOST = "127.0.0.1"
_LEAST_IN_TIME = 0.99
_DEADLINE_FACTOR = 4
_CONCURRENCY = 8
_START_SECONDS = 600.0
_STOP_SECONDS = 20.0


@dataclass(frozen=True)
class Request:
    """Some texts, and the class of each."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Phase:
    """A stretch of the load: its name, how long it takes, and its load in capacities."""

    name: str
    seconds: float
    load: float


@dataclass(frozen=True)
class Answer:
    """An answered request: when it was due since the start, how long it took, and what came."""

    phase: str
    due_s: float
    latency_ms: float
    request: Request
    response: dict[str, Any]

    @property
    def num_right(self) -> int:
        """Texts whose class was found."""
        found = [prediction["class"] for prediction in self.response["predictions"]]
        return sum(map(int.__eq__, found, self.request.labels))


def read_requests(path: Path, texts_per_request: int, seed: int) -> Iterator[Request]:
    """Requests of random rows of a tab-separated file of ``sentence`` and ``label``, for ever."""
    with path.open(encoding="utf-8", newline="") as stream:
        rows = [
            (row["sentence"], int(row["label"]))
            for row in csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
        ]
    draw = random.Random(seed)
    while True:
        texts, labels = zip(*draw.sample(rows, texts_per_request), strict=True)
        yield Request(texts, labels)


def poisson_times(phases: Sequence[Phase], capacity: float, seed: int) -> list[tuple[str, float]]:
    """Phase and instant of every request, in seconds from the start."""
    draw = random.Random(seed)
    times, start = [], 0.0
    for phase in phases:
        now = start + draw.expovariate(phase.load * capacity)
        while now < start + phase.seconds:
            times.append((phase.name, now))
            now += draw.expovariate(phase.load * capacity)
        start += phase.seconds
    return times


class Client:
    """HTTP over connections that are kept; a call opens one where all are in use."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def call(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON of an answer.

        Raises:
            ConnectionError: The server does not answer with status 200.
        """
        payload = b"" if body is None else json.dumps(body).encode()
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: {_HOST}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(payload)}\r\n\r\n"
        )
        status, answer = await self._exchange(head.encode() + payload)
        if " 200 " not in status:
            raise ConnectionError(f"{method} {path}: {status}: {answer.decode()[:500]}")
        return json.loads(answer)

    async def _exchange(self, message: bytes) -> tuple[str, bytes]:
        while self._idle:
            connection = self._idle.pop()
            # The server may have closed it, as it does with what is idle for long.
            with suppress(asyncio.IncompleteReadError, ConnectionResetError, BrokenPipeError):
                return await self._send(message, connection)
            connection[1].close()
        return await self._send(message, await asyncio.open_connection(_HOST, self.port))

    async def _send(
        self, message: bytes, connection: tuple[asyncio.StreamReader, asyncio.StreamWriter]
    ) -> tuple[str, bytes]:
        reader, writer = connection
        writer.write(message)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        length = next(line for line in lines if line.startswith("content-length:"))
        answer = await reader.readexactly(int(length.partition(":")[2]))
        self._idle.append(connection)
        return lines[0], answer

    async def predict(self, request: Request, deadline_ms: float) -> dict[str, Any]:
        """Answer of the server to a request."""
        body = {"texts": request.texts, "deadline_ms": deadline_ms}
        answer: dict[str, Any] = await self.call("POST", "/predict", body)
        return answer

    async def close(self) -> None:
        """Close every connection."""
        for _, writer in self._idle:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()


async def closed_loop(
    client: Client, requests: Iterator[Request], *, concurrency: int, seconds: float
) -> list[Answer]:
    """Answers to requests of which so many are always under way."""
    answers: list[Answer] = []
    start = time.monotonic()

    async def work() -> None:
        while (due_s := time.monotonic() - start) < seconds:
            request = next(requests)
            response = await client.predict(request, deadline_ms=1e6)
            latency_ms = (time.monotonic() - start - due_s) * 1e3
            answers.append(Answer("", due_s, latency_ms, request, response))

    await asyncio.gather(*(work() for _ in range(concurrency)))
    return answers


async def open_loop(
    client: Client,
    requests: Iterator[Request],
    times: Sequence[tuple[str, float]],
    deadline_ms: float,
) -> list[Answer]:
    """Send every request at its instant, whatever is still under way; all answers."""
    start = time.monotonic() + 0.1

    async def send(phase: str, due_s: float, request: Request) -> Answer:
        await asyncio.sleep(max(0.0, start + due_s - time.monotonic()))
        response = await client.predict(request, deadline_ms)
        latency_ms = (time.monotonic() - start - due_s) * 1e3
        return Answer(phase, due_s, latency_ms, request, response)

    sent = [send(phase, due_s, next(requests)) for phase, due_s in times]
    return await asyncio.gather(*sent)


@contextmanager
def running_server(arguments: Sequence[str]) -> Iterator[int]:
    """A server in processes of its own, up when the context begins and gone when it ends; its port.

    Raises:
        RuntimeError: It ended instead of answering; the message has the end of its log.
    """
    with socket.socket() as free:
        free.bind((_HOST, 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(_SERVER), *arguments, "--host", _HOST, "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + _START_SECONDS
            while not _is_up(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"no server: {log.read().decode()[-2000:]}")
                time.sleep(0.2)
            yield port
        finally:
            _stop(process)


def _is_up(port: int) -> bool:
    try:
        with socket.create_connection((_HOST, port), timeout=1.0):
            return True
    except OSError:
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_SECONDS)
    with suppress(ProcessLookupError):  # whatever is left of its session are its workers
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def accuracy(answers: Sequence[Answer]) -> float:
    """Share of the texts whose class was found."""
    num_texts = sum(len(answer.request.texts) for answer in answers)
    return sum(answer.num_right for answer in answers) / num_texts


def summary(answers: Sequence[Answer], deadline_ms: float) -> dict[str, Any]:
    """Fields of a row: what became of some requests."""
    times = Timing(tuple(answer.latency_ms for answer in answers))
    responses = [answer.response for answer in answers]
    model = Timing(tuple(response["model_ms"] for response in responses))
    outside = Timing(tuple(a.latency_ms - a.response["server_ms"] for a in answers))
    subnets = Counter(response["subnet"] for response in responses)
    return {
        "n": len(answers),
        "median_ms": times.median_ms,
        "p99_ms": times.percentile_ms(99),
        "max_ms": times.percentile_ms(100),
        "in_time": sum(answer.latency_ms <= deadline_ms for answer in answers) / len(answers),
        "accuracy": accuracy(answers),
        "subnets": {name: count / len(answers) for name, count in subnets.most_common()},
        "mean_batch": sum(r["requests_in_batch"] for r in responses) / len(answers),
        "model_median_ms": model.median_ms,
        "http_median_ms": outside.median_ms,
        "http_p99_ms": outside.percentile_ms(99),
    }


class LoadTest:
    """Both servers under the same load, recorded.

    Args:
        options: Of the command line.
        recorder: Takes the rows.
    """

    def __init__(self, options: argparse.Namespace, recorder: Recorder) -> None:
        self.options = options
        self.recorder = recorder
        self.deadline_ms: float = options.deadline_ms or 0.0
        self.capacity = 0.0
        self.phases = (
            Phase("calm before", options.calm_seconds, 0.5),
            Phase("burst", options.burst_seconds, options.load),
            Phase("calm after", options.calm_seconds, 0.5),
        )

    def run(self) -> bool:
        """Whether the elastic server held the deadline in the burst, and the fixed one did not."""
        fixed = self._serve("fixed", self._measure_then_load, "--fixed")
        elastic = self._serve("elastic", self._load)
        rows = [self._record("fixed", fixed, phase) for phase in self.phases]
        rows += [self._record("elastic", elastic, phase, fixed) for phase in self.phases]
        columns: dict[str, Callable[[dict[str, Any]], str]] = {
            "server": lambda row: row["peer"],
            "phase": lambda row: row["case"],
            "requests/s": lambda row: f"{row['requests_per_s']:.1f}",
            "p50 (ms)": lambda row: f"{row['median_ms']:.0f}",
            "p99 (ms)": lambda row: f"{row['p99_ms']:.0f}",
            "in time": lambda row: f"{row['in_time']:.2%}",
            "accuracy": lambda row: f"{row['accuracy']:.2%}",
            "subnets": lambda row: ", ".join(f"{n} {s:.0%}" for n, s in row["subnets"].items()),
        }
        print(f"deadline {self.deadline_ms:.0f} ms, capacity {self.capacity:.1f} requests/s")
        print(format_table(rows, columns))
        in_time = {row["peer"]: row["in_time"] for row in rows if row["case"] == "burst"}
        return bool(in_time["elastic"] >= _LEAST_IN_TIME > in_time["fixed"])

    def _serve(
        self, name: str, load: Callable[[Client], Awaitable[list[Answer]]], *flags: str
    ) -> list[Answer]:
        options = self.options
        reserve_ms = options.reserve * (self.deadline_ms or 100.0)
        arguments = [str(options.run), "--threads", "1", "--accelerator", "cpu", *flags]
        arguments += ["--max-batch-size", str(options.max_batch_size)]
        arguments += ["--reserve-ms", str(reserve_ms)]

        async def drive(port: int) -> list[Answer]:
            client = Client(port)
            await closed_loop(
                client, self._requests(seed=0), concurrency=1, seconds=options.warmup_seconds
            )
            answers = await load(client)
            await client.close()
            return answers

        with running_server(arguments) as port:
            print(f"{name} server is up", file=sys.stderr)
            return asyncio.run(drive(port))

    def _requests(self, seed: int, num_texts: int | None = None) -> Iterator[Request]:
        return read_requests(self.options.data, num_texts or self.options.texts_per_request, seed)

    async def _measure_then_load(self, client: Client) -> list[Answer]:
        seconds = self.options.calibration_seconds
        for num_texts in (1, self.options.texts_per_request):
            requests = self._requests(1, num_texts)
            alone = await closed_loop(client, requests, concurrency=1, seconds=seconds / 2)
            alone_ms = Timing(tuple(answer.latency_ms for answer in alone)).median_ms
            self.deadline_ms = self.options.deadline_ms or round(_DEADLINE_FACTOR * alone_ms)
            self._add("one at a time", "fixed", alone, num_texts)
        busy = await closed_loop(client, requests, concurrency=_CONCURRENCY, seconds=seconds)
        # The last of them ended after the time was up.
        self.capacity = len(busy) / max(answer.due_s + answer.latency_ms / 1e3 for answer in busy)
        self._add("capacity", "fixed", busy, num_texts, requests_per_s=self.capacity)
        return await self._load(client)

    async def _load(self, client: Client) -> list[Answer]:
        times = poisson_times(self.phases, self.capacity, seed=2)
        return await open_loop(client, self._requests(seed=3), times, self.deadline_ms)

    def _record(
        self, name: str, answers: Sequence[Answer], phase: Phase, fixed: Sequence[Answer] = ()
    ) -> dict[str, Any]:
        of_phase = [answer for answer in answers if answer.phase == phase.name]
        fields = {"load": phase.load, "requests_per_s": len(of_phase) / phase.seconds}
        if fixed:  # which answered the same requests
            full = [answer for answer in fixed if answer.phase == phase.name]
            fields["accuracy_cost"] = accuracy(full) - accuracy(of_phase)
        return self._add(phase.name, name, of_phase, self.options.texts_per_request, **fields)

    def _add(
        self, case: str, name: str, answers: Sequence[Answer], num_texts: int, **fields: Any
    ) -> dict[str, Any]:
        return self.recorder.add(
            "load_test",
            case,
            peer=name,
            deadline_ms=self.deadline_ms,
            texts_per_request=num_texts,
            max_batch_size=self.options.max_batch_size,
            reserve=self.options.reserve,
            threads=1,
            **summary(answers, self.deadline_ms),
            **fields,
        )


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="an elastic model with grid.json")
    parser.add_argument("--data", type=Path, required=True, help="tsv of sentence and label")
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines to add to")
    parser.add_argument("--texts-per-request", type=int, default=16)
    parser.add_argument("--max-batch-size", type=int, default=4, help="requests the server joins")
    parser.add_argument("--deadline-ms", type=float, help="default: 4 times the fixed one's median")
    parser.add_argument(
        "--reserve",
        type=float,
        default=0.2,
        help="share of the deadline that the server keeps free for HTTP, the tokenizer and what "
        "arrives while a batch runs; 0.1 leaves more than 1 %% late",
    )
    parser.add_argument("--load", type=float, default=2.0, help="of the burst, in capacities")
    parser.add_argument("--burst-seconds", type=float, default=20.0)
    parser.add_argument("--calm-seconds", type=float, default=10.0)
    parser.add_argument("--calibration-seconds", type=float, default=10.0)
    parser.add_argument("--warmup-seconds", type=float, default=3.0)
    options = parser.parse_args()
    machine = {**describe_machine("cpu"), "hardware": hardware_name("cpu")}
    recorder = Recorder(options.out.parent, machine, name=options.out.name)
    sys.exit(0 if LoadTest(options, recorder).run() else 1)


if __name__ == "__main__":
    main()
