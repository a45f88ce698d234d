"""Kills a training run again and again and compares it, bit by bit, with one that was left alone.

    python -m benchmarks.kill_run --work-dir W --kills 5 --out benchmarks/results/kill_run.jsonl \\
        -- --model M --task sst2 --data-dir D --threads 2

Everything after ``--`` goes to ``dynabert train``, which runs twice: to its end into W/whole, and
into W/killed, where its processes get SIGKILL at random instants of its running time, spread evenly
over what the first run took, or over ``--within`` seconds. Then the weights of every stage are
compared.

Started again, the script goes on where it was; a row says how often each run was started. The row
names no folder, so it says nothing of the machine but its hardware and versions.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.records import commit_of_checkout, describe_machine
from dynabert.durable import is_leftover
from dynabert.json_file import read_json, write_bytes, write_json
from dynabert.latency_table import hardware_name
from dynabert.training.arguments import STAGE_NAMES

_SCHEMA = 1


class KilledRun:
    """The two runs of one command, and what has been done of them so far.

    Args:
        work_dir: Folder of both runs and of ``state.json``.
        arguments: What to call ``dynabert train`` with, all but the output folder.
        num_kills: How many kills to spread over the second run.
        seed: Chooses their instants.
        within: Seconds of the second run that they are spread over; None: as many as the first
            took. On a busy machine the second may take less.

    Raises:
        ValueError: The folder holds another command, or the arguments name an output folder.
    """

    def __init__(
        self,
        work_dir: Path,
        arguments: Sequence[str],
        num_kills: int,
        seed: int,
        within: float | None = None,
    ) -> None:
        if any(name.startswith(("--output-dir", "--overwrite")) for name in arguments):
            raise ValueError(
                "kill_run: the arguments after -- hold --output-dir or --overwrite, expected "
                "neither. Name the folder of both runs with --work-dir."
            )
        asked = {
            "arguments": list(arguments),
            "num_kills": num_kills,
            "seed": seed,
            "within": within,
        }
        self._work_dir = work_dir
        self._state_file = work_dir / "state.json"
        self._arguments = arguments
        nothing = {"seconds": 0.0, "starts": 0, "is_done": False}
        self.state: dict[str, Any] = {
            "schema": _SCHEMA,
            **asked,
            "is_recorded": False,
            "whole": dict(nothing),
            "killed": {**nothing, "kills": []},
        }
        if self._state_file.exists():
            self.state = read_json(self._state_file, schema=_SCHEMA)
            if {name: self.state.get(name) for name in asked} != asked:
                raise ValueError(
                    f"kill_run: --work-dir: {str(work_dir)!r} holds other arguments, kills or "
                    "seed, expected the same, to go on. Use another folder."
                )

    def execute(self) -> None:
        """Bring both runs to their end.

        Raises:
            RuntimeError: One ended with an error.
        """
        self._start("whole", None)
        generator = random.Random(self.state["seed"])
        last = self.state["within"] or self.state["whole"]["seconds"]
        instants = sorted(generator.uniform(0, last) for _ in range(self.state["num_kills"]))
        kills = self.state["killed"]["kills"]
        for instant in instants[len(kills) :]:
            if not self._start("killed", instant):
                kills.append({"planned_s": instant, **self._left_behind()})
                self._save()
        self._start("killed", None)

    def _start(self, name: str, until: float | None) -> bool:
        """Start or go on with a run, up to an instant of its running time; whether it ended."""
        run = self.state[name]
        if run["is_done"]:
            return True
        run["starts"] += 1
        self._save()
        command = [sys.executable, "-m", "dynabert", "train", *self._arguments]
        command += ["--output-dir", str(self._work_dir / name)]
        start, former = time.monotonic(), run["seconds"]
        log = self._work_dir / f"{name}.log"
        with log.open("ab") as stream:
            # A session of its own, so that a kill reaches processes it has started too.
            process = subprocess.Popen(
                command, stdout=stream, stderr=stream, start_new_session=True
            )
            try:
                process.wait(None if until is None else max(0.0, until - former))
            except subprocess.TimeoutExpired:
                pass
            finally:  # also when the script itself is stopped
                ended = process.poll()
                if ended is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                run["seconds"] = former + time.monotonic() - start
                run["is_done"] = ended == 0
                self._save()
        if ended not in (None, 0):
            raise RuntimeError(f"kill_run: the run ended with {ended}; its log is {log}")
        return ended == 0

    def _left_behind(self) -> dict[str, Any]:
        """Where a kill has hit."""
        run_dir = self._work_dir / "killed"
        stages = [stage for stage in STAGE_NAMES if (run_dir / stage / "stage.json").exists()]
        checkpoints = sorted(path.name for path in run_dir.glob("*/checkpoints/checkpoint-*"))
        return {
            "finished_stages": stages,
            "checkpoints": checkpoints,
            "was_writing": any(is_leftover(path) for path in run_dir.rglob(".*")),
        }

    def mark_recorded(self) -> None:
        """Note that the record has been written."""
        self.state["is_recorded"] = True
        self._save()

    def _save(self) -> None:
        write_json(self._state_file, self.state)

    def row(self) -> dict[str, Any]:
        """The record of both runs."""
        whole, killed = self.state["whole"], self.state["killed"]
        differences = compare_runs(self._work_dir / "whole", self._work_dir / "killed")
        return {
            "section": "kill_run",
            "command": ["dynabert", "train", *map(_without_folder, self._arguments)],
            "is_equal": not any(differences.values()),
            "compared": list(differences),
            "differences": {name: found for name, found in differences.items() if found},
            "seed": self.state["seed"],
            "within": self.state["within"],
            "kills": killed["kills"],
            "starts": killed["starts"],
            "seconds": killed["seconds"],
            "whole_starts": whole["starts"],
            "whole_seconds": whole["seconds"],
            "machine": {
                **describe_machine("cpu"),
                "hardware": hardware_name("cuda" if torch.cuda.is_available() else "cpu"),
            },
            "commit": commit_of_checkout(),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }


def compare_runs(whole: Path, killed: Path) -> dict[str, list[str]]:
    """Names of the tensors that differ in any bit, by stage; and of the scores of the final grid.

    Raises:
        ValueError: The first run holds no weights to compare.
    """
    differences: dict[str, list[str]] = {}
    for file in sorted(whole.glob("*/model.safetensors")):
        expected, found = load_file(file), load_file(killed / file.relative_to(whole))
        differences[file.parent.name] = sorted(
            name
            for name in {*expected, *found}
            if name not in expected
            or name not in found
            or not _same_bits(expected[name], found[name])
        )
    if not differences:
        raise ValueError(f"kill_run: {str(whole)!r} holds no weights. Train it first.")
    grids = [json.loads((run / "grid.json").read_text()) for run in (whole, killed)]
    differences["grid"] = sorted(name for name in grids[0] if grids[0][name] != grids[1].get(name))
    return differences


def _same_bits(expected: torch.Tensor, found: torch.Tensor) -> bool:
    if (expected.dtype, expected.shape) != (found.dtype, found.shape):
        return False
    return torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (expected, found)))


def _without_folder(argument: str) -> str:
    """An argument without the folders of a path in it."""
    option, sign, value = argument.rpartition("=")
    # A fraction has a slash too.
    return f"{option}{sign}{Path(value).name}" if Path(value).exists() else argument


def _stop(signal_number: int, frame: object) -> None:
    raise SystemExit(f"kill_run: stopped by signal {signal_number}; the same call goes on")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--within", type=float, metavar="SECONDS")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("arguments", nargs="+", metavar="-- ARGUMENTS")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, _stop)
    run = KilledRun(
        options.work_dir, options.arguments, options.kills, options.seed, options.within
    )
    if run.state["is_recorded"]:
        raise SystemExit(f"kill_run: {options.work_dir} is finished and recorded.")
    run.execute()
    row = run.row()
    former = options.out.read_bytes() if options.out.exists() else b""
    write_bytes(options.out, former + (json.dumps(row) + "\n").encode())
    run.mark_recorded()
    print(f"{len(row['kills'])} kills, {row['starts']} starts: ", end="")
    print("every bit is equal" if row["is_equal"] else f"differing: {row['differences']}")
    sys.exit(0 if row["is_equal"] else 1)


if __name__ == "__main__":
    main()
