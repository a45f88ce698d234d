"""Measures our kernels and model on a GPU beside their peers, within a time budget.

    python -m benchmarks.bench_gpu --out FILE.jsonl [--budget-s 360] [--sections ...] [--smoke]

Each section is a process of its own, so that a crash or a hang costs that section only; within one,
competitors are checked against one reference and timed in turn, sample by sample. The next
section's process imports its libraries while the current one measures, then waits for its turn.
A section that runs out of time sheds its last cases, and says so; so does the whole. First the
sections that run our Triton kernels are rehearsed, all at once, so that the kernels are compiled
when they are measured. Tables, and last the targets, are printed and kept in the work folder.
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
from benchmarks.gpu_targets import report
from benchmarks.records import Deadline, Recorder, read_rows, write_machine_file

# Seconds planned per section; time a section leaves goes to those after it, and the last takes
# whatever there is. `autotune` is last because its compile time is the least predictable.
PLAN_S = {
    "ceilings": 28.0,
    "inference": 110.0,
    "training": 80.0,
    "attention": 20.0,
    "products": 50.0,
    "jax": 50.0,
    "autotune": 1e9,
}
DEFAULT_SECTIONS = [name for name in PLAN_S if name != "jax"]
# Sections that a second process can continue where one lost the device; the others start again
# without ours.
BY_STEPS = ("inference", "autotune")
LOST = 3
REHEARSED = ("inference", "training", "attention", "products")
# Compiling takes a training step's kernels about 20 s; what is not ready then compiles in its turn.
REHEARSAL_S = 40.0
# A section that ignores its budget (a long compile) is ended this much later.
GRACE_S = 25.0


def run_child(options: argparse.Namespace) -> None:
    """One section: import, wait for the go, measure."""
    import torch

    from benchmarks import (
        gpu_attention,
        gpu_ceilings,
        gpu_peers,
        gpu_products,
        gpu_timing,
        gpu_training,
    )
    from benchmarks.records import describe_machine

    print(f"[{options.child}] ready", flush=True)
    budget_s = float(sys.stdin.readline() or "0")
    if budget_s <= 0:
        return
    device = "cpu" if options.smoke else "cuda"
    if options.rehearse:
        gpu_timing.rehearse()
    if options.smoke or options.rehearse:
        torch.set_num_threads(1)
    recorder = Recorder(
        options.out.parent,
        describe_machine(device),
        options.commit,
        name=options.out.name,
        process=options.child,
    )
    sections: dict[str, Any] = {
        "ceilings": gpu_ceilings.run,
        "inference": gpu_peers.run_inference,
        "training": gpu_training.run,
        "attention": gpu_attention.run,
        "products": gpu_products.run,
        "autotune": gpu_peers.run_autotuned,
    }
    more: dict[str, Any] = {}
    if options.child == "inference":
        more["exchange"] = options.exchange
    if options.child in BY_STEPS:
        more["begun"] = options.begun
    elif options.take_over and options.child != "ceilings":
        more["with_ours"] = False
    try:
        sections[options.child](recorder, device, budget_s=budget_s, smoke=options.smoke, **more)
    except Exception as error:
        recorder.add(options.child, "section", error=f"{type(error).__name__}: {error}")
        traceback.print_exc()
    if gpu_timing.is_lost(device):
        os._exit(LOST)  # an orderly exit would wait for the device


class Children:
    """Starts section processes ahead of their turn and ends them when their time is up."""

    def __init__(self, options: argparse.Namespace, scratch: Path, log: IO[str]) -> None:
        self.options, self.scratch, self.log = options, scratch, log
        self.started: dict[str, subprocess.Popen[str]] = {}

    def start(self, name: str, *, rehearse: bool = False, take_over: bool = False) -> None:
        """Start a section's process; it waits for `go` (JAX's starts measuring at once).

        A rehearsal's rows go to the scratch folder.
        """
        if name in self.started:
            return
        out = self.scratch / "rehearsal.jsonl" if rehearse else self.options.out
        settings = [
            "HF_HUB_OFFLINE=1",
            "TOKENIZERS_PARALLELISM=false",
            "TORCHINDUCTOR_COMPILE_THREADS=16",
            f"TORCHINDUCTOR_CACHE_DIR={self.scratch / 'inductor'}",
            f"TRITON_CACHE_DIR={self.scratch / 'triton'}",
            "XLA_PYTHON_CLIENT_PREALLOCATE=false",
        ]
        module = "benchmarks.jax_peer" if name == "jax" else "benchmarks.bench_gpu"
        command = ["env", *settings, sys.executable, "-m", module, "--out", str(out)]
        command += ["--rehearse"] if rehearse else []
        command += ["--take-over"] if take_over else []
        if name in BY_STEPS and not rehearse:
            command += ["--begun", str(self.scratch / f"{name}.begun")]
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
        self.let_go(name, budget_s)
        return self.wait(name, limit_s)

    def let_go(self, name: str, budget_s: float) -> None:
        """Let a section run."""
        process = self.started[name]
        assert process.stdin is not None
        try:
            process.stdin.write(f"{budget_s}\n")
            process.stdin.close()
        except OSError:
            pass

    def wait(self, name: str, limit_s: float) -> str:
        """Wait until a section is done or ended; returns how it ended in words."""
        try:
            code = self.started[name].wait(timeout=limit_s)
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


def rehearse(options: argparse.Namespace, scratch: Path, log: IO[str]) -> str:
    """Compile our kernels: the sections once, all at the same time, timing nothing."""
    deadline = Deadline(REHEARSAL_S)
    children = Children(options, scratch, log)
    names = [name for name in REHEARSED if name in options.sections]
    try:
        for name in names:
            children.start(name, rehearse=True)
        for name in names:
            children.let_go(name, REHEARSAL_S)
        for name in names:
            children.wait(name, max(deadline.left_s(), 0.0))
    finally:
        for name in names:
            children.end(name)
    return f"rehearsal: {deadline.spent_s():.0f} s"


def run_sections(options: argparse.Namespace, scratch: Path, log: IO[str]) -> list[str]:
    """Run the chosen sections within the budget; returns one line per section."""
    deadline = Deadline(options.budget_s)
    children = Children(options, scratch, log)
    names = [name for name in PLAN_S if name in options.sections]
    lines = []
    try:
        if names and names[0] != "jax":
            children.start(names[0])
        if not options.no_rehearsal and set(names) & set(REHEARSED):
            lines.append(rehearse(options, scratch, log))
            print(lines[-1], flush=True)
        for index, name in enumerate(names):
            left = deadline.left_s() - 8
            budget = min(PLAN_S[name], left - GRACE_S / 2)
            if budget < 10 and not options.smoke:
                lines.append(f"{name}: shed, {left:.0f} s left")
                continue
            begun = deadline.spent_s()
            children.start(name)
            # JAX measures as soon as it is started.
            following = [other for other in names[index + 1 :] if other != "jax"]
            for other in following[:1]:
                children.start(other)
            outcome = children.go(name, budget, min(budget + GRACE_S, left))
            rest = budget - (deadline.spent_s() - begun)
            if outcome == f"exit code {LOST}" and rest > 10:
                del children.started[name]
                children.start(name, take_over=True)
                again = children.go(name, rest, min(rest + GRACE_S, deadline.left_s() - 8))
                outcome = f"lost the device, then {again}"
            lines.append(f"{name}: {outcome}, {deadline.spent_s() - begun:.0f} s")
            print(lines[-1], flush=True)
    finally:
        for name in list(children.started):
            children.end(name)
    return lines


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu.jsonl")
    parser.add_argument(
        "--work-dir", type=Path, default=Path("build/bench-gpu"), help="log, tables, machine report"
    )
    parser.add_argument("--budget-s", type=float, default=360.0)
    parser.add_argument("--commit", default=None, help="recorded where the tree has no git")
    parser.add_argument("--sections", nargs="+", choices=list(PLAN_S), default=DEFAULT_SECTIONS)
    parser.add_argument("--no-rehearsal", action="store_true", help="compile when measuring")
    parser.add_argument("--rehearse", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--take-over", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--begun", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--child", choices=list(PLAN_S), help=argparse.SUPPRESS)
    parser.add_argument("--exchange", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.out, options.work_dir = options.out.resolve(), options.work_dir.resolve()
    return options


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the driver and of its section processes."""
    options = parse(arguments)
    if options.child is not None:
        run_child(options)
        return
    options.work_dir.mkdir(parents=True, exist_ok=True)
    already = len(read_rows(options.out))
    write_machine_file(options.work_dir)
    with (
        tempfile.TemporaryDirectory(prefix="bench_gpu_") as scratch,
        (options.work_dir / "log.txt").open("a", encoding="utf-8") as log,
    ):
        lines = run_sections(options, Path(scratch), log)
    rows = read_rows(options.out)[already:]
    summary = "\n\n".join([summarize(rows), "; ".join(lines), report(rows)])
    (options.work_dir / "summary.txt").write_text(summary + "\n", encoding="utf-8")
    print(summary)


if __name__ == "__main__":
    main()
