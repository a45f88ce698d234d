"""Checks of arguments that both ops share, made before any work."""

from __future__ import annotations

from operator import sub
from typing import NoReturn

import torch
from torch import Tensor

HIDDEN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def is_int(value: object) -> bool:
    """Whether `value` is an int, possibly a symbolic one, and not a bool."""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def check_hidden(who: str, hidden: Tensor, matrix: Tensor, hidden_size: int) -> None:
    """Check the tokens, and that the weights can multiply them.

    Args:
        who: Name of the op, for the message.
        hidden: The tokens.
        matrix: A weight matrix of the sublayer.
        hidden_size: Channels the weights expect.

    Raises:
        TypeError: `hidden` is not a floating-point tensor.
        ValueError: Shape, dtype or device do not fit.
    """
    if not isinstance(hidden, Tensor):
        raise TypeError(
            f"{who}: hidden={type(hidden).__name__}, expected a Tensor. Pass the tokens."
        )
    if hidden.dtype not in HIDDEN_DTYPES:
        raise TypeError(
            f"{who}: hidden.dtype={hidden.dtype}, expected float32, bfloat16, float16 or "
            "float64. Convert the tokens."
        )
    if hidden.dim() != 2 or hidden.shape[1] != hidden_size:
        raise ValueError(
            f"{who}: hidden.shape={list(hidden.shape)}, expected [total_tokens, {hidden_size}]. "
            "Remove padding with dynabert_kernels.varlen.unpad."
        )
    if hidden.device != matrix.device:
        raise ValueError(
            f"{who}: hidden.device={hidden.device}, expected {matrix.device}. "
            "Move tokens and weights to one device."
        )
    # Float32 master weights serve half-precision tokens; the op casts the prefix it reads.
    if hidden.dtype != matrix.dtype and not (
        torch.is_autocast_enabled(hidden.device.type)
        or (matrix.dtype == torch.float32 and hidden.dtype in (torch.bfloat16, torch.float16))
    ):
        raise ValueError(
            f"{who}: hidden.dtype={hidden.dtype} with weights of {matrix.dtype}, expected equal "
            "dtypes, or float32 weights for half-precision tokens. Convert one, or use "
            "torch.autocast."
        )


def check_ragged(who: str, hidden: Tensor, cu_seqlens: Tensor, max_seqlen: int | None) -> None:
    """Check ragged offsets; their values only where they are on the CPU, which costs no wait.

    Raises:
        TypeError: `cu_seqlens` is not an int32 tensor, or `max_seqlen` no int.
        ValueError: Shape, device or values do not fit.
    """
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32:
        kind = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(
            f"{who}: cu_seqlens={kind}, expected an int32 tensor. Use "
            "dynabert_kernels.varlen.offsets_of."
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"{who}: cu_seqlens.shape={list(cu_seqlens.shape)}, expected [batch_size + 1]. "
            "It starts with 0 and ends with the number of tokens."
        )
    if cu_seqlens.device != hidden.device:
        raise ValueError(
            f"{who}: cu_seqlens.device={cu_seqlens.device}, expected {hidden.device}. "
            "Move it to the device of the tokens."
        )
    if max_seqlen is not None:
        if not is_int(max_seqlen):
            raise TypeError(
                f"{who}: max_seqlen={max_seqlen!r}, expected an int. Pass the longest length."
            )
        if max_seqlen < 0:
            raise ValueError(
                f"{who}: max_seqlen={max_seqlen}, expected at least 0. Pass the longest length."
            )
    if cu_seqlens.is_cpu and not torch.compiler.is_compiling():
        _check_offsets(who, cu_seqlens.tolist(), hidden.shape[0], max_seqlen)


def _check_offsets(who: str, offsets: list[int], total_tokens: int, max_seqlen: int | None) -> None:
    if offsets[0] != 0 or offsets[-1] != total_tokens:
        raise ValueError(
            f"{who}: cu_seqlens runs from {offsets[0]} to {offsets[-1]}, expected 0 to "
            f"{total_tokens}, the number of tokens. Make both from one batch."
        )
    lengths = list(map(sub, offsets[1:], offsets))
    if min(lengths, default=0) < 0:
        index = next(index for index, length in enumerate(lengths) if length < 0)
        raise ValueError(
            f"{who}: cu_seqlens[{index + 1}]={offsets[index + 1]}, expected at least "
            f"{offsets[index]}. Offsets never fall."
        )
    longest = max(lengths, default=0)
    if max_seqlen is not None and longest > max_seqlen:
        raise ValueError(
            f"{who}: max_seqlen={max_seqlen}, expected at least {longest}. "
            "A sequence of the batch is that long."
        )


def resolve_width(
    who: str,
    name: str,
    width: int | Tensor,
    cu_seqlens: Tensor | None,
    limit: int,
    what: str,
) -> tuple[int, Tensor | None]:
    """Check the width or widths of a call; values only where they are on the host.

    Args:
        who: Name of the op, for the message.
        name: Name of the argument.
        width: An int, or an int32 tensor with one value for the batch or one per sequence.
        cu_seqlens: Ragged offsets, needed beside a tensor.
        limit: What the weights hold.
        what: Heads or neurons.

    Returns:
        The widest width, or `limit` where it is not known here, and the tensor; None for the tensor
        where the first value says all.

    Raises:
        TypeError: It is neither an int nor an int32 tensor.
        ValueError: Shape, device or values do not fit, or `cu_seqlens` is missing.
    """
    if not isinstance(width, Tensor):
        _check_width(who, name, width, limit, what)
        return width, None
    batch_size = _check_width_tensor(who, name, width, cu_seqlens)
    if not width.is_cpu:
        return limit, width
    if torch.compiler.is_compiling():
        return limit, width.expand(batch_size).contiguous()
    values = width.tolist()
    check_width_values(who, name, values, limit, what)
    widest = max(values, default=limit)
    return widest, (None if len(values) == 1 else width)


def _check_width(who: str, name: str, width: int, limit: int, what: str) -> None:
    if not is_int(width):
        raise TypeError(
            f"{who}: {name}={width!r}, expected an int, or an int32 tensor with one value for the "
            f"batch or one per sequence. Resolve fractions to a whole number of {what} first."
        )
    if width < 1 or width > limit:
        raise ValueError(
            f"{who}: {name}={width}, expected 1 to {limit}. The weights hold {limit} {what}."
        )


def _check_width_tensor(who: str, name: str, widths: Tensor, cu_seqlens: Tensor | None) -> int:
    if widths.dtype != torch.int32:
        raise TypeError(
            f"{who}: {name}.dtype={widths.dtype}, expected int32. Pass one width for the batch or "
            "one per sequence."
        )
    if cu_seqlens is None:
        raise ValueError(
            f"{who}: cu_seqlens=None, expected offsets beside {name} as a tensor. "
            "Pass the offsets the batch was packed with."
        )
    batch_size = cu_seqlens.shape[0] - 1
    if widths.dim() != 1 or widths.shape[0] not in (1, batch_size):
        raise ValueError(
            f"{who}: {name}.shape={list(widths.shape)}, expected [{batch_size}] or [1]. "
            "Pass one width per sequence, or one for the batch."
        )
    if not widths.is_cpu and widths.device != cu_seqlens.device:
        raise ValueError(
            f"{who}: {name}.device={widths.device}, expected cpu or {cu_seqlens.device}. "
            "Move it to the device of the tokens."
        )
    return batch_size


def check_not_compiling(who: str, name: str) -> None:
    """Refuse widths in a tensor while tracing: the reference needs their values.

    Without ``fullgraph`` Dynamo answers by running the calling function eagerly.

    Raises:
        NotImplementedError: A tracer is running.
    """
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            f"{who}: {name} is a tensor inside torch.compile or torch.export, expected an int. "
            "The reference groups sequences by width on the host; pass an int, or do not trace."
        )


def refuse_gradients(who: str, quantization: str) -> NoReturn:
    """Refuse a call whose integers have no gradients.

    Raises:
        NotImplementedError: Always.
    """
    raise NotImplementedError(
        f"{who}: gradients are needed and the weights have quantization={quantization!r}, expected "
        "None. Call it under torch.no_grad(), or dequantise with model.quantize(None)."
    )


def check_width_values(who: str, name: str, widths: list[int], limit: int, what: str) -> None:
    """Check widths read back from a tensor.

    Raises:
        ValueError: One is not from 1 to `limit`.
    """
    for index, width in enumerate(widths):
        if not 1 <= width <= limit:
            raise ValueError(
                f"{who}: {name}[{index}]={width}, expected 1 to {limit}. "
                f"The weights hold {limit} {what}."
            )


def check_dropout(who: str, name: str, dropout_p: float, seed: int | None) -> None:
    """Check a dropout probability and the seed beside it.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is out of range.
    """
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (float, int, torch.SymFloat)):
        raise TypeError(f"{who}: {name}={dropout_p!r}, expected a float. Pass 0.0 for no dropout.")
    if not 0 <= dropout_p < 1:
        raise ValueError(
            f"{who}: {name}={dropout_p}, expected 0 <= {name} < 1. Pass 0.0 for no dropout."
        )
    if seed is None:
        return
    if not is_int(seed):
        raise TypeError(
            f"{who}: seed={seed!r}, expected an int or None. None uses torch's generator."
        )
    if seed < 0 or seed >= 2**63:
        raise ValueError(
            f"{who}: seed={seed}, expected 0 <= seed < 2**63. None uses torch's generator."
        )
