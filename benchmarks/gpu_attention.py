"""Section C: attention forward and forward plus backward, dense and ragged: SDPA, varlen, ours.

Query, key and value are views of one merged projection ``[B, S, 3, H, D]``, as a merged-QKV
encoder hands them over, so a backend that needs another layout pays for its copies here too;
the backward pass ends in the gradient of that merged tensor. Ours takes the projection as its own
packing lays it out, ``[T, H, 3, D]``, through the launchers, which are imported where they run:
without a GPU the peers' side is tested, and Triton may be missing.
Letters: see `benchmarks.geometry`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
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


def our_attention(
    qkv: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, heads: int | torch.Tensor
) -> torch.Tensor:
    """The Triton backend's attention, ``[T, H, 3, D]`` to ``[T, H, D]``; heads int32 ``[1]`` on the
    device where only it knows the width."""
    from dynabert_kernels.triton.launch_attention import attention_core

    out = attention_core(qkv, cu_seqlens, max_seqlen, num_heads=heads)
    assert isinstance(out, torch.Tensor)
    return out


def _our_both(
    qkv: torch.Tensor, gradient: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int
) -> torch.Tensor:
    from dynabert_kernels.triton.launch_attention import attention_core, attention_core_gradient

    heads = qkv.shape[1]
    out, log_sum = attention_core(qkv, cu_seqlens, max_seqlen, num_heads=heads, keep_log_sum=True)
    return attention_core_gradient(
        gradient, qkv, out, log_sum, cu_seqlens, max_seqlen, num_heads=heads
    )


@dataclass
class _Call:
    """One competitor on one input: what is timed, and its result in the reference's layout."""

    run: Callable[[], torch.Tensor]
    restored: Callable[[torch.Tensor], torch.Tensor]


def _dense_calls(
    qkv: torch.Tensor, gradient: torch.Tensor, backward: bool, with_ours: bool
) -> dict[str, _Call]:
    """Forward: ``[B, H, S, D]``; with `backward` the gradient of `qkv`, ``[B, S, 3, H, D]``."""
    batch_size, seq_len = qkv.shape[:2]
    offsets = torch.arange(batch_size + 1, device=qkv.device, dtype=torch.int32) * seq_len

    def ragged(x: torch.Tensor) -> torch.Tensor:
        out = varlen_attention(x.flatten(0, 1), offsets, seq_len)
        return out.unflatten(0, (batch_size, seq_len)).transpose(1, 2)

    forwards: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        name: partial(attend, backend=name) for name in BACKENDS
    }
    forwards["default"] = partial(attend, backend=None)
    forwards["varlen"] = ragged

    def both(forward: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        leaf = qkv.detach().requires_grad_()
        (result,) = torch.autograd.grad(forward(leaf), leaf, gradient)
        return result

    calls = {
        name: _Call(partial(both, f) if backward else partial(f, qkv), lambda out: out)
        for name, f in forwards.items()
    }
    if with_ours:
        packed = qkv.permute(0, 1, 3, 2, 4).flatten(0, 1).contiguous()  # [T, H, 3, D]
        given = gradient.transpose(1, 2).flatten(0, 1).contiguous()
        sizes = (batch_size, seq_len)
        if backward:
            calls["ours"] = _Call(
                partial(_our_both, packed, given, offsets, seq_len),
                lambda out: out.unflatten(0, sizes).transpose(2, 3),
            )
        else:
            heads = qkv.shape[3]
            on_device = torch.tensor([heads], dtype=torch.int32, device=qkv.device)
            widths: dict[str, int | torch.Tensor] = {"ours": heads, "ours device width": on_device}
            for name, width in widths.items():
                calls[name] = _Call(
                    partial(our_attention, packed, offsets, seq_len, width),
                    lambda out: out.unflatten(0, sizes).transpose(1, 2),
                )
    return calls


def _reference(qkv: torch.Tensor, gradient: torch.Tensor, backward: bool) -> torch.Tensor:
    if not backward:
        return reference_attention(qkv)
    leaf = qkv.float().requires_grad_()
    (result,) = torch.autograd.grad(reference_attention(leaf), leaf, gradient.float())
    return result


def measure_dense(
    recorder: Recorder,
    device: str,
    geometry: Geometry,
    heads: int,
    seq_len: int,
    tokens: int,
    *,
    with_ours: bool = False,
) -> None:
    """All backends at one shape, forward and forward plus backward."""
    batch_size, head_dim = tokens // seq_len, geometry.head_dim
    sets = [
        (
            torch.randn(batch_size, seq_len, 3, heads, head_dim, device=device).to(torch.bfloat16),
            torch.randn(batch_size, heads, seq_len, head_dim, device=device).to(torch.bfloat16),
        )
        for _ in range(3)
    ]
    flops = 4.0 * batch_size * heads * seq_len * seq_len * head_dim
    for backward in (False, True):
        case = "forward_backward" if backward else "forward"
        reference = _reference(sets[0][0][:2], sets[0][1][:2], backward)
        fields: dict[str, Any] = {
            "dtype": "bf16",
            "shape": {"B": batch_size, "S": seq_len, "H": heads, "D": head_dim},
            "l2": "cold",
        }
        variants: dict[str, Variant] = {}
        errors: dict[str, float] = {}
        rotation = [_dense_calls(*operands, backward, with_ours) for operands in sets]
        for name, first in rotation[0].items():
            with recorder.guarded("C attention", case, peer=name, **fields):
                errors[name] = relative_error(first.restored(first.run())[:2], reference)
                if not errors[name] < 2e-2:
                    raise ValueError(f"wrong: relative error {errors[name]:.2e}")
                variants[name] = graphed([calls[name].run for calls in rotation], device)
        for name, timing in measure(variants, device, samples=12, max_s=1.0).items():
            recorder.add(
                "C attention",
                case,
                peer=name,
                timing=timing,
                flops=flops * (3.5 if backward else 1.0),
                bytes_moved=2.0 * tokens * heads * head_dim * (12 if backward else 4),
                ceiling_of="bf16",
                rel_err=errors[name],
                notes=variants[name].notes,
                **fields,
            )


def measure_ragged(
    recorder: Recorder,
    device: str,
    geometry: Geometry,
    heads: int,
    batch_size: int,
    longest: int,
    *,
    with_ours: bool = False,
) -> None:
    """Short texts: `varlen_attn` and ours on real tokens, masked SDPA on padded ones."""
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
            if with_ours:
                with recorder.guarded("C attention", "ragged_forward", peer="ours", shape=shape):
                    calls["ours"] = [
                        partial(
                            our_attention, x.transpose(1, 2).contiguous(), cu, max(lengths), heads
                        )
                        for x in ragged
                    ]
                    errors["ours"] = relative_error(calls["ours"][0](), reference)
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
        if name not in errors:
            continue
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


def run(
    recorder: Recorder, device: str, *, budget_s: float, smoke: bool, with_ours: bool = True
) -> None:
    """Section C within `budget_s` seconds."""
    deadline = Deadline(budget_s)
    with_ours = with_ours and device == "cuda"
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
                measure_dense(
                    recorder, device, geometry, heads, seq_len, tokens, with_ours=with_ours
                )
    with torch.inference_mode():
        for width in (1.0, 0.25):
            batch_size, longest = (4, 16) if smoke else (128, 128)
            heads = geometry.heads(width)
            with recorder.guarded("C attention", "ragged_forward", shape={"H": heads}):
                measure_ragged(
                    recorder, device, geometry, heads, batch_size, longest, with_ours=with_ours
                )
