"""Sections A and B: what the card can do, and what cuBLAS does at the encoder's shapes.

A measures the ceilings that later rows are held against: copy bandwidth, 8192^3 matrix products
in each type, launch and graph-node cost. B times the four projections of a layer at each width
with the weight stored in three ways: sliced and contiguous, a column slice of the full matrix
(what slicing a Hugging Face layer gives), and the packed form of `dynabert_kernels` in which the
prefix is a block of rows (`out` and `ffn_down` are stored transposed, so their product is NN).
Letters: see `benchmarks.geometry`; M, N, K are tokens, outputs and inputs of a product.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.geometry import BASE, LARGE, TINY, WIDTHS, Geometry, linear_shapes
from benchmarks.gpu_timing import (
    Variant,
    eager,
    graphed,
    heat_up,
    measure,
    measure_host,
    relative_error,
)
from benchmarks.records import Deadline, Recorder

# Buffers of one rotation together exceed twice the 60 MB L2.
ROTATION_BYTES = 128 * 2**20
FP8_MAX = 448.0


def _random(rows: int, columns: int, device: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, columns, device=device).to(dtype)


def to_fp8(x: torch.Tensor, *, per_row: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to float8_e4m3fn.

    Args:
        x: Values, ``[rows, columns]``.
        per_row: One scale per row, else one for the tensor.

    Returns:
        The values divided by the scale, and the scale: ``[rows, 1]`` or a scalar, float32.
    """
    largest = x.float().abs().amax(dim=1, keepdim=True) if per_row else x.float().abs().amax()
    scale = largest.clamp_min(1e-12) / FP8_MAX
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def fp8_product(a: torch.Tensor, b: torch.Tensor, *, per_row: bool) -> Callable[[], torch.Tensor]:
    """`a @ b.T` in fp8 with bf16 output through `torch._scaled_mm`; a [M, K], b [N, K]."""
    a8, scale_a = to_fp8(a, per_row=per_row)
    b8, scale_b = to_fp8(b, per_row=per_row)
    return partial(
        torch._scaled_mm,
        a8,
        b8.t(),
        scale_a=scale_a,
        scale_b=scale_b.t() if per_row else scale_b,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def _big_products(device: str, size: int) -> dict[str, Callable[[], Callable[[], Any]]]:
    """Builders of size^3 products by ceiling name; a builder makes its operands when called."""

    def plain(dtype: torch.dtype) -> Callable[[], torch.Tensor]:
        return partial(
            torch.mm,
            _random(size, size, device, dtype),
            _random(size, size, device, dtype).t(),
        )

    def fp8(per_row: bool) -> Callable[[], torch.Tensor]:
        a, b = (_random(size, size, device, torch.bfloat16) for _ in range(2))
        return fp8_product(a, b, per_row=per_row)

    def int8() -> Callable[[], torch.Tensor]:
        a, b = (torch.randint(-127, 128, (size, size), device=device) for _ in range(2))
        return partial(torch._int_mm, a.to(torch.int8), b.to(torch.int8).t())

    return {
        "bf16": partial(plain, torch.bfloat16),
        "fp16": partial(plain, torch.float16),
        "tf32": partial(plain, torch.float32),
        "fp8": partial(fp8, False),
        "fp8_rowwise": partial(fp8, True),
        "int8": int8,
    }


def measure_bandwidth(recorder: Recorder, device: str) -> None:
    """Device copy (read plus write), fill (write only) and sum (read only)."""
    size = 2**32 if device == "cuda" else 2**16
    source = torch.randint(0, 255, (size // 8,), device=device)
    target = torch.empty_like(source)
    cases = {
        "copy": (partial(target.copy_, source), 2 * size),
        "fill": (partial(target.fill_, 7), size),
        "sum": (partial(torch.sum, source), size),
    }
    for repeat in (1, 2):
        timings = measure(
            {name: eager([call]) for name, (call, _) in cases.items()}, device, samples=9
        )
        for name, timing in timings.items():
            recorder.add(
                "A ceilings",
                name,
                peer="torch",
                timing=timing,
                bytes_moved=cases[name][1],
                ceiling="copy" if name == "copy" else None,
                shape={"bytes": size},
                repeat=repeat,
            )


def measure_products(recorder: Recorder, device: str, deadline: Deadline) -> None:
    """8192^3 matrix products on random data in each type, twice; then bf16 sustained for 2 s."""
    size = 8192 if device == "cuda" else 64
    torch.backends.cuda.matmul.allow_tf32 = True
    variants: dict[str, Variant] = {}
    for name, build in _big_products(device, size).items():
        with recorder.guarded("A ceilings", "gemm", dtype=name):
            variants[name] = eager([build()] * 2)
    for repeat in (1, 2):
        for name, timing in measure(variants, device, samples=12, max_s=6).items():
            recorder.add(
                "A ceilings",
                "gemm",
                peer="cublas",
                dtype=name,
                timing=timing,
                flops=2.0 * size**3,
                ceiling=name,
                shape={"M": size, "N": size, "K": size},
                repeat=repeat,
            )
    torch.backends.cuda.matmul.allow_tf32 = False
    with recorder.guarded("A ceilings", "gemm_sustained"):
        one = variants["bf16"]
        seconds = 2.0 if device == "cuda" and deadline.left_s() > 20 else 0.05
        query = None
        timings = []
        started = time.monotonic()
        while time.monotonic() - started < seconds:
            timings.append(measure({"bf16": one}, device, samples=20, backlog_ms=0, warmup=0))
            if query is None and time.monotonic() - started > seconds / 2:
                query = _start_smi(device)
        recorder.add(
            "A ceilings",
            "gemm_sustained",
            peer="cublas",
            dtype="bf16",
            timing=timings[-1]["bf16"],
            flops=2.0 * size**3,
            shape={"M": size, "N": size, "K": size},
            notes="last 40 products of a run of products of " + f"{seconds} s",
            smi=query.communicate(timeout=20)[0].strip() if query else None,
        )


def _start_smi(device: str) -> subprocess.Popen[str] | None:
    if device != "cuda":
        return None
    fields = "clocks.sm,clocks.mem,power.draw,temperature.gpu,power.limit"
    return subprocess.Popen(
        ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def measure_launches(recorder: Recorder, device: str) -> None:
    """Cost of a launch from the host, of a graph node, and of replaying and waiting for a graph."""
    x = torch.zeros(32, device=device)
    add = partial(x.add_, 1.0)
    node = measure({"node": graphed([add] * 100, device)}, device, samples=25)["node"]
    recorder.add("A ceilings", "graph_node", timing=node, notes="1 of 100 dependent tiny kernels")
    single = graphed([add], device)
    recorder.add(
        "A ceilings",
        "graph_of_one",
        timing=measure({"one": single}, device, samples=25)["one"],
        notes="device time of a graph of one tiny kernel, event to event",
    )
    recorder.add(
        "A ceilings",
        "graph_replay_and_wait",
        timing=measure_host(single.run, device, samples=200, max_s=0.5),
        notes="host time of replaying a graph of one kernel and waiting for it",
    )

    def thousand() -> None:
        for _ in range(1000):
            add()

    host = measure_host(thousand, device, samples=5, max_s=1.0)
    recorder.add(
        "A ceilings",
        "eager_launch",
        timing=type(host)(tuple(ms / 1000 for ms in host.samples_ms)),
        notes="host time of one of 1000 eager launches",
    )


def _rotation(bytes_per_set: int, *, cold: bool, device: str) -> int:
    if device != "cuda":
        return 1
    return max(2, min(48, -(-ROTATION_BYTES // bytes_per_set))) if cold else 1


def _gemm_variants(
    kind: str,
    geometry: Geometry,
    width: float,
    num_tokens: int,
    device: str,
    cold: bool,
) -> tuple[dict[str, list[Callable[[], torch.Tensor]]], torch.Tensor]:
    """Calls of each variant over the rotation, and the float32 product of the first set's rows."""
    n, k = linear_shapes(geometry, width)[kind]
    n_full, k_full = linear_shapes(geometry, 1.0)[kind]
    dtype = torch.bfloat16
    column_slice = k != k_full or kind in ("out", "ffn_down")
    sets = _rotation(2 * (n * k + num_tokens * (n + k)), cold=cold, device=device)
    repeats = 1 if cold or device != "cuda" else 20
    names = ["nt", "nt_bias"]
    names += ["nt_lda", "nn_packed", "nn_packed_bias"] if column_slice else []
    epilogue = {"ffn_up": "nt_bias_gelu", "out": "nt_bias_norm", "ffn_down": "nt_bias_norm"}
    names += [epilogue[kind]] if kind in epilogue else []
    calls: dict[str, list[Callable[[], torch.Tensor]]] = {name: [] for name in names}
    reference = torch.empty(0)
    for index in range(sets):
        x = _random(num_tokens, k, device, dtype)
        full = _random(n_full, k_full, device, dtype) * k**-0.5
        bias = torch.randn(n, device=device).to(dtype)
        weight = full[:n, :k].contiguous()
        gamma = torch.ones(n, device=device, dtype=dtype)
        if index == 0:
            reference = x[:32].float() @ weight.float().t()
        calls["nt"].append(partial(F.linear, x, weight))
        calls["nt_bias"].append(partial(F.linear, x, weight, bias))
        if column_slice:
            packed = full.t().contiguous()[:k]  # [K, N]: a prefix of rows of the packed weight
            calls["nt_lda"].append(partial(F.linear, x, full[:, :k]))
            calls["nn_packed"].append(partial(torch.mm, x, packed))
            calls["nn_packed_bias"].append(partial(torch.addmm, bias, x, packed))
        if kind == "ffn_up":
            calls["nt_bias_gelu"].append(partial(linear_gelu, x, weight, bias))
        elif kind != "qkv":
            residual = _random(num_tokens, n, device, dtype)
            calls["nt_bias_norm"].append(
                partial(linear_residual_norm, x, weight, bias, residual, gamma, gamma)
            )
    return {name: list_ * repeats for name, list_ in calls.items()}, reference


def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """First FFN projection with BERT's erf GELU, as PyTorch runs it: x [M, K], weight [N, K]."""
    return F.gelu(F.linear(x, weight, bias))


def linear_residual_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
) -> torch.Tensor:
    """Projection, residual, LayerNorm: x [M, K], weight [N, K], residual [M, N]."""
    return F.layer_norm(F.linear(x, weight, bias) + residual, gamma.shape, gamma, beta, 1e-12)


def measure_gemms(
    recorder: Recorder, device: str, deadline: Deadline, geometry: Geometry, tokens: int
) -> None:
    """A geometry's projections at one number of tokens, all widths; cold L2, and warm if small."""
    for cold in (True, False) if tokens <= 1024 else (True,):
        for kind in ("qkv", "out", "ffn_up", "ffn_down"):
            for width in WIDTHS:
                n, k = linear_shapes(geometry, width)[kind]
                fields = {
                    "dtype": "bf16",
                    "shape": {"M": tokens, "N": n, "K": k, "model": geometry.name},
                    "subnet": f"w{width:g}",
                    "l2": "cold" if cold else "warm",
                }
                if deadline.left_s() < 0:
                    recorder.add("B gemm", kind, error="shed: no time left", **fields)
                    return
                with recorder.guarded("B gemm", kind, **fields):
                    calls, reference = _gemm_variants(kind, geometry, width, tokens, device, cold)
                    errors = {
                        name: relative_error(calls[name][0]()[:32], reference)
                        for name in ("nt", "nt_lda", "nn_packed")
                        if name in calls
                    }
                    variants = {name: graphed(list_, device) for name, list_ in calls.items()}
                    timings = measure(variants, device, samples=12, max_s=1.0)
                    for name, timing in timings.items():
                        wrong = errors.get(name, 0.0)
                        recorder.add(
                            "B gemm",
                            kind,
                            peer=name,
                            timing=timing,
                            flops=2.0 * tokens * n * k,
                            bytes_moved=2.0 * (n * k + tokens * (n + k)),
                            ceiling_of="bf16",
                            rel_err=errors.get(name),
                            error=None if wrong < 1e-2 else f"wrong: relative error {wrong:.2e}",
                            notes=variants[name].notes,
                            **fields,
                        )


def measure_fp8_gemms(recorder: Recorder, device: str, tokens: int, geometry: Geometry) -> None:
    """Row-scaled fp8 products at the encoder's shapes, quantization not included."""
    for width in (1.0, 0.25):
        for kind, (n, k) in linear_shapes(geometry, width).items():
            fields: dict[str, Any] = {
                "dtype": "fp8_rowwise",
                "shape": {"M": tokens, "N": n, "K": k, "model": geometry.name},
                "subnet": f"w{width:g}",
                "l2": "cold",
            }
            with recorder.guarded("B gemm", kind, peer="scaled_mm", **fields):
                sets = _rotation(n * k + tokens * (2 * n + k), cold=True, device=device)
                calls = [
                    fp8_product(
                        _random(tokens, k, device, torch.bfloat16),
                        _random(n, k, device, torch.bfloat16),
                        per_row=True,
                    )
                    for _ in range(sets)
                ]
                timing = measure({"fp8": graphed(calls, device)}, device, samples=12)["fp8"]
                recorder.add(
                    "B gemm",
                    kind,
                    peer="scaled_mm",
                    timing=timing,
                    flops=2.0 * tokens * n * k,
                    bytes_moved=float(n * k + tokens * (2 * n + k)),
                    ceiling_of="fp8",
                    **fields,
                )


def measure_compiled_epilogues(recorder: Recorder, device: str, tokens: int, g: Geometry) -> None:
    """Projection plus epilogue under default Inductor, at full width."""
    backend = "inductor" if device == "cuda" else "eager"
    bf16 = torch.bfloat16
    for kind in ("ffn_up", "ffn_down"):
        n, k = linear_shapes(g, 1.0)[kind]
        shape = {"M": tokens, "N": n, "K": k, "model": g.name}
        with recorder.guarded("B gemm", kind, peer="compiled_epilogue", shape=shape):
            function = linear_gelu if kind == "ffn_up" else linear_residual_norm
            compiled = torch.compile(function, dynamic=False, backend=backend)
            calls = []
            for _ in range(_rotation(2 * (n * k + tokens * (n + k)), cold=True, device=device)):
                bias = torch.randn(n, device=device).to(bf16)
                inputs = [_random(tokens, k, device, bf16), _random(n, k, device, bf16), bias]
                inputs += [] if kind == "ffn_up" else [_random(tokens, n, device, bf16), bias, bias]
                calls.append(partial(compiled, *inputs))
            timing = measure({"c": graphed(calls, device)}, device, samples=12)["c"]
            recorder.add(
                "B gemm",
                kind,
                peer="compiled_epilogue",
                dtype="bf16",
                timing=timing,
                flops=2.0 * tokens * n * k,
                ceiling_of="bf16",
                shape=shape,
                subnet="w1",
                l2="cold",
            )


def run(recorder: Recorder, device: str, *, budget_s: float, smoke: bool) -> None:
    """Sections A and B within `budget_s` seconds."""
    deadline = Deadline(budget_s)
    heat_up(device)
    with torch.inference_mode():
        for section in (
            partial(measure_bandwidth, recorder, device),
            partial(measure_products, recorder, device, deadline),
            partial(measure_launches, recorder, device),
        ):
            with recorder.guarded("A ceilings", section.func.__name__):
                section()
    base, large = (TINY, TINY) if smoke else (BASE, LARGE)
    many, few, some = (16, 4, 8) if smoke else (16384, 128, 1024)
    with torch.inference_mode():
        measure_gemms(recorder, device, deadline, base, many)
        measure_gemms(recorder, device, deadline, base, few)
        measure_fp8_gemms(recorder, device, many, base)
    if deadline.left_s() > 15 or smoke:
        with torch.no_grad():
            measure_compiled_epilogues(recorder, device, many, base)
    with torch.inference_mode():
        measure_gemms(recorder, device, deadline, large, many)
        measure_gemms(recorder, device, deadline, base, some)
        measure_gemms(recorder, device, deadline, large, few)
