"""Typed launchers: they choose a configuration, allocate, and start kernels on the current stream.

Nothing here waits for the device, so every launch can be captured in a CUDA graph.
"""

import functools
import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dynabert_kernels.triton import configs
from dynabert_kernels.triton.attention_kernel import attention_forward_kernel
from dynabert_kernels.triton.configs import AttentionConfig, Form, LinearConfig, NormConfig
from dynabert_kernels.triton.gemm import (
    WIDTH_GROUP,
    linear_descriptor_forward_kernel,
    linear_forward_kernel,
)
from dynabert_kernels.triton.norm import residual_norm_forward_kernel
from dynabert_kernels.triton.width import token_width_kernel


@dataclass(frozen=True)
class Width:
    """A prefix known on the host (`limit` alone) or read on the device.

    Attributes:
        mode: 0 host, 1 one device value, 2 one device value per sequence.
        limit: Heads or neurons of the buffers: the width itself in mode 0, else the most there is.
        values: int32 ``[1]`` or ``[batch_size]``.
        rows: int32 ``[total_tokens]``, the width of each token, in mode 2.
        groups: int32, the largest width of every `WIDTH_GROUP` tokens, in mode 2;
            `values` in mode 1.
    """

    mode: int
    limit: int
    values: Tensor | None = None
    rows: Tensor | None = None
    groups: Tensor | None = None


def resolve_width(
    width: int,
    each: Tensor | None,
    cu_seqlens: Tensor | None,
    total_tokens: int,
    device: torch.device,
) -> Width:
    """Turn an op's width arguments into what the kernels read.

    Args:
        width: Heads or neurons of the buffers: the width itself, or the most that `each` may say.
        each: One width per sequence, ``[batch_size]``, or one for all, ``[1]``; int32.
        cu_seqlens: int32 ``[batch_size + 1]``; needed with one width per sequence.
        total_tokens: T.
        device: Where the kernels run; `each` is copied there if it is on the CPU.
    """
    if each is None:
        return Width(0, width)
    values = each.to(device).contiguous()
    if values.numel() == 1:
        return Width(1, width, values, None, values)
    assert cu_seqlens is not None, "a width per sequence needs cu_seqlens"
    rows = torch.empty(total_tokens, dtype=torch.int32, device=device)
    num_groups = triton.cdiv(total_tokens, WIDTH_GROUP)
    groups = torch.empty(num_groups, dtype=torch.int32, device=device)
    if total_tokens > 0:
        token_width_kernel[(num_groups,)](
            values, cu_seqlens, rows, groups, total_tokens, values.numel(), GROUP=WIDTH_GROUP
        )
    return Width(2, width, values, rows, groups)


def with_contiguous_rows(hidden: Tensor) -> Tensor:
    """`hidden` itself where only its rows are apart, else a copy."""
    return hidden if hidden.stride(1) == 1 else hidden.contiguous()


@functools.cache
def _card(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


def card(device: torch.device) -> tuple[int, int]:
    """Compute capability (90 for sm_90) and number of multiprocessors."""
    if device.type != "cuda":
        return 80, 4
    return _card(torch.cuda.current_device() if device.index is None else device.index)


def input_precision(dtype: torch.dtype) -> str:
    """How float32 products are computed; follows ``torch.set_float32_matmul_precision``."""
    if dtype != torch.float32 or torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "tf32x3"


def _can_describe(*tensors: Tensor | None) -> bool:
    """Whether the copy engine can address these matrices: 16-byte aligned bases and rows."""
    return all(
        t is None
        or (
            t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 and t.stride(1) == 1
        )
        for t in tensors
    )


def choose_linear(
    form: Form, x: Tensor, weight: Tensor, residual: Tensor | None, width: Width
) -> LinearConfig:
    """The configuration that `linear` takes when given none."""
    capability, num_sms = card(x.device)
    return configs.linear_config(
        form,
        tokens=x.shape[0],
        outputs=weight.shape[0 if form == "rows" else 1],
        inputs=x.shape[1],
        dtype=x.dtype,
        capability=capability,
        num_sms=num_sms,
        descriptors=width.mode == 0 and capability >= 90 and _can_describe(x, weight, residual),
    )


def linear(
    form: Form,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    width: Width,
    *,
    width_unit: int = 1,
    activation: str = "none",
    residual: Tensor | None = None,
    config: LinearConfig | None = None,
) -> Tensor:
    """One matrix product with its epilogue; see `gemm`.

    Args:
        form: ``rows`` (``weight [N, K]``) or ``columns`` (``weight [K, N]``).
        x: ``[T, K]``, rows any distance apart.
        weight: The prefix in width mode 0, else the whole weight; rows contiguous.
        bias: ``[N]``.
        width: Which rows of the weight each token uses.
        width_unit: Rows of the weight per unit of the width.
        activation: ``none``, ``gelu``, ``gelu_tanh`` or ``relu``.
        residual: ``[T, N]``, added last.
        config: Overrides the table.

    Returns:
        ``[T, N]`` in x's dtype; with ``config.split_k > 1`` float32 partial sums
        ``[split_k, T, N]`` without bias, activation and residual.
    """
    if config is None:
        config = choose_linear(form, x, weight, residual, width)
    tokens, inputs = x.shape
    columns = form == "columns"
    outputs = weight.shape[1] if columns else weight.shape[0]
    assert weight.shape[0 if columns else 1] == inputs
    if config.split_k > 1:
        assert activation == "none"
        out = torch.empty(config.split_k, tokens, outputs, dtype=torch.float32, device=x.device)
        residual = None
    else:
        out = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device)
    if tokens == 0:
        return out
    num_tiles = triton.cdiv(tokens, config.block_m) * triton.cdiv(outputs, config.block_n)
    exact = x.dtype == torch.float32
    if config.descriptors:
        x_tile = [config.block_m, config.block_k]
        w_tile = [config.block_k, config.block_n] if columns else [config.block_n, config.block_k]
        out_tile = [config.block_m, config.block_n // config.subtiles]
        programs = config.programs_per_sm * card(x.device)[1]
        linear_descriptor_forward_kernel[(min(programs, num_tiles) or num_tiles,)](
            TensorDescriptor.from_tensor(x, x_tile),
            TensorDescriptor.from_tensor(weight, w_tile),
            bias,
            None if residual is None else TensorDescriptor.from_tensor(residual, out_tile),
            TensorDescriptor.from_tensor(out, out_tile),
            tokens,
            outputs,
            inputs,
            W_IS_KN=columns,
            ACTIVATION=activation,
            HAS_RESIDUAL=residual is not None,
            INPUT_PRECISION=input_precision(x.dtype),
            EXACT=exact,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_M=config.group_m,
            SUBTILES=config.subtiles,
            NUM_PROGRAMS=programs,
            FLATTEN=config.flatten,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        return out
    if width.mode == 2:
        assert WIDTH_GROUP % config.block_m == 0
    even_k = inputs % (config.block_k * config.split_k) == 0 and not (columns and width.mode != 0)
    linear_forward_kernel[(num_tiles, config.split_k)](
        x,
        weight,
        bias,
        residual,
        out,
        width.groups,
        width.rows,
        tokens,
        outputs,
        inputs,
        x.stride(0),
        weight.stride(0),
        0 if residual is None else residual.stride(0),
        outputs,
        width_unit,
        W_IS_KN=columns,
        ACTIVATION=activation,
        HAS_RESIDUAL=residual is not None,
        WIDTH_MODE=width.mode,
        EVEN_K=even_k,
        EVEN_N=outputs % config.block_n == 0,
        SPLIT_K=config.split_k,
        INPUT_PRECISION=input_precision(x.dtype),
        EXACT=exact,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


def residual_norm(
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    *,
    config: NormConfig | None = None,
) -> Tensor:
    """LayerNorm of a row, ``[T, C]`` in residual's dtype.

    Args:
        x: ``[T, C]`` with bias and residual added, or partial sums ``[parts, T, C]`` without.
        bias: ``[C]``.
        residual: ``[T, C]``.
        norm_weight: ``[C]``.
        norm_bias: ``[C]``.
        eps: Added to the variance.
        config: Overrides the table.
    """
    tokens, hidden_size = residual.shape
    out = torch.empty(tokens, hidden_size, dtype=residual.dtype, device=residual.device)
    if tokens == 0:
        return out
    if config is None:
        config = configs.norm_config(tokens=tokens, hidden_size=hidden_size)
    residual_norm_forward_kernel[(triton.cdiv(tokens, config.rows),)](
        x,
        bias,
        residual,
        norm_weight,
        norm_bias,
        out,
        tokens,
        hidden_size,
        residual.stride(0),
        eps,
        NUM_PARTS=x.shape[0] if x.dim() == 3 else 1,
        HAS_RESIDUAL=x.dim() == 3,
        ROWS=config.rows,
        BLOCK_C=triton.next_power_of_2(hidden_size),
        num_warps=config.num_warps,
    )
    return out


def attention_core(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    width: Width,
    *,
    config: AttentionConfig | None = None,
) -> Tensor:
    """Softmax attention of every head, ``[T, H, D]``.

    Args:
        qkv: ``[T, H, 3, D]``, contiguous.
        cu_seqlens: int32 ``[batch_size + 1]``.
        max_seqlen: No sequence is longer.
        width: Heads; see `attention_kernel`.
        config: Overrides the table.
    """
    tokens, num_heads, _, head_dim = qkv.shape
    out = torch.empty(tokens, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    batch_size = cu_seqlens.numel() - 1
    if tokens == 0 or batch_size == 0 or max_seqlen == 0:
        return out
    if config is None:
        config = configs.attention_config(max_seqlen=max_seqlen, head_dim=head_dim, dtype=qkv.dtype)
    num_query_blocks = triton.cdiv(max_seqlen, config.block_queries)
    attention_forward_kernel[(batch_size * num_query_blocks * num_heads,)](
        qkv,
        out,
        cu_seqlens,
        width.values,
        math.log2(math.e) / math.sqrt(head_dim),
        num_heads,
        num_query_blocks,
        num_heads * 3 * head_dim,
        num_heads * head_dim,
        D=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_QUERIES=config.block_queries,
        BLOCK_KEYS=config.block_keys,
        SINGLE_TILE=max_seqlen <= config.block_keys,
        WIDTH_MODE=width.mode,
        INPUT_PRECISION=input_precision(qkv.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out
