"""Section C: attention forward and forward plus backward, dense and ragged, by SDPA backend.

Query, key and value are views of one merged projection ``[B, S, 3, H, D]``, as a merged-QKV
encoder hands them over, so a backend that needs another layout pays for its copies here too;
the backward pass ends in the gradient of that merged tensor.
Letters: see `benchmarks.geometry`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from benchmarks.geometry import BASE, TINY, Geometry, short_text_lengths
from benchmarks.gpu_timing import Variant, graphed, heat_up, measure, relative_error
from benchmarks.records import Deadline, Recorder

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def split_heads(qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views ``[B, H, S, D]`` of query, key and value in a merged ``[B, S, 3, H, D]``."""
    query, key, value = qkv.unbind(2)
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def attend(
    qkv: torch.Tensor, backend: str | None, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """SDPA on a merged projection with one backend forced, or PyTorch's choice for None."""
    query, key, value = split_heads(qkv)
    if backend is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    with sdpa_kernel(BACKENDS[backend]):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def varlen_attention(qkv: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int) -> torch.Tensor:
    """`torch.nn.attention.varlen.varlen_attn` on a merged ragged projection.

    On a CPU, where that function has no kernel, one SDPA call per sequence; for tests only.

    Args:
        qkv: Merged projection, ``[T, 3, H, D]``.
        cu_seqlens: Ragged offsets, int32 ``[B + 1]``.
        max_seqlen: Longest sequence.

    Returns:
        ``[T, H, D]``.
    """
    query, key, value = qkv.unbind(1)
    if qkv.is_cuda:
        return varlen_attn(query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    offsets = cu_seqlens.tolist()
    pieces = []
    for begin, end in itertools.pairwise(offsets):
        q, k, v = (part[begin:end].transpose(0, 1) for part in (query, key, value))
        pieces.append(F.scaled_dot_product_attention(q, k, v).transpose(0, 1))
    return torch.cat(pieces)


def reference_attention(qkv: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Plain float32 attention on ``[B, S, 3, H, D]``; returns ``[B, H, S, D]``."""
    query, key, value = (part.float() for part in split_heads(qkv))
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ value


def quickest_backend(
    device: str, dtype: torch.dtype, batch_size: int, seq_len: int, heads: int, head_dim: int
) -> tuple[str | None, dict[str, float]]:
    """The faster of cuDNN and flash at one shape; None (PyTorch's choice) if neither runs.

    Returns:
        The backend's name and each candidate's median time in milliseconds.
    """
    qkv = torch.randn(batch_size, seq_len, 3, heads, head_dim, device=device).to(dtype)
    variants = {}
    for backend in ("cudnn", "flash"):
        try:
            variants[backend] = graphed([partial(attend, qkv, backend)] * 4, device)
        except RuntimeError:
            continue
    times = {name: t.median_ms for name, t in measure(variants, device, samples=9).items()}
    return (min(times, key=lambda name: times[name]) if times else None), times


def _dense_calls(qkv: torch.Tensor, backward: bool) -> dict[str, Callable[[], Any]]:
    batch_size, seq_len = qkv.shape[:2]
    offsets = torch.arange(batch_size + 1, device=qkv.device, dtype=torch.int32) * seq_len

    def ragged(x: torch.Tensor) -> torch.Tensor:
        return varlen_attention(x.flatten(0, 1), offsets, seq_len)

    forwards: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        name: partial(attend, backend=name) for name in BACKENDS
    }
    forwards["default"] = partial(attend, backend=None)
    forwards["varlen"] = ragged
    if not backward:
        return {name: partial(f, qkv) for name, f in forwards.items()}

    gradients: dict[str, torch.Tensor] = {}

    def both(name: str) -> tuple[torch.Tensor, ...]:
        leaf = qkv.detach().requires_grad_()
        out = forwards[name](leaf)
        if name not in gradients:
            gradients[name] = torch.randn_like(out)
        return torch.autograd.grad(out, leaf, gradients[name])

    return {name: partial(both, name) for name in forwards}


def measure_dense(
    recorder: Recorder, device: str, geometry: Geometry, heads: int, seq_len: int, tokens: int
) -> None:
    """All backends at one shape, forward and forward plus backward."""
    batch_size, head_dim = tokens // seq_len, geometry.head_dim
    qkvs = [
        torch.randn(batch_size, seq_len, 3, heads, head_dim, device=device).to(torch.bfloat16)
        for _ in range(3)
    ]
    reference = reference_attention(qkvs[0][:2])
    flops = 4.0 * batch_size * heads * seq_len * seq_len * head_dim
    for backward in (False, True):
        case = "forward_backward" if backward else "forward"
        fields: dict[str, Any] = {
            "dtype": "bf16",
            "shape": {"B": batch_size, "S": seq_len, "H": heads, "D": head_dim},
            "l2": "cold",
        }
        variants: dict[str, Variant] = {}
        errors: dict[str, float | None] = {}
        calls = [_dense_calls(qkv, backward) for qkv in qkvs]
        for name in calls[0]:
            with recorder.guarded("C attention", case, peer=name, **fields):
                if not backward:
                    out = calls[0][name]()
                    if name == "varlen":
                        out = out.unflatten(0, (batch_size, seq_len)).transpose(1, 2)
                    errors[name] = relative_error(out[:2], reference)
                variants[name] = graphed([c[name] for c in calls], device)
        for name, timing in measure(variants, device, samples=12, max_s=1.0).items():
            wrong = errors.get(name) or 0.0
            recorder.add(
                "C attention",
                case,
                peer=name,
                timing=timing,
                flops=flops * (3.5 if backward else 1.0),
                bytes_moved=2.0 * tokens * heads * head_dim * (12 if backward else 4),
                ceiling_of="bf16",
                rel_err=errors.get(name),
                error=None if wrong < 2e-2 else f"wrong: relative error {wrong:.2e}",
                notes=variants[name].notes,
                **fields,
            )


def measure_ragged(
    recorder: Recorder, device: str, geometry: Geometry, heads: int, batch_size: int, longest: int
) -> None:
    """Short texts: `varlen_attn` on real tokens against masked SDPA on padded ones."""
    lengths = short_text_lengths(batch_size, longest)
    head_dim, dtype = geometry.head_dim, torch.bfloat16
    total = sum(lengths)
    cu = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    flops = float(sum(4 * n * n * heads * head_dim for n in lengths))
    ragged = [torch.randn(total, 3, heads, head_dim, device=device).to(dtype) for _ in range(16)]
    calls: dict[str, list[Callable[[], torch.Tensor]]] = {
        "varlen": [partial(varlen_attention, x, cu, max(lengths)) for x in ragged]
    }
    shape = {"B": batch_size, "tokens": total, "H": heads, "D": head_dim}
    errors: dict[str, float] = {}
    for padded in (longest, max(lengths)):
        real = torch.arange(padded, device=device) < torch.tensor(lengths, device=device)[:, None]
        dense = []
        for x in ragged[:4]:
            wide = x.new_zeros(batch_size, padded, 3, heads, head_dim)
            wide[real] = x
            dense.append(wide)
        mask = real[:, None, None, :]
        reference = reference_attention(dense[0], mask).transpose(1, 2)[real]
        if padded == longest:
            errors["varlen"] = relative_error(calls["varlen"][0](), reference)
        for backend in ("cudnn", "efficient", "math", None):
            name = f"masked_{backend or 'default'}_S{padded}"
            with recorder.guarded("C attention", "ragged_forward", peer=name, shape=shape):
                # A mask of full size with expanded rows: what HF's mask builder hands to SDPA.
                full = mask.expand(batch_size, 1, padded, padded)
                list_ = [partial(attend, x, backend, full) for x in dense]
                errors[name] = relative_error(list_[0]().transpose(1, 2)[real], reference)
                calls[name] = list_
    variants: dict[str, Variant] = {}
    for name, list_ in calls.items():
        with recorder.guarded("C attention", "ragged_forward", peer=name, shape=shape):
            variants[name] = graphed(list_, device)
    for name, timing in measure(variants, device, samples=12, max_s=1.5).items():
        wrong = errors[name]
        recorder.add(
            "C attention",
            "ragged_forward",
            peer=name,
            dtype="bf16",
            shape=shape,
            timing=timing,
            flops=flops,
            bytes_moved=8.0 * total * heads * head_dim,
            ceiling_of="bf16",
            rel_err=wrong,
            error=None if wrong < 2e-2 else f"wrong: relative error {wrong:.2e}",
            notes=f"rates count real tokens only; {variants[name].notes}",
        )


def run(recorder: Recorder, device: str, *, budget_s: float, smoke: bool) -> None:
    """Section C within `budget_s` seconds."""
    deadline = Deadline(budget_s)
    heat_up(device)
    geometry = TINY if smoke else BASE
    lengths = (8, 16) if smoke else (128, 256, 512)
    tokens = 32 if smoke else 16384
    for seq_len in lengths:
        for width in (1.0, 0.5, 0.25):
            heads = geometry.heads(width)
            shape = {"S": seq_len, "H": heads}
            if deadline.left_s() < 0:
                recorder.add("C attention", "dense", error="shed: no time left", shape=shape)
                continue
            with recorder.guarded("C attention", "dense", shape=shape):
                measure_dense(recorder, device, geometry, heads, seq_len, tokens)
    with torch.inference_mode():
        for width in (1.0, 0.25):
            batch_size, longest = (4, 16) if smoke else (128, 128)
            heads = geometry.heads(width)
            with recorder.guarded("C attention", "ragged_forward", shape={"H": heads}):
                measure_ragged(recorder, device, geometry, heads, batch_size, longest)
