"""Section D: inference end to end, token ids to last hidden state, ours beside the peers.

The peers (`benchmarks.gpu_encoder_peers`) run the extracted dense subnet, ours (`gpu_ours`) the
full model at the subnet. Each is compared with the float32 Hugging Face subnet on the same input
before it is timed; a row whose check failed carries no timing.

Protocols: batch 128 x 128 (device time per batch, and 100 batches against the wall clock, each
after copying in a new input); batch 1 x 128 (device time with warm and with emptied L2, and the
host's latency); short texts (real tokens per second); a batch of mixed widths.
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
    embed,
)
from benchmarks.gpu_ours import OursEager, OursGraph, OursGraphPerWidth, our_model
from benchmarks.gpu_timing import (
    L2Flush,
    Variant,
    heat_up,
    is_lost,
    is_rehearsal,
    measure,
    measure_host,
    relative_error,
    synchronize,
)
from benchmarks.records import Deadline, Recorder
from dynabert import DynaBertModel
from dynabert_kernels import _cuda_extension
from dynabert_kernels.timing import Timing

# bf16 through 12 post-norm layers; a wrong head, neuron or layer gives tenths.
TOLERANCE = 3e-2
SECTION = "D inference"
OURS = "ours"
COMPILED = "P2b compiled graph"


@dataclass
class Prepared:
    """A peer that passed its check, ready to be timed.

    Attributes:
        peer: Who runs.
        subnet: What runs.
        batch: On what, with the SDPA backend that ran.
        variant: One call on the static input.
        static: That input, ``[B, S]`` or ``[T]``.
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

    def ids(self, batch_size: int, seq_len: int) -> torch.Tensor:
        """Random token ids, ``[B, S]``."""
        shape = (batch_size, seq_len)
        return torch.randint(0, self.geometry.vocab_size, shape, device=self.device)

    def batch(self, batch_size: int) -> Batch:
        """A full batch with the quickest SDPA backend for its shape at full width."""
        if batch_size not in self.backends:
            sizes = (batch_size, self.seq_len, self.geometry.num_heads, self.geometry.head_dim)
            best, times = quickest_backend(self.device, self.dtype, *sizes)
            self.backends[batch_size] = best
            self.recorder.add(
                SECTION, "sdpa_choice", shape={"B": batch_size}, peer=str(best), notes=str(times)
            )
        return Batch(self.ids(batch_size, self.seq_len), None, self.backends[batch_size])

    def subnet(self, width: float, depth: float) -> Subnet:
        """One of the geometry's subnets."""
        return Subnet(self.geometry, width, depth)

    def reference(self, subnet: Subnet, batch: Batch, rows: int) -> torch.Tensor:
        """The float32 Hugging Face subnet on the first `rows` sequences, ``[rows, S, C]``."""
        small = peer_models.extract(self.model, subnet)
        mask = None if batch.mask is None else batch.mask[:rows]
        hidden = small.embeddings(batch.ids[:rows])
        return small.encoder(hidden, attention_mask=mask).last_hidden_state

    def fields(self, peer: Peer, subnet: Subnet, batch: Batch) -> dict[str, Any]:
        """The row's fields that say what ran."""
        return {
            "peer": peer.name,
            "subnet": subnet.name,
            "dtype": "bf16",
            "shape": {"B": batch.ids.shape[0], "S": batch.ids.shape[1]},
            "sdpa": "own" if peer.name.startswith(OURS) else batch.backend or "default",
        }

    def prepare(self, case: str, peer: Peer, subnet: Subnet, batch: Batch) -> Prepared | None:
        """Prepare, check, capture; None after recording why a peer cannot be timed."""
        attempts = [batch]
        is_peer = not peer.name.startswith(OURS)
        if batch.backend == "cudnn" and batch.lengths is None and is_peer:
            attempts.append(replace(batch, backend="flash"))
        for attempt in attempts:
            with self.recorder.guarded(SECTION, case, **self.fields(peer, subnet, attempt)):
                return self._prepare(case, peer, subnet, attempt)
        return None

    def _prepare(self, case: str, peer: Peer, subnet: Subnet, batch: Batch) -> Prepared | None:
        static = batch.ids[batch.real] if peer.packed else batch.ids.clone()
        rows = min(8, batch.ids.shape[0])
        real = batch.real[:rows]
        clock = time.monotonic()
        variant = peer.variant(subnet, batch, static, self.device)
        synchronize(self.device)
        variant.notes += f"; ready after {time.monotonic() - clock:.1f} s"
        if variant.graph is not None:
            variant.output.fill_(float("nan"))  # the replay, not an earlier call, must fill it
            variant.run()
        output = variant.output
        output = output[: int(real.sum())] if peer.packed else output[:rows][real]
        error = relative_error(output, self.reference(subnet, batch, rows)[real])
        if not error < TOLERANCE:
            raise ValueError(f"wrong: relative error {error:.2e}, expected below {TOLERANCE:.0e}")
        return Prepared(peer, subnet, batch, variant, static, error)

    def record(self, case: str, prepared: Prepared, timing: Timing, **more: Any) -> None:
        """Write one timed row with its rates."""
        subnet, batch = prepared.subnet, prepared.batch
        batch_size, seq_len = batch.ids.shape
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

    def prepare_all(
        self, case: str, peers: list[Peer], subnet: Subnet, batch: Batch
    ) -> dict[str, Prepared]:
        """Those of the peers that passed."""
        ready = {peer.name: self.prepare(case, peer, subnet, batch) for peer in peers}
        return {name: prepared for name, prepared in ready.items() if prepared is not None}

    def compare_large(self, peers: list[Peer], subnet: Subnet, batch_size: int) -> None:
        """Batch x 128 per-batch device times, interleaved, twice; then 100 batches each."""
        case = f"batch{batch_size}"
        good = self.prepare_all(case, peers, subnet, self.batch(batch_size))
        variants = {name: prepared.variant for name, prepared in good.items()}
        for repeat in (1, 2):
            timings = measure(variants, self.device, samples=12, max_s=1.5, backlog_ms=2.0)
            for name, timing in timings.items():
                self.record(case, good[name], timing, repeat=repeat)
        inputs = [self.ids(batch_size, self.seq_len) for _ in range(4)]
        clock = "host, 100 batches in 5 turns, mean of each turn"
        for name, timing in hundred_batches(good, inputs, self.device, self.smoke).items():
            seconds = timing.median_ms / 10
            self.record(f"{case}_x100", good[name], timing, paper_seconds=seconds, clock=clock)

    def compare_single(self, peers: list[Peer], subnet: Subnet) -> None:
        """Batch 1: device time warm (ten runs in a row, and alone) and cold; the host's latency."""
        good = self.prepare_all("batch1", peers, subnet, self.batch(1))
        alone = {name: prepared.variant for name, prepared in good.items()}

        def ten(one: Variant) -> None:
            for _ in range(10):
                one.run()

        # Ten eager runs would outlast the backlog: the launches would be timed.
        rows = {n: Variant(partial(ten, one), 10) for n, one in alone.items() if one.graph}
        limits: dict[str, Any] = {"samples": 15, "max_s": 1.0, "backlog_ms": 2.0}
        states = {
            "warm": measure(rows, self.device, samples=25, max_s=1.0, backlog_ms=5.0),
            "warm_single": measure(alone, self.device, **limits),
            "cold": measure(alone, self.device, before=self.flush, **limits),
            "host": {
                name: measure_host(one.run, self.device, samples=30, max_s=0.3)
                for name, one in alone.items()
            },
        }
        for state, timings in states.items():
            for name, timing in timings.items():
                self.record("batch1", good[name], timing, l2=state)

    def compare_ragged(
        self, dense: list[Peer], ragged: Peer, ours: list[Peer], subnet: Subnet
    ) -> None:
        """Short texts: padded to the limit, padded to the longest, and unpadded."""
        lengths = tuple(short_text_lengths(self.big, self.seq_len))
        entries: list[tuple[Peer, Batch]] = []
        for padded in (self.seq_len, -(-max(lengths) // 8) * 8):
            ids = self.ids(self.big, padded)
            for backend in ("efficient", "cudnn") if self.device == "cuda" else (None,):
                entries += [(peer, Batch(ids, lengths, backend)) for peer in dense]
        batch = Batch(self.ids(self.big, self.seq_len), lengths)
        entries += [(peer, batch) for peer in (ragged, *ours)]
        good: dict[str, Prepared] = {}
        for peer, batch in entries:
            prepared = self.prepare("short_texts", peer, subnet, batch)
            if prepared is not None:
                good[f"{peer.name} S{batch.ids.shape[1]} {batch.backend}"] = prepared
        variants = {key: prepared.variant for key, prepared in good.items()}
        timings = measure(variants, self.device, samples=12, max_s=2.0, backlog_ms=2.0)
        for key, timing in timings.items():
            prepared = good[key]
            self.record("short_texts", prepared, timing)
            if prepared.peer is ragged:
                call = partial(ragged.prepare(subnet, prepared.batch), prepared.static)
                clock = "host, no graph: a new length needs a new graph"
            elif prepared.peer in ours:
                call, clock = prepared.variant.run, f"host, {prepared.variant.notes}"
            else:
                continue
            host = measure_host(call, self.device, max_s=0.5)
            self.record("short_texts", prepared, host, clock=clock)

    def mixed_widths(self, peer: Peer, ours: OursGraph) -> None:
        """A quarter of the batch at each width: static graphs in turn, and ours in one call."""
        quarter = max(1, self.big // 4)
        subnets = [self.subnet(width, 1.0) for width in WIDTHS]
        prepared = []
        for subnet in subnets:
            ready = self.prepare("mixed_widths", peer, subnet, self.batch(quarter))
            if ready is None:
                return
            prepared.append(ready)

        def sequence() -> None:
            for ready in prepared:
                ready.variant.run()

        variants = {f"{peer.name}, 4 in turn": Variant(sequence)}
        name = f"{ours.name}, one call"
        with self.recorder.guarded(SECTION, "mixed_widths", peer=name):
            variants[name] = self._mixed(ours, subnets, quarter)
        for repeat in (1, 2):
            timings = measure(variants, self.device, backlog_ms=5.0)
            for name, timing in timings.items():
                self.recorder.add(
                    SECTION,
                    "mixed_widths",
                    peer=name,
                    dtype="bf16",
                    timing=timing,
                    flops=sum(subnet.flops(quarter, self.seq_len) for subnet in subnets),
                    ceiling_of="bf16",
                    shape={"B": quarter * len(WIDTHS), "S": self.seq_len},
                    subnet="w1,.75,.5,.25-d1",
                    sequences_per_s=quarter * len(WIDTHS) / timing.median_ms * 1e3,
                    repeat=repeat,
                )

    def _mixed(self, ours: OursGraph, subnets: list[Subnet], each: int) -> Variant:
        """One call on `each` sequences of each of `subnets`, checked against all of them."""
        batch = Batch(self.ids(each * len(subnets), self.seq_len))
        variant = ours.mixed([s for s in subnets for _ in range(each)], batch, self.device)
        for number, subnet in enumerate(subnets):
            rows = slice(number * each, number * each + min(2, each))
            reference = self.reference(subnet, Batch(batch.ids[rows]), 2)
            error = relative_error(variant.output[rows], reference)
            if not error < TOLERANCE:
                raise ValueError(f"wrong at {subnet.name}: relative error {error:.2e}")
        return variant

    def write_exchange(self, path: Path) -> None:
        """Weights, an embedded input and references for the JAX peer, a process of its own."""
        batch = Batch(self.ids(2, self.seq_len))
        hidden = self.model.embeddings(batch.ids)
        arrays: dict[str, np.ndarray] = {"hidden": hidden.float().cpu().numpy()}
        layers = peer_models.encoder_weights(self.model, torch.float32)
        for name in peer_models.LayerWeights._fields:
            stacked = torch.stack([getattr(layer, name) for layer in layers])
            # bfloat16 values are the upper half of a float32: exact, and half the file.
            bits = stacked.to(torch.bfloat16).view(torch.int16)
            arrays[name] = bits.cpu().numpy().view(np.uint16)
        for width, depth in ((1.0, 1.0), (0.25, 1.0), (0.5, 0.5)):
            subnet = self.subnet(width, depth)
            reference = self.reference(subnet, batch, 2)
            arrays[f"reference {subnet.name}"] = reference.cpu().numpy()
        np.savez(path, **arrays)


def hundred_batches(
    prepared: dict[str, Prepared], inputs: list[torch.Tensor], device: str, smoke: bool
) -> dict[str, Timing]:
    """Mean time per batch by the wall clock, in five turns of each; inputs copied in each time."""
    turns, count = (1, 2) if smoke or is_rehearsal() else (5, 20)
    taken: dict[str, list[float]] = {name: [] for name in prepared}
    for _ in range(turns):
        for name, one in prepared.items():
            synchronize(device)
            clock = time.perf_counter()
            for index in range(count):
                one.static.copy_(inputs[index % len(inputs)])
                one.variant.run()
            synchronize(device)
            taken[name].append((time.perf_counter() - clock) * 1e3 / count)
    return {name: Timing(tuple(values)) for name, values in taken.items()}


def cuda_graphs(model: DynaBertModel) -> list[OursGraph]:
    """Our graphs on the CUDA C++ kernels, on a card and where they were built."""
    if model.device.type != "cuda" or _cuda_extension.cuda_error() is not None:
        return []
    return [OursGraph(model, "ours graph cuda", "cuda")]


def run_inference(
    recorder: Recorder,
    device: str,
    *,
    budget_s: float,
    smoke: bool,
    exchange: Path | None = None,
    begun: Path | None = None,
) -> None:
    """P1, P2b, P4 and ours: every protocol, most wanted first; `begun` as for `run_steps`."""
    with torch.inference_mode():
        bench = Bench(recorder, device, budget_s=budget_s, smoke=smoke)
        heat_up(device)
        if exchange is not None:
            with recorder.guarded(SECTION, "exchange"):
                bench.write_exchange(exchange)
        hf = HuggingFaceEager(bench.model, bench.dtype)
        layer = compiled(peer_models.dense_layer, None, device)
        embedding = compiled(embed, None, device)
        default = CompiledLayers(bench.model, bench.dtype, layer, COMPILED, embedding)
        ragged_layer = compiled(peer_models.ragged_layer, None, device)
        ragged = CompiledRagged(bench.model, bench.dtype, ragged_layer, embed=embedding)
        model = our_model(bench.model, bench.geometry, bench.dtype)
        graph, plain, fixed = OursGraph(model), OursEager(model), OursGraphPerWidth(model)
        cuda = cuda_graphs(model)

        def large(subnet: Subnet) -> None:
            bench.compare_large([hf, default, graph, plain, *cuda], subnet, bench.big)

        def single(subnet: Subnet) -> None:
            bench.compare_single([hf, default, graph, plain, *cuda], subnet)

        def elastic(subnet: Subnet) -> None:
            bench.compare_large([graph, fixed], subnet, bench.big)
            bench.compare_single([graph, fixed], subnet)

        full, narrow = bench.subnet(1.0, 1.0), bench.subnet(0.25, 1.0)
        ours: list[Peer] = [graph, plain, *cuda]
        short = partial(bench.compare_ragged, ragged=ragged, ours=ours)
        steps: list[tuple[str, Callable[[], None]]] = [
            ("large full", partial(large, full)),
            ("large narrow", partial(large, narrow)),
            ("mixed", partial(bench.mixed_widths, default, graph)),
            ("short texts full", partial(short, [hf, default], subnet=full)),
            ("single full", partial(single, full)),
            ("single narrow", partial(single, narrow)),
        ]
        for width, depth in SUBNETS:
            subnet = bench.subnet(width, depth)
            if subnet not in (full, narrow):
                steps.append((f"large {subnet.name}", partial(large, subnet)))
                steps.append((f"single {subnet.name}", partial(single, subnet)))
        steps += [
            ("short texts narrow", partial(short, [default], subnet=narrow)),
            ("elastic full", partial(elastic, full)),
            ("elastic narrow", partial(elastic, narrow)),
        ]
        run_steps(bench, steps, begun)


def run_autotuned(
    recorder: Recorder, device: str, *, budget_s: float, smoke: bool, begun: Path | None = None
) -> None:
    """P2 (max-autotune) against P2b and ours, as far as the compile time allows."""
    with torch.inference_mode():
        bench = Bench(recorder, device, budget_s=budget_s, smoke=smoke)
        heat_up(device)
        modes = {COMPILED: None, "P2 max-autotune graph": "max-autotune-no-cudagraphs"}
        peers: list[Peer] = [
            CompiledLayers(
                bench.model,
                bench.dtype,
                compiled(peer_models.dense_layer, mode, device),
                name,
                compiled(embed, mode, device),
            )
            for name, mode in modes.items()
        ]
        graph = OursGraph(our_model(bench.model, bench.geometry, bench.dtype))
        steps: list[tuple[str, Callable[[], None]]] = []
        for width, depth in SUBNETS:
            subnet = bench.subnet(width, depth)
            large = partial(bench.compare_large, [*peers, graph], subnet, bench.big)
            single = partial(bench.compare_single, [peers[1], graph], subnet)
            steps += [(f"large {subnet.name}", large), (f"single {subnet.name}", single)]
        steps.append(("mixed", partial(bench.mixed_widths, peers[1], graph)))
        # Off by default in Inductor; TMA-fed templates may beat cuBLAS at large token counts.
        layer = compiled(peer_models.dense_layer, "tma", device)
        tma = CompiledLayers(bench.model, bench.dtype, layer, "P2 max-autotune tma graph")
        full = bench.subnet(1.0, 1.0)
        steps.append(("large tma", partial(bench.compare_large, [*peers, tma], full, bench.big)))
        run_steps(bench, steps, begun)


def run_steps(
    bench: Bench, steps: list[tuple[str, Callable[[], None]]], begun: Path | None = None
) -> None:
    """Run the steps in order; those the deadline leaves no time for are recorded as shed.

    Each is noted in the file `begun`, and left out if it is there already: a process that takes
    over from one that lost its device goes on after the step that cost it.
    """
    done = set(begun.read_text().splitlines()) if begun is not None and begun.exists() else set()
    for name, step in steps:
        if name in done:
            continue
        if is_lost(bench.device):
            return
        if begun is not None:
            with begun.open("a") as file:
                file.write(f"{name}\n")
        if bench.deadline.left_s() < 0:
            bench.recorder.add(SECTION, name, error="shed: no time left")
            continue
        with bench.recorder.guarded(SECTION, name):
            step()
