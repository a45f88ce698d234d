"""Runs the GPU sections one after another within a time budget and prints a short table.

    python -m benchmarks.gpu_baseline --out DIR [--budget-s 540] [--smoke]

Each section is a process of its own, so that a crash or a hang costs that section only. The next
section's process imports its libraries while the current one measures, then waits for its turn.
`--smoke` runs everything at tiny sizes on the CPU.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu_tables import summarize
from benchmarks.records import RECORD_NAME, Deadline, Recorder, read_rows, write_machine_file

# Seconds planned per section; time a section leaves goes to those after it, and the last takes
# whatever there is. `autotune` is last because its compile time is the least predictable.
PLAN_S = {
    "ceilings": 70.0,
    "attention": 30.0,
    "inference": 150.0,
    "training": 110.0,
    "jax": 50.0,
    "autotune": 1e9,
}
# A section that ignores its budget (a long compile) is ended this much later.
GRACE_S = 25.0


def run_child(options: argparse.Namespace) -> None:
    """One section: import, wait for the go, measure."""
    import torch

    from benchmarks import gpu_attention, gpu_ceilings, gpu_peers, gpu_training
    from benchmarks.records import describe_machine

    print(f"[{options.child}] ready", flush=True)
    budget_s = float(sys.stdin.readline() or "0")
    if budget_s <= 0:
        return
    device = "cpu" if options.smoke else "cuda"
    if options.smoke:
        torch.set_num_threads(1)
    recorder = Recorder(options.out, describe_machine(device), options.commit)
    sections: dict[str, Any] = {
        "ceilings": gpu_ceilings.run,
        "attention": gpu_attention.run,
        "inference": gpu_peers.run_inference,
        "training": gpu_training.run,
        "autotune": gpu_peers.run_autotuned,
    }
    more = {"exchange": options.exchange} if options.child == "inference" else {}
    try:
        sections[options.child](recorder, device, budget_s=budget_s, smoke=options.smoke, **more)
    except Exception as error:
        recorder.add(options.child, "section", error=f"{type(error).__name__}: {error}")
        traceback.print_exc()


class Children:
    """Starts section processes ahead of their turn and ends them when their time is up."""

    def __init__(self, options: argparse.Namespace, scratch: Path, log: IO[str]) -> None:
        self.options, self.scratch, self.log = options, scratch, log
        self.started: dict[str, subprocess.Popen[str]] = {}

    def start(self, name: str) -> None:
        """Start a section's process; it waits for `go` (JAX's starts measuring at once)."""
        if name in self.started:
            return
        settings = [
            "HF_HUB_OFFLINE=1",
            "TOKENIZERS_PARALLELISM=false",
            "TORCHINDUCTOR_COMPILE_THREADS=16",
            f"TORCHINDUCTOR_CACHE_DIR={self.scratch / 'inductor'}",
            f"TRITON_CACHE_DIR={self.scratch / 'triton'}",
            "XLA_PYTHON_CLIENT_PREALLOCATE=false",
        ]
        module = "benchmarks.jax_peer" if name == "jax" else "benchmarks.gpu_baseline"
        command = ["env", *settings, sys.executable, "-m", module, "--out", str(self.options.out)]
        command += ["--exchange", str(self.scratch / "exchange.npz")]
        command += ["--smoke"] if self.options.smoke else []
        command += ["--commit", self.options.commit] if self.options.commit else []
        own = ["--budget-s", str(PLAN_S["jax"])] if name == "jax" else ["--child", name]
        command += own
        self.started[name] = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=Path(__file__).resolve().parent.parent,
            start_new_session=True,
        )

    def go(self, name: str, budget_s: float, limit_s: float) -> str:
        """Let a section run; returns how it ended in words."""
        process = self.started[name]
        assert process.stdin is not None
        try:
            process.stdin.write(f"{budget_s}\n")
            process.stdin.close()
        except OSError:
            pass
        try:
            code = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            self.end(name)
            return f"ended after {limit_s:.0f} s"
        return "done" if code == 0 else f"exit code {code}"

    def end(self, name: str) -> None:
        """End one section's process and the compile workers it started."""
        process = self.started[name]
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_sections(options: argparse.Namespace, scratch: Path, log: IO[str]) -> list[str]:
    """Run the chosen sections within the budget; returns one line per section."""
    deadline = Deadline(options.budget_s)
    children = Children(options, scratch, log)
    names = [name for name in PLAN_S if name in options.sections]
    lines = []
    try:
        for index, name in enumerate(names):
            left = deadline.left_s() - 8
            budget = min(PLAN_S[name], left - GRACE_S / 2)
            if budget < 10 and not options.smoke:
                lines.append(f"{name}: shed, {left:.0f} s left")
                continue
            begun = deadline.spent_s()
            children.start(name)
            if index + 1 < len(names) and names[index + 1] != "jax":
                children.start(names[index + 1])
            elif index + 2 < len(names) and names[index + 1] == "jax":
                children.start(names[index + 2])
            outcome = children.go(name, budget, min(budget + GRACE_S, left))
            lines.append(f"{name}: {outcome}, {deadline.spent_s() - begun:.0f} s")
            print(lines[-1], flush=True)
    finally:
        for name in list(children.started):
            children.end(name)
    return lines


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--budget-s", type=float, default=540.0)
    parser.add_argument("--commit", default=None, help="recorded where the tree has no git")
    parser.add_argument("--sections", nargs="+", choices=list(PLAN_S), default=list(PLAN_S))
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--child", choices=list(PLAN_S), help=argparse.SUPPRESS)
    parser.add_argument("--exchange", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.out = options.out.resolve()
    return options


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the driver and of its section processes."""
    options = parse(arguments)
    if options.child is not None:
        run_child(options)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    already = len(read_rows(options.out / RECORD_NAME))
    write_machine_file(options.out)
    with (
        tempfile.TemporaryDirectory(prefix="gpu_baseline_") as scratch,
        (options.out / "log.txt").open("a", encoding="utf-8") as log,
    ):
        lines = run_sections(options, Path(scratch), log)
    rows = read_rows(options.out / RECORD_NAME)[already:]
    summary = summarize(rows) + "\n" + "; ".join(lines)
    (options.out / "summary.txt").write_text(summary + "\n", encoding="utf-8")
    print(summary)


if __name__ == "__main__":
    main()
