"""Section D: end-to-end encoder inference of the peers, each on the extracted dense subnet.

A peer (`benchmarks.gpu_encoder_peers`) is compared with the float32 Hugging Face subnet on the same
input before it is timed; a row whose check failed carries no timing.

Protocols: batch 128 x 128 (device time per batch, and 100 batches against the wall clock, each
after copying in a new input); batch 1 x 128 (device time with warm and with emptied L2, and the
host's latency); short texts (real tokens per second); a batch of mixed widths (four graphs).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import peer_models
from benchmarks.geometry import BASE, SUBNETS, TINY, WIDTHS, Subnet, short_text_lengths
from benchmarks.gpu_attention import quickest_backend
from benchmarks.gpu_encoder_peers import (
    Batch,
    CompiledLayers,
    CompiledRagged,
    HuggingFaceEager,
    Peer,
    compiled,
)
from benchmarks.gpu_timing import (
    L2Flush,
    Variant,
    eager,
    graphed,
    heat_up,
    measure,
    measure_host,
    relative_error,
    synchronize,
)
from benchmarks.records import Deadline, Recorder, Timing

# bf16 through 12 post-norm layers; a wrong head, neuron or layer gives tenths.
TOLERANCE = 3e-2
SECTION = "D inference"


@dataclass
class Prepared:
    """A peer that passed its check, ready to be timed.

    Attributes:
        peer: Who runs.
        subnet: What runs.
        batch: On what, with the SDPA backend that ran.
        variant: One call on the static input.
        static: That input, ``[B, S, C]`` or ``[T, C]``.
        error: Relative error against the float32 subnet.
    """

    peer: Peer
    subnet: Subnet
    batch: Batch
    variant: Variant
    static: torch.Tensor
    error: float


class Bench:
    """The section's state: model, settings, and how a peer is checked and timed."""

    def __init__(self, recorder: Recorder, device: str, *, budget_s: float, smoke: bool) -> None:
        self.recorder, self.device, self.smoke = recorder, device, smoke
        self.deadline = Deadline(budget_s)
        self.geometry = TINY if smoke else BASE
        self.dtype = torch.bfloat16
        self.model = peer_models.random_bert(self.geometry, device)
        self.big, self.seq_len = (3, 8) if smoke else (128, 128)
        self.flush = L2Flush(device)
        self.backends: dict[int, str | None] = {}

    def hidden(self, batch_size: int, seq_len: int) -> torch.Tensor:
        """Random embedded tokens of LayerNorm's scale, ``[B, S, C]``."""
        shape = (batch_size, seq_len, self.geometry.hidden_size)
        return torch.randn(shape, device=self.device).to(self.dtype)

    def batch(self, batch_size: int) -> Batch:
        """A full batch with the quickest SDPA backend for its shape at full width."""
        if batch_size not in self.backends:
            sizes = (batch_size, self.seq_len, self.geometry.num_heads, self.geometry.head_dim)
            best, times = quickest_backend(self.device, self.dtype, *sizes)
            self.backends[batch_size] = best
            self.recorder.add(
                SECTION, "sdpa_choice", shape={"B": batch_size}, peer=str(best), notes=str(times)
            )
        hidden = self.hidden(batch_size, self.seq_len)
        return Batch(hidden, None, self.backends[batch_size])

    def subnet(self, width: float, depth: float) -> Subnet:
        """One of the geometry's subnets."""
        return Subnet(self.geometry, width, depth)

    def reference(self, subnet: Subnet, batch: Batch, rows: int) -> torch.Tensor:
        """The float32 Hugging Face subnet on the first `rows` sequences, ``[rows, S, C]``."""
        encoder = peer_models.extract(self.model, subnet).encoder
        mask = None if batch.mask is None else batch.mask[:rows]
        return encoder(batch.hidden[:rows].float(), attention_mask=mask).last_hidden_state

    def fields(self, peer: Peer, subnet: Subnet, batch: Batch) -> dict[str, Any]:
        """The row's fields that say what ran."""
        return {
            "peer": peer.name,
            "subnet": subnet.name,
            "dtype": "bf16",
            "shape": {"B": batch.hidden.shape[0], "S": batch.hidden.shape[1]},
            "sdpa": batch.backend or "default",
        }

    def prepare(self, case: str, peer: Peer, subnet: Subnet, batch: Batch) -> Prepared | None:
        """Prepare, check, capture; None after recording why a peer cannot be timed."""
        attempts = [batch]
        if batch.backend == "cudnn" and batch.lengths is None:
            attempts.append(replace(batch, backend="flash"))
        for attempt in attempts:
            with self.recorder.guarded(SECTION, case, **self.fields(peer, subnet, attempt)):
                return self._prepare(case, peer, subnet, attempt)
        return None

    def _prepare(self, case: str, peer: Peer, subnet: Subnet, batch: Batch) -> Prepared | None:
        forward = peer.prepare(subnet, batch)
        ragged = isinstance(peer, CompiledRagged)
        static = batch.hidden[batch.real] if ragged else batch.hidden.clone()
        rows = min(8, batch.hidden.shape[0])
        real = batch.real[:rows]
        clock = time.monotonic()
        forward(static)
        synchronize(self.device)
        first_s = time.monotonic() - clock
        call = partial(forward, static)
        variant = graphed([call], self.device) if peer.captured else eager([call])
        variant.notes += f"; first call {first_s:.1f} s"
        if variant.graph is not None:
            variant.output.fill_(float("nan"))  # the replay, not an earlier call, must fill it
            variant.run()
        output = variant.output
        output = output[: int(real.sum())] if ragged else output[:rows][real]
        error = relative_error(output, self.reference(subnet, batch, rows)[real])
        if not error < TOLERANCE:
            raise ValueError(f"wrong: relative error {error:.2e}, expected below {TOLERANCE:.0e}")
        return Prepared(peer, subnet, batch, variant, static, error)

    def record(self, case: str, prepared: Prepared, timing: Timing, **more: Any) -> None:
        """Write one timed row with its rates."""
        subnet, batch = prepared.subnet, prepared.batch
        batch_size, seq_len, _ = batch.hidden.shape
        lengths = list(batch.lengths or [seq_len] * batch_size)
        seconds = timing.median_ms / 1e3
        self.recorder.add(
            SECTION,
            case,
            timing=timing,
            flops=subnet.ragged_flops(lengths),
            bytes_moved=subnet.weight_bytes() if batch_size == 1 else None,
            ceiling_of="bf16",
            rel_err=prepared.error,
            sequences_per_s=batch_size / seconds,
            tokens_per_s=sum(lengths) / seconds,
            notes=prepared.variant.notes,
            **more,
            **self.fields(prepared.peer, subnet, batch),
        )

    def compare_large(self, peers: list[Peer], subnet: Subnet, batch_size: int) -> None:
        """Batch x 128 per-batch device times, interleaved, twice; then 100 batches each."""
        case = f"batch{batch_size}"
        batch = self.batch(batch_size)
        ready = {peer.name: self.prepare(case, peer, subnet, batch) for peer in peers}
        good = {name: prepared for name, prepared in ready.items() if prepared is not None}
        variants = {name: prepared.variant for name, prepared in good.items()}
        for repeat in (1, 2):
            timings = measure(variants, self.device, samples=20, max_s=1.5, backlog_ms=5.0)
            for name, timing in timings.items():
                self.record(case, good[name], timing, repeat=repeat)
        if subnet.depth == 1.0:
            inputs = [self.hidden(batch_size, self.seq_len) for _ in range(4)]
            for prepared in good.values():
                mean = hundred_batches(prepared, inputs, self.device, self.smoke)
                clock = "host, mean of 100 batches"
                seconds = mean.median_ms / 10
                self.record(f"{case}_x100", prepared, mean, paper_seconds=seconds, clock=clock)

    def compare_single(self, peers: list[Peer], subnet: Subnet) -> None:
        """Batch 1: device time warm (ten runs in a row, and alone) and cold; the host's latency."""
        batch = self.batch(1)
        for peer in peers:
            prepared = self.prepare("batch1", peer, subnet, batch)
            if prepared is None:
                continue
            one = prepared.variant

            def ten(one: Variant = one) -> None:
                for _ in range(10):
                    one.run()

            limits = {"samples": 25, "max_s": 1.0, "backlog_ms": 1.0 if one.graph else 5.0}
            # Ten eager runs would outlast the backlog: the launches would be timed.
            runs = {"warm": Variant(ten, 10)} if one.graph else {}
            runs["warm_single"] = one
            timings = measure(runs, self.device, **limits)
            timings |= measure({"cold": one}, self.device, before=self.flush, **limits)
            timings["host"] = measure_host(one.run, self.device, samples=50, max_s=0.6)
            for state, timing in timings.items():
                self.record("batch1", prepared, timing, l2=state)

    def compare_ragged(self, dense: list[Peer], ragged: Peer, subnet: Subnet) -> None:
        """Short texts: padded to the limit, padded to the longest, and unpadded."""
        lengths = tuple(short_text_lengths(self.big, self.seq_len))
        entries: list[tuple[Peer, Batch]] = []
        for padded in (self.seq_len, -(-max(lengths) // 8) * 8):
            hidden = self.hidden(self.big, padded)
            for backend in ("efficient", "cudnn") if self.device == "cuda" else (None,):
                entries += [(peer, Batch(hidden, lengths, backend)) for peer in dense]
        entries.append((ragged, Batch(self.hidden(self.big, self.seq_len), lengths)))
        good: dict[str, Prepared] = {}
        for peer, batch in entries:
            prepared = self.prepare("short_texts", peer, subnet, batch)
            if prepared is not None:
                good[f"{peer.name} S{batch.hidden.shape[1]} {batch.backend}"] = prepared
        variants = {key: prepared.variant for key, prepared in good.items()}
        timings = measure(variants, self.device, samples=12, max_s=2.0, backlog_ms=5.0)
        for key, timing in timings.items():
            self.record("short_texts", good[key], timing)
            if good[key].peer is ragged:
                call = partial(ragged.prepare(subnet, good[key].batch), good[key].static)
                host = measure_host(call, self.device, max_s=1.0)
                clock = "host, no graph: a new length needs a new graph"
                self.record("short_texts", good[key], host, clock=clock)

    def mixed_widths(self, peer: Peer) -> None:
        """A quarter of the batch at each width, one static graph after another."""
        quarter = max(1, self.big // 4)
        prepared = []
        for width in WIDTHS:
            subnet = self.subnet(width, 1.0)
            ready = self.prepare("mixed_widths", peer, subnet, self.batch(quarter))
            if ready is None:
                return
            prepared.append(ready.variant)

        def sequence() -> None:
            for variant in prepared:
                variant.run()

        for repeat in (1, 2):
            timing = measure({"mixed": Variant(sequence)}, self.device, backlog_ms=2.0)["mixed"]
            self.recorder.add(
                SECTION,
                "mixed_widths",
                peer=peer.name,
                dtype="bf16",
                timing=timing,
                flops=sum(self.subnet(w, 1.0).flops(quarter, self.seq_len) for w in WIDTHS),
                ceiling_of="bf16",
                shape={"B": quarter * len(WIDTHS), "S": self.seq_len},
                subnet="w1,.75,.5,.25-d1",
                sequences_per_s=quarter * len(WIDTHS) / timing.median_ms * 1e3,
                repeat=repeat,
            )

    def write_exchange(self, path: Path) -> None:
        """Weights, an input and references for the JAX peer, which runs in its own process."""
        hidden = self.hidden(2, self.seq_len)
        arrays: dict[str, np.ndarray] = {"hidden": hidden.float().cpu().numpy()}
        layers = peer_models.encoder_weights(self.model, torch.float32)
        for name in peer_models.LayerWeights._fields:
            stacked = torch.stack([getattr(layer, name) for layer in layers])
            # bfloat16 values are the upper half of a float32: exact, and half the file.
            bits = stacked.to(torch.bfloat16).view(torch.int16)
            arrays[name] = bits.cpu().numpy().view(np.uint16)
        for width, depth in ((1.0, 1.0), (0.25, 1.0), (0.5, 0.5)):
            subnet = self.subnet(width, depth)
            reference = self.reference(subnet, Batch(hidden), 2)
            arrays[f"reference {subnet.name}"] = reference.cpu().numpy()
        np.savez(path, **arrays)


def hundred_batches(
    prepared: Prepared, inputs: list[torch.Tensor], device: str, smoke: bool
) -> Timing:
    """Mean time per batch over 100 batches by the wall clock, inputs copied in each time."""
    count = 4 if smoke else 100
    synchronize(device)
    clock = time.perf_counter()
    for index in range(count):
        prepared.static.copy_(inputs[index % len(inputs)])
        prepared.variant.run()
    synchronize(device)
    return Timing(((time.perf_counter() - clock) * 1e3 / count,))


def run_inference(
    recorder: Recorder, device: str, *, budget_s: float, smoke: bool, exchange: Path | None = None
) -> None:
    """P1, P2b and P4: every protocol, most wanted first."""
    with torch.inference_mode():
        bench = Bench(recorder, device, budget_s=budget_s, smoke=smoke)
        heat_up(device)
        if exchange is not None:
            with recorder.guarded(SECTION, "exchange"):
                bench.write_exchange(exchange)
        hf = HuggingFaceEager(bench.model, bench.dtype)
        layer = compiled(peer_models.dense_layer, None, device)
        default = CompiledLayers(bench.model, bench.dtype, layer, "P2b compiled graph")
        ragged_layer = compiled(peer_models.ragged_layer, None, device)
        ragged = CompiledRagged(bench.model, bench.dtype, ragged_layer)
        steps: list[tuple[str, Callable[[], None]]] = []
        for width, depth in SUBNETS:
            subnet = bench.subnet(width, depth)
            large = partial(bench.compare_large, [hf, default], subnet, bench.big)
            single = partial(bench.compare_single, [hf, default], subnet)
            steps += [(f"large {subnet.name}", large), (f"single {subnet.name}", single)]
        full, narrow = bench.subnet(1.0, 1.0), bench.subnet(0.25, 1.0)
        steps += [
            ("ragged full", partial(bench.compare_ragged, [hf, default], ragged, full)),
            ("mixed", partial(bench.mixed_widths, default)),
            ("ragged narrow", partial(bench.compare_ragged, [default], ragged, narrow)),
        ]
        run_steps(bench, steps)


def run_autotuned(recorder: Recorder, device: str, *, budget_s: float, smoke: bool) -> None:
    """P2 (max-autotune), against P2b again, as far as the compile time allows."""
    with torch.inference_mode():
        bench = Bench(recorder, device, budget_s=budget_s, smoke=smoke)
        heat_up(device)
        modes = {"P2b compiled graph": None, "P2 max-autotune graph": "max-autotune-no-cudagraphs"}
        peers: list[Peer] = [
            CompiledLayers(
                bench.model, bench.dtype, compiled(peer_models.dense_layer, mode, device), name
            )
            for name, mode in modes.items()
        ]
        steps: list[tuple[str, Callable[[], None]]] = []
        for width, depth in SUBNETS:
            subnet = bench.subnet(width, depth)
            large = partial(bench.compare_large, peers, subnet, bench.big)
            single = partial(bench.compare_single, peers[1:], subnet)
            steps += [(f"large {subnet.name}", large), (f"single {subnet.name}", single)]
        steps.append(("mixed", partial(bench.mixed_widths, peers[1])))
        # Off by default in Inductor; TMA-fed templates may beat cuBLAS at large token counts.
        layer = compiled(peer_models.dense_layer, "tma", device)
        tma = CompiledLayers(bench.model, bench.dtype, layer, "P2 max-autotune tma graph")
        full = bench.subnet(1.0, 1.0)
        steps.append(("large tma", partial(bench.compare_large, [*peers, tma], full, bench.big)))
        run_steps(bench, steps)


def run_steps(bench: Bench, steps: list[tuple[str, Callable[[], None]]]) -> None:
    """Run the steps in order; those the deadline leaves no time for are recorded as shed."""
    for name, step in steps:
        if bench.deadline.left_s() < 0:
            bench.recorder.add(SECTION, name, error="shed: no time left")
            continue
        with bench.recorder.guarded(SECTION, name):
            step()
