"""Training runs in processes that are killed, and what is left of them.

Each attempt is a child of multiprocessing's fork server, which has imported this module and so all
there is to import: an attempt costs what it trains, and nothing else.
"""

from __future__ import annotations

import gc
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import BertTokenizer

from dynabert.data.examples import TaskData
from dynabert.training import RunArguments, run_stages
from dynabert.training.checkpoint import find_damage

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([__name__])
_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")
_TIMES = ("_seconds", "_runtime", "_per_second")  # ends of the only names that may differ


@dataclass(frozen=True)
class Kill:
    """When an attempt dies: after so many seconds, or instead of its n-th change to the disk."""

    seconds: float | None = None
    change: int | None = None


@dataclass(frozen=True)
class Attempt:
    """What came of it: whether it was killed, and else how long it took, and its changes."""

    was_killed: bool
    seconds: float = 0.0
    num_changes: int = 0


def attempt(model_dir: Path, data: TaskData, run: RunArguments, kill: Kill) -> Attempt:
    """Start or go on with a run in a process of its own, and kill that.

    Raises:
        AssertionError: The process ended with an error; the message ends with its last words.
    """
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    log = run.output_dir.with_suffix(".log")
    process = _CONTEXT.Process(target=_train, args=(model_dir, data, run, kill, log, sender))
    start = time.perf_counter()
    process.start()
    sender.close()
    process.join(kill.seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
    seconds = time.perf_counter() - start
    if process.exitcode == -signal.SIGKILL:
        return Attempt(was_killed=True)
    assert process.exitcode == 0, log.read_text()[-3000:]
    return Attempt(was_killed=False, seconds=seconds, num_changes=receiver.recv())


def _train(
    model_dir: Path, data: TaskData, run: RunArguments, kill: Kill, log: Path, sender: Connection
) -> None:
    gc.freeze()  # what the fork server has imported is not to be gone through again and again
    torch.set_num_threads(1)
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 2)
    changes = _Changes(run.output_dir, kill.change)
    run_stages(model_dir, data, BertTokenizer.from_pretrained(model_dir), run)
    sender.send(changes.count)


class _Changes:
    """Counts what the process changes on disk, and kills it just before one of the changes.

    A file that torch is saving is then half there.
    """

    def __init__(self, folder: Path, fatal: int | None) -> None:
        self.count = 0
        self._folder = str(folder)
        self._fatal = fatal
        save = torch.save

        def save_or_tear(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
            save(value, file, *args, **kwargs)
            if self.count == self._fatal:
                os.truncate(file, os.path.getsize(file) // 2)
            self._note()

        torch.save = save_or_tear
        # A killed process leaves the kernel's buffers as they are: the disk need not be troubled.
        os.fsync = lambda descriptor: self._note()
        sys.addaudithook(self._audit)

    def _audit(self, event: str, values: tuple[Any, ...]) -> None:
        is_write = event == "open" and values[2] & (os.O_WRONLY | os.O_RDWR)
        if (is_write and str(values[0]).startswith(self._folder)) or event in _CHANGES:
            self._note()

    def _note(self) -> None:
        if self.count == self._fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1


def result(run_dir: Path) -> dict[str, Any]:
    """All that a finished run has made and time has no part in: digests of weights, logs, grid."""
    made: dict[str, Any] = {"grid": json.loads((run_dir / "grid.json").read_text())}
    for file in sorted(run_dir.glob("*/model.safetensors")):
        made[f"weights of {file.parent.name}"] = digest(file)
    for file in sorted(run_dir.glob("*/stage.json")):
        record = json.loads(file.read_text())
        kept = ("starts_from", "subnets", "rewiring", "steps")
        made[f"record of {file.parent.name}"] = {key: record[key] for key in kept}
        made[f"log of {file.parent.name}"] = [
            {key: value for key, value in entry.items() if not key.endswith(_TIMES)}
            for entry in record["log"]
        ]
    return made


def digest(weights: Path) -> str:
    """SHA-256 of the bits of all tensors of a file, with their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(safetensors.torch.load_file(weights).items()):
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def progress(run_dir: Path, stages: tuple[str, ...]) -> tuple[int, int]:
    """Stages that are finished, and steps of the newest checkpoint of the next one.

    Raises:
        AssertionError: A checkpoint is in its place, and damaged.
    """
    finished = 0
    for stage in stages:
        if (run_dir / stage / "stage.json").exists():
            finished += 1
    newest = 0
    if finished < len(stages):
        folder = run_dir / stages[finished]
        if not folder.exists():  # killed just when the finished stage was to take its place
            folder = run_dir / f".{stages[finished]}.former"
        for checkpoint in folder.glob("checkpoints/checkpoint-*"):
            assert find_damage(checkpoint) is None
            newest = max(newest, int(checkpoint.name.rpartition("-")[2]))
    return finished, newest
