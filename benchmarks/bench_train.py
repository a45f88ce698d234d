"""One training step of fine-tuning and of the distilling stages, against a loop over subnets.

    python -m benchmarks.bench_train --data-dir DATA --threads 2 --out benchmarks/results/x.jsonl
    python -m benchmarks.bench_train --data-dir DATA --stages fine-tune --orders grouped \
      --peers ours-reference,ours-cpu

all-MiniLM-L6-v2 on SST-2 sentences, batch 32, bfloat16 autocast; batches of shuffled rows, and of
rows of like length. A step is all of it: teacher, every subnet forward and backward, clipping,
AdamW; fine-tuning is the full network on labels, without a teacher. Peers:

- ``loop``: `benchmarks.sliced_bert`, each subnet in its own forward and backward pass, the teacher
  once per width.
- ``loop-compiled``: the same with compiled layers.
- ``ours``: `dynabert.training.step`, as the trainer runs it; ``ours-reference`` and ``ours-cpu``
  with that backend forced, ``ours`` with the automatic choice.

All start from the same weights; before timing, the losses and gradients of the peers are compared
without dropout. Peers take turns on each batch.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer

from benchmarks.records import commit_of_checkout, describe_machine, timing_row
from benchmarks.sliced_bert import SlicedBert
from dynabert import DynaBertForSequenceClassification, SubnetConfig, subnet_grid
from dynabert.cli.demo import find_minilm
from dynabert.data.collators import DynamicPadCollator, encode
from dynabert.data.tasks import load_task
from dynabert.latency_table import hardware_name
from dynabert.subnet import default_depths, default_widths
from dynabert.training.allocator import reuse_freed_memory
from dynabert.training.arguments import Stage
from dynabert.training.losses import hidden_state_loss, soft_cross_entropy
from dynabert.training.row_order import RowOrder
from dynabert.training.step import Batch, Share, StepLosses
from dynabert.training.subnet_plan import PlannedSubnet, SubnetPlan
from dynabert_kernels import use_backend
from dynabert_kernels.timing import Timing

Inputs = dict[str, Tensor]
_BATCH_SIZE = 32


class Clock:
    """Time of the parts of a step, in milliseconds."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of this block to `name`."""
        start = perf_counter()
        yield
        self.parts[name] = self.parts.get(name, 0.0) + 1e3 * (perf_counter() - start)


class Peer:
    """A student with its optimiser, and one way of running a step."""

    def __init__(self, student: nn.Module) -> None:
        self.student = student.train()
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=2e-5, fused=True)

    def losses(self, inputs: Inputs, clock: Clock) -> list[float]:
        """Forward and backward of everything; the loss of each subnet, small to large."""
        raise NotImplementedError

    def step(self, inputs: Inputs, clock: Clock) -> list[float]:
        """A whole optimiser step."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = self.losses(inputs, clock)
        with clock.part("optimiser"):
            nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return losses


class Ours(Peer):
    """The product's step: all subnets in one pass."""

    def __init__(
        self,
        student: DynaBertForSequenceClassification,
        teacher: DynaBertForSequenceClassification,
        stage: Stage,
        planned: list[PlannedSubnet],
        backend: str | None = None,
    ) -> None:
        super().__init__(student)
        self._teacher, self._planned = teacher.eval(), planned
        self._losses = StepLosses(stage, "classification", "mean")
        self._backend = backend

    def losses(self, inputs: Inputs, clock: Clock) -> list[float]:
        """See `Peer.losses`."""
        with use_backend(self._backend):
            return self._run(inputs, clock)

    def _run(self, inputs: Inputs, clock: Clock) -> list[float]:
        batch = Batch(inputs, Share())
        taught_by = [item.teacher for item in self._planned if item.teacher is not None]
        lessons = {}
        if taught_by:
            with clock.part("teacher"):
                lessons = self._losses.lessons(self._teacher, batch, taught_by)
        with clock.part("forward"):
            losses = self._losses(self.student, batch, self._planned, lessons)
        with clock.part("backward"):
            losses.sum().backward()
        return losses.tolist()


class Loop(Peer):
    """A loop over the subnets."""

    def __init__(
        self,
        student: SlicedBert,
        teacher: SlicedBert,
        stage: Stage,
        planned: list[PlannedSubnet],
        shapes: dict[Any, Any],
    ) -> None:
        super().__init__(student)
        self._teacher, self._stage = teacher.eval(), stage
        self._planned, self._shapes = planned, shapes

    def losses(self, inputs: Inputs, clock: Clock) -> list[float]:
        """See `Peer.losses`."""
        ids = [inputs[name] for name in ("input_ids", "attention_mask", "token_type_ids")]
        mask = inputs["attention_mask"].unsqueeze(-1)
        lessons: dict[Any, Any] = {}
        losses = []
        for item in self._planned:
            if item.teacher is not None and item.teacher not in lessons:
                with clock.part("teacher"), torch.no_grad():
                    logits, states = self._teacher(*ids, self._shapes[item.teacher])
                    lessons[item.teacher] = logits, [state * mask for state in states]
            with clock.part("forward"):
                logits, states = self.student(*ids, item.shape)
                if item.teacher is None:
                    loss = F.cross_entropy(logits.float(), inputs["labels"])
                else:
                    taught, targets = lessons[item.teacher]
                    loss = self._stage.logit_weight * soft_cross_entropy(logits, taught)
                    loss = loss + self._stage.hidden_weight * hidden_state_loss(
                        [state * mask for state in states],
                        targets,
                        item.shape.hidden_targets,
                        mask.sum(),
                    )
            with clock.part("backward"):
                loss.backward()
            losses.append(loss.item())
        return losses


def load_minilm() -> DynaBertForSequenceClassification:
    """The model of the benchmark, with a head fixed by a seed."""
    torch.manual_seed(0)
    return DynaBertForSequenceClassification.from_pretrained(
        str(find_minilm()), num_labels=2, dtype=torch.float32
    )


def make_peers(
    stage: Stage,
    names: list[str],
    load: Callable[[], DynaBertForSequenceClassification] = load_minilm,
) -> dict[str, Peer]:
    """The peers; `load` gives each the same weights."""
    model = load()
    planned = SubnetPlan(stage, model.subnet_shape, seed=0).at(0)
    shapes = {item.teacher: model.subnet_shape(item.teacher) for item in planned}
    peers: dict[str, Peer] = {}
    for name in names:
        kind, _, backend = name.partition("-")
        if kind == "ours":
            peers[name] = Ours(load(), load(), stage, planned, backend or None)
            continue
        student, teacher = SlicedBert(load()), SlicedBert(load())
        if name == "loop-compiled":
            layer = torch.compile(lambda layer, *args: layer(*args), dynamic=True)
            student.run_layer = teacher.run_layer = layer
        peers[name] = Loop(student, teacher, stage, planned, shapes)
    return peers


def batches(data_dir: Path, count: int, order: str, seed: int = 0) -> list[Inputs]:
    """`count` batches of SST-2, evenly spread over an epoch: ``shuffled`` rows, or those of like
    length ``grouped`` as the product's trainer does."""
    tokenizer = AutoTokenizer.from_pretrained(str(find_minilm()))
    rows = encode(load_task("sst2", data_dir).train, tokenizer, 128)
    grouped = order == "grouped"
    visited = list(RowOrder(rows.lengths, _BATCH_SIZE, seed, lambda: 0, group_by_length=grouped))
    num_batches = len(visited) // _BATCH_SIZE
    collate = DynamicPadCollator(tokenizer)
    starts = [(2 * k + 1) * num_batches // (2 * count) * _BATCH_SIZE for k in range(count)]
    return [collate([rows[i] for i in visited[start : start + _BATCH_SIZE]]) for start in starts]


def check_agreement(peers: dict[str, Peer], inputs: Inputs) -> None:
    """Losses and the norm of the gradient agree without dropout, in float32.

    Raises:
        AssertionError: They do not; the peers would not be doing the same work.
    """
    found: dict[str, list[float]] = {}
    for name, peer in peers.items():
        peer.student.eval()
        losses = peer.losses(inputs, Clock())
        gradients = [p.grad for p in peer.student.parameters() if p.grad is not None]
        norm = float(torch.stack([gradient.norm() for gradient in gradients]).norm())
        found[name] = [*losses, norm]
        peer.optimizer.zero_grad()
        peer.student.train()
    for name, numbers in found.items():
        torch.testing.assert_close(
            numbers, next(iter(found.values())), rtol=1e-4, atol=1e-4, msg=f"{name}: {found}"
        )


def measure(
    peers: dict[str, Peer], data: list[Inputs], progress: Callable[[str], None] = print
) -> dict[str, dict[str, Timing]]:
    """Time of every part of a step for each peer; ``step`` is the whole."""
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in peers}
    for number, inputs in enumerate(data):
        for name, peer in peers.items():
            clock = Clock()
            with clock.part("step"):
                peer.step(inputs, clock)
            for part, value in clock.parts.items():
                samples[name].setdefault(part, []).append(value)
        progress(f"batch {number + 1}/{len(data)}")
    return {
        name: {part: Timing(tuple(values)) for part, values in parts.items()}
        for name, parts in samples.items()
    }


def stages() -> list[Stage]:
    """Fine-tuning, and the width and width-depth stages, of a network of 12 heads and 6 layers."""
    widths, depths = default_widths(12), default_depths(6)
    return [
        Stage("fine-tune", (SubnetConfig(),)),
        Stage("width", tuple(subnet_grid(widths, (1.0,))), "full", 1.0, 0.1),
        Stage("width-depth", tuple(subnet_grid(widths, depths)), "same-width", 1.0, 1.0),
    ]


def main() -> None:
    """Measure both stages, print a table, append the records."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="holds GLUE's SST-2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", type=int, default=30)
    parser.add_argument("--stages", default="width,width-depth", help="or fine-tune")
    parser.add_argument(
        "--reuse-memory", action="store_true", help="as dynabert train sets the C library's malloc"
    )
    parser.add_argument("--orders", default="shuffled,grouped")
    parser.add_argument("--peers", default="loop,loop-compiled,ours")
    parser.add_argument("--out", type=Path, help="JSON lines are appended here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    reused = options.reuse_memory and reuse_freed_memory()
    rows = []
    cases = [
        (stage, order)
        for stage in stages()
        for order in options.orders.split(",")
        if stage.name in options.stages.split(",")
    ]
    for stage, order in cases:
        data = batches(options.data_dir, options.batches, order)
        peers = make_peers(stage, options.peers.split(","))
        check_agreement(peers, data[0])
        for inputs in data[:2]:  # compiles, and fills the caches of the libraries
            for peer in peers.values():
                peer.step(inputs, Clock())
        timings = measure(peers, data, progress=lambda _: None)
        base = timings[next(iter(peers))]["step"].median_ms
        for name, parts in timings.items():
            whole = parts["step"].median_ms
            listed = ", ".join(
                f"{part} {timing.median_ms:.1f} ({timing.median_ms / whole:.0%})"
                for part, timing in parts.items()
                if part != "step"
            )
            case = f"{stage.name:12} {order:9} {name:14}"
            print(f"{case} {whole:8.1f} ms  {base / whole:5.2f}x  {listed}")
            rows.append(
                {
                    "section": "training-step",
                    "case": stage.name,
                    "order": order,
                    "peer": name,
                    "dtype": "bfloat16 autocast",
                    "batch_size": _BATCH_SIZE,
                    "subnets": [subnet.name for subnet in stage.subnets],
                    **timing_row(parts["step"]),
                    "speedup": base / whole,
                    "parts_ms": {part: timing.median_ms for part, timing in parts.items()},
                    "mean_tokens": sum(int(b["attention_mask"].sum()) for b in data) / len(data),
                    "mean_padded": sum(b["attention_mask"].numel() for b in data) / len(data),
                    "threads": options.threads,
                    "reuses_memory": reused,
                    "machine": {
                        **describe_machine("cpu"),
                        "hardware": hardware_name(torch.device("cpu")),
                    },
                    "commit": commit_of_checkout(),
                    "date": datetime.datetime.now(datetime.timezone.utc).isoformat(
                        timespec="seconds"
                    ),
                }
            )
    if options.out:
        with options.out.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
