"""End-to-end CPU latency, token ids to last hidden state, of our model and its peers.

    python -m benchmarks.bench_model --peers-python .venv-peers/bin/python --work-dir W

A case is a model, an input and a subnet (`benchmarks.cases`); a group is the peers of one dtype on
one case. Each peer runs in a process of its own on the same weights and input; its output is held
against float32 Hugging Face before it is timed; then the peers take turns, round by round, in an
order shuffled each round. A group that is on record at this commit is not run again, so that the
same command continues a stopped run. `benchmarks.cpu_tables` makes the table and the plot.
"""

from __future__ import annotations

import argparse
import datetime
import random
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cases import CASES, DEFAULT_PATTERNS, DTYPES, Case, chosen_cases
from benchmarks.cpu_ceilings import KIND_OF_DTYPE, measure_alone
from benchmarks.peer_models import extract, random_bert
from benchmarks.peers import (
    CHECKOUT,
    OWN,
    PEERS,
    Peer,
    PeerError,
    Worker,
    chosen_peers,
    worker_command,
    worker_environment,
)
from benchmarks.plain_bert import save_state
from benchmarks.records import Recorder, Timing, commit_of_checkout, describe_machine, read_rows
from benchmarks.runtimes import Job
from dynabert.latency_table import hardware_name

DEFAULT_RESULTS = CHECKOUT / "benchmarks" / "results" / "cpu_latency.jsonl"

# Largest relative error (Frobenius, real tokens) of the last hidden state, on random weights. A
# wrong head, neuron or layer gives tenths; int8 peers are at 0.02 to 0.03.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "int8": 8e-2}

_PREPARE_S = 1200.0  # compiling or calibrating BERT-base on two busy cores
_SETTLE_CALLS = 2  # of a round: caches and clock belonged to another peer
_WARM_S = 0.5
_BUSY = 1.5  # p80 over p20, beyond which a row says more about the machine than about the peer


@dataclass(frozen=True)
class Plan:
    """Settings of a run.

    Attributes:
        threads: Of every runtime.
        rounds: How often the peers of a group take turns.
        seconds: Time on samples for each peer of a group, all rounds together.
        backend: Backend to force for our own kernels; "" leaves it automatic.
        peers_python: Interpreter of the environment of requirements/peers.txt.
        work_dir: Where weights, exported files and logs lie.
    """

    threads: int
    rounds: int
    seconds: float
    backend: str
    peers_python: Path | None
    work_dir: Path

    def check(self) -> None:
        """Refuse numbers that measure nothing.

        Raises:
            ValueError: A number is out of range.
        """
        for name, value in (("threads", self.threads), ("rounds", self.rounds)):
            if value < 1:
                raise ValueError(f"bench_model: {name}={value}, expected 1 or more.")
        if not 0 < self.seconds < float("inf"):
            raise ValueError(
                f"bench_model: seconds={self.seconds}, expected a positive number of seconds."
            )


class Inputs:
    """Weights, token ids and float32 truth of cases, written once to the work folder."""

    def __init__(self, work_dir: Path) -> None:
        self._folder = work_dir
        self._models: dict[str, Any] = {}

    def files(self, case: Case) -> dict[str, str]:
        """The fields of a case's jobs that name files."""
        folder = self._folder / case.subnet.geometry.name
        return {
            "full_weights": str(folder / "full.safetensors"),
            "subnet_weights": str(folder / f"{case.subnet.name}.safetensors"),
            "inputs": str(folder / f"{case.shape.name}.npz"),
        }

    def write(self, case: Case) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Write what the case's jobs name; return the last hidden state, ``[B, S, C]``."""
        full, weights, inputs = map(Path, self.files(case).values())
        truth = inputs.with_name(f"{case.shape.name}-{case.subnet.name}.npy")
        if not truth.exists():
            geometry = case.subnet.geometry
            if geometry.name not in self._models:  # one in memory at a time
                self._models = {geometry.name: random_bert(geometry, "cpu")}
            model = self._models[geometry.name]
            small = extract(model, case.subnet)
            for path, source in ((full, model), (weights, small)):
                if not path.exists():
                    save_state(source.state_dict(), geometry.head_dim, path)
            ids, mask = (
                np.array(rows, dtype=np.int64)
                for rows in (case.shape.token_ids(geometry.vocab_size), case.shape.mask())
            )
            np.savez(inputs, ids=ids, mask=mask, is_padded=case.shape.is_padded)
            with torch.no_grad():
                state = small(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
            unfinished = truth.with_name(f"part-{truth.name}")
            np.save(unfinished, state.last_hidden_state.numpy())
            unfinished.replace(truth)
        found: np.ndarray[Any, np.dtype[np.float32]] = np.load(truth)
        return found


def relative_error(
    output: np.ndarray[Any, Any], truth: np.ndarray[Any, Any], mask: Sequence[Sequence[int]]
) -> float:
    """Frobenius norm of the difference over that of the truth, at real tokens only.

    Raises:
        PeerError: The shapes differ, or the output is not all numbers.
    """
    if output.shape != truth.shape:
        raise PeerError(f"output has shape {list(output.shape)}, expected {list(truth.shape)}")
    real = np.array(mask, dtype=bool)
    got, expected = output[real].astype(np.float64), truth[real].astype(np.float64)
    if not np.isfinite(got).all():
        raise PeerError("output holds NaN or infinity")
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


class Bench:
    """Runs groups and writes their rows.

    Args:
        plan: Settings.
        recorder: Where rows go.
        peaks: Measured limits by kind, in units per second; those missing give no shares.
    """

    def __init__(self, plan: Plan, recorder: Recorder, peaks: Mapping[str, float]) -> None:
        self.plan, self.recorder, self.peaks = plan, recorder, dict(peaks)
        self.inputs = Inputs(plan.work_dir)

    def job(self, case: Case, dtype: str, peer: Peer) -> Job:
        """What a worker needs to run `case`, once `Inputs.write` has written its files."""
        return Job(
            runtime=peer.runtime,
            variant=peer.variant,
            dtype=dtype,
            threads=self.plan.threads,
            model=case.subnet.geometry.name,
            width=case.subnet.width,
            depth=case.subnet.depth,
            backend=self.plan.backend if peer.name in OWN else "",
            **self.inputs.files(case),
        )

    def setting(self, case: Case, dtype: str, peer: Peer) -> dict[str, Any]:
        """The fields that say what a row is about."""
        subnet = case.subnet
        return {
            "model": subnet.geometry.name,
            "shape": {
                "name": case.shape.name,
                "lengths": list(case.shape.lengths),
                "seq_len": case.shape.seq_len,
            },
            "subnet": subnet.name,
            "width": subnet.width,
            "depth": subnet.depth,
            "dtype": dtype,
            "peer": peer.name,
            "threads": self.plan.threads,
            **({"backend": self.plan.backend or "auto"} if peer.name in OWN else {}),
        }

    def is_recorded(self, case: Case, dtype: str, peers: Sequence[Peer]) -> bool:
        """Whether one group at this commit and setting holds a row of each of `peers`."""
        wanted = {peer.name for peer in peers}
        found: dict[str, set[str]] = {}
        for row in read_rows(self.recorder.path):
            if row.get("section") != "latency" or row.get("commit") != self.recorder.commit:
                continue
            peer = PEERS.get(row["peer"])
            if peer is not None and _agrees(row, case.name, self.setting(case, dtype, peer)):
                found.setdefault(row["group"], set()).add(peer.name)
        return any(wanted <= names for names in found.values())

    def run_group(self, case: Case, dtype: str, peers: Sequence[Peer]) -> list[dict[str, Any]]:
        """Prepare, check and time `peers` on one case; a row for each is written and returned."""
        truth = self.inputs.write(case)
        group = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        rows = []
        with ExitStack() as stack:
            ready: dict[str, tuple[Worker, dict[str, Any]]] = {}
            for peer in peers:
                fields = {**self.setting(case, dtype, peer), "group": group}
                try:
                    worker, found = self._prepared(stack, case, dtype, peer, truth)
                except PeerError as error:
                    rows.append(self.recorder.add("latency", case.name, error=str(error), **fields))
                else:
                    ready[peer.name] = (worker, {**fields, **found})
            samples, failed = self._rounds({name: pair[0] for name, pair in ready.items()})
            for name, (_, fields) in ready.items():
                if name in failed:
                    row = self.recorder.add("latency", case.name, error=failed[name], **fields)
                else:
                    timing = Timing(tuple(samples[name]))
                    row = self.recorder.add(
                        "latency",
                        case.name,
                        timing=timing,
                        **fields,
                        **self._rates(case, dtype, timing),
                    )
                rows.append(row)
        return rows

    def _prepared(
        self,
        stack: ExitStack,
        case: Case,
        dtype: str,
        peer: Peer,
        truth: np.ndarray[Any, Any],
    ) -> tuple[Worker, dict[str, Any]]:
        """A warm worker whose output is right, and what to record of it."""
        name = f"{case.name.replace('/', '_')}-{dtype}-{peer.name}"
        log, output = (self.plan.work_dir / "logs" / f"{name}{end}" for end in (".log", ".npy"))
        environment = worker_environment(self.plan.threads)
        command = worker_command(peer, self.plan.peers_python)
        # A stack of its own: a worker that fails its check ends now, not with the group.
        with ExitStack() as own:
            worker = own.enter_context(Worker(command, environment, log))
            job = self.job(case, dtype, peer)
            answer = worker.ask(
                {"do": "prepare", "job": job.to_dict(), "output": str(output)}, _PREPARE_S
            )
            error = relative_error(np.load(output), truth, case.shape.mask())
            output.unlink()
            if not error <= TOLERANCE[dtype]:
                raise PeerError(
                    f"{peer.name}: relative error={error:.3g}, expected at most "
                    f"{TOLERANCE[dtype]:g} in {dtype}. It is not timed."
                )
            worker.ask({"do": "warm", "seconds": _WARM_S}, _PREPARE_S)
            stack.push(own.pop_all())
        return worker, {"rel_err": error, "notes": answer["notes"]}

    def _rounds(
        self, workers: Mapping[str, Worker]
    ) -> tuple[dict[str, list[float]], dict[str, str]]:
        """Samples of each worker in turn, and why some failed."""
        samples: dict[str, list[float]] = {name: [] for name in workers}
        failed: dict[str, str] = {}
        shuffle = random.Random(0).shuffle
        seconds = self.plan.seconds / self.plan.rounds
        for _ in range(self.plan.rounds):
            order = [name for name in workers if name not in failed]
            shuffle(order)
            for name in order:
                request = {"do": "round", "seconds": seconds, "settle": _SETTLE_CALLS}
                try:
                    answer = workers[name].ask(request, 120 + 10 * seconds)
                except PeerError as error:
                    failed[name] = str(error)
                else:
                    samples[name] += answer["samples_ms"]
        return samples, failed

    def _rates(self, case: Case, dtype: str, timing: Timing) -> dict[str, Any]:
        seconds = timing.median_ms / 1e3
        bytes_per_weight = {"float32": 4, "bfloat16": 2, "int8": 1}[dtype]
        weight_bytes = case.subnet.weight_bytes(bytes_per_weight)
        rates: dict[str, Any] = {"flops": case.flops, "gflops": case.flops / seconds / 1e9}
        peak = self.peaks.get(KIND_OF_DTYPE[dtype])
        if peak:
            rates["peak_gflops"] = peak / 1e9
            rates["share_of_peak"] = case.flops / seconds / peak
        if self.peaks.get("memory"):
            rates["share_of_bandwidth"] = weight_bytes / seconds / self.peaks["memory"]
        return rates

    def run_own(self, cases: Sequence[Case], dtype: str) -> None:
        """Fixed cost, encoder time and switching of our model; `cases` differ in the subnet."""
        first = cases[0]
        peer = PEERS["ours"]
        for case in cases:
            self.inputs.write(case)
        # A row says itself which subnet it is about, or which two.
        fields = self.setting(first, dtype, peer)
        del fields["width"], fields["depth"]
        subject = f"{first.subnet.geometry.name}/{first.shape.name}"
        pairs = [[case.subnet.width, case.subnet.depth] for case in cases]
        log = self.plan.work_dir / "logs" / f"own-{subject.replace('/', '_')}-{dtype}.log"
        try:
            command = worker_command(peer, None)
            with Worker(command, worker_environment(self.plan.threads), log) as worker:
                job = self.job(first, dtype, peer).to_dict()
                output = str(log.with_suffix(".npy"))
                worker.ask({"do": "prepare", "job": job, "output": output}, _PREPARE_S)
                seconds = self.plan.seconds * len(cases)
                request = {"do": "profile", "subnets": pairs, "seconds": seconds}
                found = worker.ask(request, _PREPARE_S + 10 * seconds)["rows"]
        except PeerError as error:
            self.recorder.add("own", "profile", error=str(error), **fields)
            return
        for row in found:
            self.recorder.add("own", row.pop("case"), **{**fields, **row})


def _agrees(row: Mapping[str, Any], case: str, setting: Mapping[str, Any]) -> bool:
    return row["case"] == case and all(row.get(key) == value for key, value in setting.items())


def machine_of_run(threads: int) -> dict[str, Any]:
    """What rows repeat about the machine and the libraries of our own environment."""
    hardware = hardware_name(torch.device("cpu"))
    return {**describe_machine("cpu"), "hardware": hardware, "threads": threads}


def _print_group(rows: Sequence[Mapping[str, Any]], case: Case, dtype: str) -> None:
    print(f"{case.name} {dtype}")
    for row in rows:
        if "error" in row:
            print(f"  {row['peer']:<15} -  {row['error'].splitlines()[0][:110]}")
            continue
        busy = "  (busy machine)" if row["p80_ms"] > _BUSY * row["p20_ms"] else ""
        share = f"{row['share_of_peak']:6.0%}" if "share_of_peak" in row else "     -"
        spread = f"{row['p20_ms']:.3f}-{row['p80_ms']:.3f}"
        print(
            f"  {row['peer']:<15} {row['median_ms']:9.3f} ms  {spread}  {share} of peak"
            f"  n={row['n']}  err {row['rel_err']:.1e}{busy}"
        )
    sys.stdout.flush()


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", nargs="+", default=list(DEFAULT_PATTERNS), help="names; * for any part"
    )
    parser.add_argument("--peers", nargs="+", default=list(PEERS), help=", ".join(PEERS))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=5.0, help="per peer and case, all rounds")
    parser.add_argument("--backend", default="", help="force it for our own kernels")
    parser.add_argument("--peers-python", type=Path, default=CHECKOUT / ".venv-peers/bin/python")
    parser.add_argument(
        "--work-dir", type=Path, required=True, help="weights, exported files, logs"
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_RESULTS)
    parser.add_argument("--no-own", action="store_true", help="leave out our model's own costs")
    parser.add_argument("--again", action="store_true", help="run what is on record too")
    parser.add_argument("--list", action="store_true", help="print the cases' names and end")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    options = _arguments(arguments)
    if options.list:
        print("\n".join(CASES))
        return
    plan = Plan(
        options.threads,
        options.rounds,
        options.seconds,
        options.backend,
        options.peers_python,
        options.work_dir.resolve(),
    )
    plan.check()
    cases, peers = chosen_cases(tuple(options.cases)), chosen_peers(options.peers)
    torch.set_num_threads(plan.threads)
    recorder = Recorder(
        options.out.parent, machine_of_run(plan.threads), commit_of_checkout(), options.out.name
    )
    peaks = {}
    for found in measure_alone(plan.threads, seconds=1.0):
        rate, kind = found.get("rate"), found["kind"]
        recorder.add(
            "peak",
            kind,
            error=found.get("error"),
            threads=plan.threads,
            **({} if rate is None else {"rate": rate}),
        )
        if rate is not None:
            peaks[kind] = rate
        print(f"peak {kind}: " + (found["error"] if rate is None else f"{rate / 1e9:.1f} G/s"))
    bench = Bench(plan, recorder, peaks)
    for case in cases:
        for dtype in options.dtypes:
            group = [peer for peer in peers if dtype in peer.dtypes]
            if not group or (not options.again and bench.is_recorded(case, dtype, group)):
                continue
            _print_group(bench.run_group(case, dtype, group), case, dtype)
    if not options.no_own and "ours" in {peer.name for peer in peers}:
        for same in _by_model_and_shape(cases):
            for dtype in options.dtypes:
                bench.run_own(same, dtype)


def _by_model_and_shape(cases: Sequence[Case]) -> list[list[Case]]:
    groups: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        key = (case.subnet.geometry.name, case.shape.name)
        groups.setdefault(key, []).append(case)
    return list(groups.values())


if __name__ == "__main__":
    main()
