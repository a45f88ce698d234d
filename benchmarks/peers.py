"""The CPU peers, and the parent's side of a peer's process. GPU peers: `gpu_encoder_peers`."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases import DTYPES

CHECKOUT = Path(__file__).resolve().parents[1]
OWN = ("ours", "ours_extracted")


class PeerError(RuntimeError):
    """A peer cannot run the case; the message says why."""


@dataclass(frozen=True)
class Peer:
    """One competitor.

    Attributes:
        name: As in records and on the command line.
        runtime: Module of `benchmarks.runtimes`.
        dtypes: What it is asked to run. What its build then refuses is recorded with the reason.
        variant: Tells two peers of one runtime apart.
        foreign: Runs in the environment of requirements/peers.txt rather than in ours.
    """

    name: str
    runtime: str
    dtypes: tuple[str, ...]
    variant: str = ""
    foreign: bool = False


_FLOATS = ("float32", "bfloat16")
PEERS = {
    peer.name: peer
    for peer in (
        Peer("ours", "ours", DTYPES),
        Peer("ours_extracted", "ours", DTYPES, variant="extracted"),
        Peer("hf_sliced", "hf_sliced", _FLOATS),
        Peer("torch_eager", "torch_plain", _FLOATS),
        Peer("torch_compile", "torch_plain", _FLOATS, variant="compiled"),
        Peer("onnxruntime", "onnx_runtime", ("float32", "int8"), foreign=True),
        Peer("openvino", "openvino_cpu", DTYPES, foreign=True),
        Peer("ctranslate2", "ctranslate2_cpu", DTYPES, foreign=True),
    )
}


def chosen_peers(names: Sequence[str]) -> list[Peer]:
    """The peers of these names, in the table's order.

    Raises:
        ValueError: A name is not in the table.
    """
    for name in names:
        if name not in PEERS:
            raise ValueError(f"peers: name={name!r}, expected one of {', '.join(PEERS)}.")
    return [peer for peer in PEERS.values() if peer.name in names]


def worker_command(peer: Peer, foreign_python: Path | None) -> list[str]:
    """How to start a peer's worker.

    Raises:
        PeerError: It needs the environment of requirements/peers.txt, which is not there.
    """
    python = sys.executable
    if peer.foreign:
        if foreign_python is None or not foreign_python.exists():
            raise PeerError(
                f"{peer.name}: python={foreign_python}, expected that of an environment with "
                "requirements/peers.txt. Run `make bench-cpu`, which creates it."
            )
        python = str(foreign_python)
    return [python, "-m", "benchmarks.peer_worker"]


def worker_environment(threads: int) -> dict[str, str]:
    """Environment of a worker: every thread pool it may bring has `threads` threads."""
    pools = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    return {
        **os.environ,
        **dict.fromkeys(pools, str(threads)),
        "PYTHONPATH": os.pathsep.join([str(CHECKOUT), str(CHECKOUT / "python")]),
        "TORCHINDUCTOR_FREEZING": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


class Worker:
    """A peer's process. Leaving the ``with`` block ends it.

    Args:
        command: What to start; it must speak `benchmarks.peer_worker`'s protocol.
        environment: Of the process.
        log: File for what it prints.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                env=dict(environment),
                cwd=CHECKOUT,
            )
        self._unread = b""

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def ask(self, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            PeerError: The worker answers with an error, dies, or takes longer than `timeout_s`.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise PeerError(self._how_it_ended()) from None
        answer: dict[str, Any] = json.loads(self._read_line(timeout_s))
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def _read_line(self, timeout_s: float) -> bytes:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not selector.select(timeout_s):
                    self._process.kill()
                    raise PeerError(f"no answer within {timeout_s:g} s; see {self._log.name}")
                chunk = os.read(self._process.stdout.fileno(), 1 << 16)
                if not chunk:
                    raise PeerError(self._how_it_ended())
                self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _how_it_ended(self) -> str:
        code = self._process.wait()
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return f"the worker ended with code {code}: {lines[-1] if lines else 'it said nothing'}"

    def stop(self) -> None:
        """End the process, by asking first."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(b'{"do": "stop"}\n')
            self._process.stdin.close()
        except OSError:
            pass  # gone already
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
