"""Typed launchers: they choose a configuration, allocate, and start kernels on the current stream.

Nothing here waits for the device, so every launch can be captured in a CUDA graph.
"""

import functools
import math

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dynabert_kernels.triton import configs
from dynabert_kernels.triton.attention_kernel import attention_forward_kernel
from dynabert_kernels.triton.configs import AttentionConfig, Form, LinearConfig
from dynabert_kernels.triton.gemm import linear_descriptor_forward_kernel, linear_forward_kernel
from dynabert_kernels.triton.norm import residual_norm_forward_kernel


def with_contiguous_rows(hidden: Tensor) -> Tensor:
    """`hidden` itself where only its rows are apart, else a copy."""
    return hidden if hidden.stride(1) == 1 else hidden.contiguous()


@functools.cache
def _card(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


def card(device: torch.device) -> tuple[int, int]:
    """Compute capability (90 for sm_90) and number of multiprocessors; stand-ins for a CPU."""
    if device.type != "cuda":
        return 80, 108
    return _card(torch.cuda.current_device() if device.index is None else device.index)


def input_precision(dtype: torch.dtype) -> str:
    """How float32 products are computed; as exactly as PyTorch's own on a card."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "tf32x3"
    return "tf32"


def _is_aligned(matrix: Tensor) -> bool:
    """Whether base and rows start at multiples of what Triton specialises on."""
    return matrix.data_ptr() % 16 == 0 and matrix.stride(0) % 16 == 0


def _choose_linear(
    form: Form, x: Tensor, weight: Tensor, residual: Tensor | None, outputs: int
) -> LinearConfig:
    capability, num_sms = card(x.device)
    matrices = (x, weight) if residual is None else (x, weight, residual)
    inputs = x.shape[1]
    return configs.linear_config(
        form,
        tokens=x.shape[0],
        outputs=outputs,
        inputs=inputs,
        dtype=x.dtype,
        capability=capability,
        num_sms=num_sms,
        aligned=outputs % 16 == inputs % 16 == 0 and all(map(_is_aligned, matrices)),
    )


def linear(
    form: Form,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    config: LinearConfig | None = None,
) -> Tensor:
    """One matrix product with its epilogue; see `gemm`.

    Args:
        form: ``rows`` (``weight [N, K]``) or ``columns`` (``weight [K, N]``).
        x: ``[T, K]``, rows any distance apart.
        weight: The prefix, contiguous.
        bias: ``[N]``, contiguous.
        activation: ``none``, ``gelu``, ``gelu_tanh`` or ``relu``.
        residual: ``[T, N]``, rows any distance apart; added last.
        config: Overrides the table.

    Returns:
        ``[T, N]`` in x's dtype; with ``config.split_k > 1`` float32 partial sums
        ``[split_k, T, N]`` without bias, activation and residual.
    """
    tokens, inputs = x.shape
    columns = form == "columns"
    outputs = weight.shape[1] if columns else weight.shape[0]
    assert weight.shape[0 if columns else 1] == inputs and weight.is_contiguous()
    if config is None:
        config = _choose_linear(form, x, weight, residual, outputs)
    if config.split_k > 1:
        out = torch.empty(config.split_k, tokens, outputs, dtype=torch.float32, device=x.device)
        residual = None
    else:
        out = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device)
    if tokens == 0:
        return out
    num_tiles = triton.cdiv(tokens, config.block_m) * triton.cdiv(outputs, config.block_n)
    constants = {
        "W_IS_KN": columns,
        "ACTIVATION": activation,
        "HAS_RESIDUAL": residual is not None,
        "INPUT_PRECISION": input_precision(x.dtype),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    if config.descriptors:
        w_tile = [config.block_k, config.block_n] if columns else [config.block_n, config.block_k]
        out_tile = [config.block_m, config.block_n]
        linear_descriptor_forward_kernel[(num_tiles,)](
            TensorDescriptor.from_tensor(x, [config.block_m, config.block_k]),
            TensorDescriptor.from_tensor(weight, w_tile),
            bias,
            None if residual is None else TensorDescriptor.from_tensor(residual, out_tile),
            TensorDescriptor.from_tensor(out, out_tile),
            tokens,
            outputs,
            inputs,
            **constants,
        )
        return out
    linear_forward_kernel[(num_tiles, config.split_k)](
        x,
        weight,
        bias,
        residual,
        out,
        tokens,
        outputs,
        inputs,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        EVEN_K=inputs % config.block_k == 0,
        EVEN_N=outputs % config.block_n == 0,
        SPLIT_K=config.split_k,
        **constants,
    )
    return out


def residual_norm(
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> Tensor:
    """LayerNorm of a row, ``[T, C]`` in residual's dtype.

    Args:
        x: ``[T, C]`` with bias and residual added, or partial sums ``[parts, T, C]`` without.
        bias: ``[C]``, contiguous; likewise `norm_weight` and `norm_bias`.
        residual: ``[T, C]``, rows any distance apart.
        norm_weight: See `bias`.
        norm_bias: See `bias`.
        eps: Added to the variance.
    """
    tokens, hidden_size = residual.shape
    out = torch.empty(tokens, hidden_size, dtype=residual.dtype, device=residual.device)
    if tokens == 0:
        return out
    residual_norm_forward_kernel[(tokens,)](
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
        BLOCK_C=triton.next_power_of_2(hidden_size),
        num_warps=4,
    )
    return out


def attention_core(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, config: AttentionConfig | None = None
) -> Tensor:
    """Softmax attention of every head, ``[T, H, D]``.

    Args:
        qkv: ``[T, H, 3, D]``, contiguous.
        cu_seqlens: ``[batch_size + 1]``, int32, contiguous.
        max_seqlen: No sequence is longer.
        config: Overrides the table.
    """
    tokens, num_heads, _, head_dim = qkv.shape
    out = torch.empty(tokens, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    batch_size = cu_seqlens.numel() - 1
    if tokens == 0 or max_seqlen == 0:
        return out
    if config is None:
        config = configs.attention_config(max_seqlen=max_seqlen, head_dim=head_dim, dtype=qkv.dtype)
    num_query_blocks = triton.cdiv(max_seqlen, config.block_queries)
    attention_forward_kernel[(batch_size * num_query_blocks * num_heads,)](
        qkv,
        out,
        cu_seqlens,
        math.log2(math.e) / math.sqrt(head_dim),
        num_heads,
        num_query_blocks,
        D=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_QUERIES=config.block_queries,
        BLOCK_KEYS=config.block_keys,
        SINGLE_TILE=max_seqlen <= config.block_keys,
        INPUT_PRECISION=input_precision(qkv.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out
