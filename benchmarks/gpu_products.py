"""Section F: every matrix product of a layer with what is fused to it, forward and backward.

Each case is one launcher of the Triton backend (or two, where a row kernel ends the sublayer)
beside what PyTorch needs for the same: a cuBLAS product on a weight cut to the width beforehand and
the elementwise passes after it, the same under torch.compile, and the cuBLAS product alone, which
no epilogue can beat. Ours reads the full weight, its width given by the host, or by the device
("device width"). "mixed" cases run a quarter of the sequences at each width: ours in one call, the
peers' four calls in turn. Buffers rotate past the L2. Letters: see `benchmarks.geometry`; n is the
outputs or inputs that the width leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.geometry import BASE, LARGE, TINY, WIDTHS, Geometry
from benchmarks.gpu_encoder_peers import compiled
from benchmarks.gpu_product_cases import (
    CASES,
    MIXED,
    NORM,
    Case,
    Operands,
    Outputs,
    operands,
    unit_and_limit,
)
from benchmarks.gpu_timing import Variant, graphed, heat_up, measure, relative_error
from benchmarks.records import Deadline, Recorder

SECTION = "F products"
# bf16 in and out; a wrong row, column or epilogue gives tenths.
TOLERANCE = 1e-2
# Buffers of one rotation together exceed twice the 60 MB L2.
ROTATION_BYTES = 128 * 2**20
SEQ_LEN = 128
# Those that do the whole of a case.
PEERS = ("cublas + elementwise", "compiled", "cublas + elementwise, 4 in turn")


def _compared(found: Outputs, truth: Outputs) -> float:
    """Largest relative error of any output, over what the truth has of it."""
    cut = (part[tuple(map(slice, right.shape))] for part, right in zip(found, truth, strict=True))
    return max(relative_error(own, right) for own, right in zip(cut, truth, strict=True))


def _bytes(o: Operands) -> int:
    return sum(value.nbytes for value in (o.x, o.residual, o.inner, o.turned))


class Sweep:
    """Builds, checks and times the cases."""

    def __init__(self, recorder: Recorder, device: str, *, tokens: int, with_ours: bool) -> None:
        self.recorder, self.device, self.tokens = recorder, device, tokens
        self.with_ours = with_ours
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def run(self, case: Case, geometry: Geometry, width: float, *, compile: bool) -> None:
        """One case with all tokens at one width."""
        unit, limit = unit_and_limit(case.matrix, geometry)
        make = partial(operands, case.matrix, geometry, width, self.tokens, self.dtype, self.device)
        rotation = [make()]
        if self.device == "cuda":
            sets = max(2, min(16, -(-ROTATION_BYTES // _bytes(rotation[0]))))
            rotation += [make() for _ in range(sets - 1)]
        peers: dict[str, Callable[[Operands], Any]] = {"cublas + elementwise": case.plain}
        if compile and case.compile and self.device == "cuda":
            peers["compiled"] = compiled(case.plain, None, self.device)
        calls = {name: [partial(peer, o) for o in rotation] for name, peer in peers.items()}
        if case.alone is not None:
            calls["cublas alone"] = [partial(case.alone, o) for o in rotation]
        if self.with_ours:
            count = round(limit * width)
            calls["ours"] = [partial(case.ours, o, count, unit, limit) for o in rotation]
            if case.kind != NORM:
                tiles = self._tiles([width], limit)
                calls["ours device width"] = [
                    partial(case.ours, o.with_room(limit * unit), tiles, unit, limit)
                    for o in rotation
                ]
        n, hidden = rotation[0].count, geometry.hidden_size
        self._time(
            case.kind,
            calls,
            lambda found: found,
            case.plain(rotation[0].wide()),
            flops=None if case.kind == NORM else 2.0 * self.tokens * n * hidden,
            shape={"M": self.tokens, "n": n, "C": hidden},
            subnet=f"w{width:g}",
            model=geometry.name,
        )

    def mixed(self, case: Case, geometry: Geometry) -> None:
        """A quarter of the sequences at each width, the widest first."""
        unit, limit = unit_and_limit(case.matrix, geometry)
        full = [
            operands(case.matrix, geometry, 1.0, self.tokens, self.dtype, self.device)
            for _ in range(2)
        ]
        quarter = self.tokens // len(WIDTHS)
        bounds = [(k * quarter, (k + 1) * quarter) for k in range(len(WIDTHS))]
        counts = [round(limit * width) * unit for width in WIDTHS]
        is_summed = "weight gradient" in case.kind

        def four(pieces: list[Operands]) -> Outputs:
            found = [case.plain(piece) for piece in pieces]
            if not is_summed:
                return tuple(part for outputs in found for part in outputs)
            for gradients in found[1:]:
                for whole, narrow in zip(found[0], gradients, strict=True):
                    whole[: narrow.shape[0]] += narrow
            return found[0]

        def in_parts(found: Outputs) -> Outputs:
            if is_summed or len(found) == len(truth):
                return found
            return tuple(part[begin:end] for begin, end in bounds for part in found)

        cut = [
            [o.rows(*bound, count) for bound, count in zip(bounds, counts, strict=True)]
            for o in full
        ]
        truth = four([piece.wide() for piece in cut[0]])
        calls: dict[str, list[Callable[[], Any]]] = {
            "cublas + elementwise, 4 in turn": [partial(four, pieces) for pieces in cut]
        }
        if self.with_ours:
            tiles = self._tiles(list(WIDTHS), limit)
            calls["ours"] = [partial(case.ours, o, tiles, unit, limit) for o in full]
        self._time(
            f"{case.kind} mixed",
            calls,
            in_parts,
            truth,
            flops=2.0 * quarter * sum(counts) * geometry.hidden_size,
            shape={"M": self.tokens, "n": counts, "C": geometry.hidden_size},
            subnet="w1,.75,.5,.25",
            model=geometry.name,
        )

    def _tiles(self, widths: Sequence[float], limit: int) -> Any:
        from dynabert_kernels.triton.row_tiles import row_tiles

        batch_size = self.tokens // SEQ_LEN if self.device == "cuda" else len(widths)
        offsets = torch.arange(batch_size + 1, device=self.device, dtype=torch.int32)
        offsets *= self.tokens // batch_size
        each = [round(limit * width) for width in widths]
        each = each if len(each) == 1 else [w for w in each for _ in range(batch_size // len(each))]
        counts = torch.tensor(each, dtype=torch.int32, device=self.device)
        return row_tiles(offsets, counts, self.tokens, limit)

    def _time(
        self,
        kind: str,
        calls: dict[str, list[Callable[[], Any]]],
        in_parts: Callable[[Outputs], Outputs],
        truth: Outputs,
        *,
        flops: float | None,
        **fields: Any,
    ) -> None:
        """Check every competitor, then time those that pass against each other."""
        fields |= {"dtype": "bf16", "l2": "cold"}
        variants: dict[str, Variant] = {}
        errors: dict[str, float] = {}
        for name, rotation in calls.items():
            with self.recorder.guarded(SECTION, kind, peer=name, **fields):
                if name != "cublas alone":
                    errors[name] = _compared(in_parts(rotation[0]()), truth)
                    if not errors[name] < TOLERANCE:
                        raise ValueError(f"wrong: relative error {errors[name]:.2e}")
                variants[name] = graphed(rotation, self.device, fall_back=False)
        timings = measure(variants, self.device, samples=12, max_s=0.5)
        whole = [timing.median_ms for name, timing in timings.items() if name in PEERS]
        for name, timing in timings.items():
            ratio = min(whole) / timing.median_ms if whole else None
            self.recorder.add(
                SECTION,
                kind,
                peer=name,
                timing=timing,
                flops=flops,
                ceiling_of="bf16",
                rel_err=errors.get(name),
                ratio_to_best_peer=ratio,
                **fields,
            )


def run(
    recorder: Recorder, device: str, *, budget_s: float, smoke: bool, with_ours: bool = True
) -> None:
    """Section F within `budget_s` seconds, what matters most first."""
    deadline = Deadline(budget_s)
    heat_up(device)
    base, large = (TINY, TINY) if smoke else (BASE, LARGE)
    tokens = 16 if smoke else 16384
    with_ours = with_ours and device == "cuda"
    sweep = Sweep(recorder, device, tokens=tokens, with_ours=with_ours)
    by_kind = {case.kind: case for case in CASES}
    work: list[tuple[str, Callable[[], None]]] = []
    for width in (1.0, 0.25):
        for case in CASES:
            step = partial(sweep.run, case, base, width, compile=True)
            work.append((f"{case.kind} w{width:g}", step))
        if width == 1.0:
            work += [(f"{kind} mixed", partial(sweep.mixed, by_kind[kind], base)) for kind in MIXED]
    for geometry, widths in ((base, (0.5, 0.75)), (large, WIDTHS)):
        for width in widths:
            for case in CASES:
                step = partial(sweep.run, case, geometry, width, compile=False)
                work.append((f"{case.kind} {geometry.name} w{width:g}", step))
    with torch.no_grad():
        for name, step in work:
            if deadline.left_s() < 0:
                recorder.add(SECTION, name, error="shed: no time left")
                continue
            with recorder.guarded(SECTION, name):
                step()
