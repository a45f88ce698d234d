"""What both sublayers on the CUDA C++ kernels share: whether they can run, and what they are given.

The kernels read tensors by address: rows a multiple of 8 elements apart, everything at a multiple
of 16 bytes, weights and biases in the dtype of the products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dynabert_kernels import _cuda_extension
from dynabert_kernels._cuda_extension import DEVICE, DTYPES, EMULATED
from dynabert_kernels.triton.shared_tiles import shared

__all__ = ["DEVICE", "EMULATED"]

MAX_HIDDEN_SIZE = 8192
ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = {"gelu": 1, "gelu_tanh": 2, "relu": 3}
_ALIGNMENT = 16  # bytes
# Hopper's products have tiles of 128 x 192: with fewer tokens, those with 768 outputs have less
# than one for each of 132 multiprocessors.
_FEWEST_TOKENS = 4096

# Constants of the process: Dynamo traces the functions that read them.
_MISSING = _cuda_extension.cuda_error()
_INFO = _cuda_extension.build_info()
_COVERED = frozenset() if _INFO is None else _cuda_extension.covered_capabilities(_INFO)
_BUILT_FOR = "" if _INFO is None else ", ".join(f"sm_{a}" for a in _INFO["architectures"])

_zeros: dict[tuple[object, ...], int] = {}


def cuda_missing() -> str | None:
    """Why no CUDA C++ kernel can run in this process, or None."""
    return _MISSING


def scope(hidden: Tensor, *, dropout: bool) -> str | None:
    """Why a call is none that the kernels are made for, or None.

    Args:
        hidden: Tokens, ``[total_tokens, hidden_size]``.
        dropout: Whether the call asks for dropout.
    """
    if hidden.dtype == torch.float64:
        return "hidden is torch.float64, expected bfloat16, float16 or float32"
    if dropout:
        return "dropout is not part of this backend"
    return None


def why_not(
    hidden: Tensor,
    matrices: tuple[Tensor, ...],
    vectors: tuple[Tensor, ...],
    *,
    compute: torch.dtype,
    quantization: str | None,
) -> str | None:
    """The reasons both ops share why the kernels cannot run a call, or None.

    Args:
        hidden: Tokens, ``[total_tokens, hidden_size]``.
        matrices: The weight matrices.
        vectors: Biases, then weight and bias of the norm.
        compute: Dtype of the matrix products.
        quantization: The weights' own.
    """
    if quantization is not None:
        return f"the weights have quantization={quantization!r}, which is not implemented"
    if hidden.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(hidden.device)
        if major < 8:
            return f"the card is sm_{major}{minor}, expected sm_80 or newer"
        if (major, minor) not in _COVERED:
            return f"the card is sm_{major}{minor}, and the kernels were built for {_BUILT_FOR}"
    if compute not in DTYPES:
        return f"it would compute in {compute}, expected bfloat16 or float16"
    for what, tensor in (("hidden is", hidden), ("the weights are", matrices[0])):
        if tensor.dtype not in ELEMENT_TYPES:
            return f"{what} {tensor.dtype}, expected bfloat16, float16 or float32"
    hidden_size = hidden.shape[1]
    if hidden_size % 8 != 0 or hidden_size > MAX_HIDDEN_SIZE:
        return f"hidden_size={hidden_size}, expected a multiple of 8 up to {MAX_HIDDEN_SIZE}"
    if not all(matrix.is_contiguous() for matrix in matrices):
        return "a weight matrix is not contiguous"
    if torch.compiler.is_compiling():
        return None  # addresses are not known; what is not aligned is copied
    for tensor in (*matrices, *vectors):
        if tensor.storage_offset() * tensor.element_size() % _ALIGNMENT != 0:
            return f"a weight does not start at a multiple of {_ALIGNMENT} bytes of its storage"
    return None


def yields(hidden: Tensor, compute: str, each: Tensor | None) -> str | None:
    """Why the Triton kernels are the better choice where both can run a call, or None.

    Args:
        hidden: Tokens, ``[total_tokens, hidden_size]``.
        compute: Dtype of the matrix products, by name.
        each: The call's heads or neurons, where they are a tensor.
    """
    if compute != "bfloat16" or not _is_hopper(hidden):
        return "only bfloat16 on sm_90 has been timed beside the Triton kernels"
    if hidden.shape[0] < _FEWEST_TOKENS:
        return f"fewer than {_FEWEST_TOKENS} tokens leave multiprocessors without a tile"
    if each is not None and each.numel() > 1:
        return "a batch of several widths runs on the kernels for sm_80"
    return None


def precedes(hidden: Tensor, compute: str) -> bool:
    """Whether the automatic choice asks these kernels before Triton's; they may still refuse."""
    return _is_here(hidden) and yields(hidden, compute, None) is None


def encoder_precedes(hidden: Tensor) -> bool:
    """The same for all layers in one launch, in bfloat16."""
    return _is_here(hidden) and _is_hopper(hidden)


def _is_here(hidden: Tensor) -> bool:
    return _MISSING is None and _cuda_extension.OPT_IN is None and hidden.device.type == DEVICE


def _is_hopper(hidden: Tensor) -> bool:
    return torch.cuda.get_device_capability(hidden.device) == (9, 0)


class Width(NamedTuple):
    """How wide the sequences of a call are, as the launchers take it.

    Attributes:
        limit: Heads or neurons that buffers have room for, and no sequence exceeds.
        each: Width of each sequence or of all, on the device; None where `limit` is that of all.
    """

    limit: int
    each: Tensor | None

    @classmethod
    def of(cls, limit: int, each: Tensor | None, device: torch.device) -> Width:
        """The width of a call on `device`."""
        if each is not None:
            # From pageable memory this still copies before it returns, and waits for no kernel.
            each = each.to(device, non_blocking=True).contiguous()
        return cls(limit, each)

    @property
    def num_each(self) -> int:
        return 0 if self.each is None else self.each.numel()


def aligned_rows(hidden: Tensor) -> Tensor:
    """`hidden` itself where rows and base are aligned and no two rows overlap, else a copy."""
    row_bytes = hidden.stride(0) * hidden.element_size()
    if (
        hidden.stride(1) == 1
        and row_bytes % _ALIGNMENT == 0
        and hidden.stride(0) >= hidden.shape[1]
        and hidden.data_ptr() % _ALIGNMENT == 0
    ):
        return hidden
    return hidden.clone(memory_format=torch.contiguous_format)


def operand(weight: Tensor, dtype: torch.dtype, width: int | None = None) -> Tensor:
    """A weight or bias as the kernels read it: itself, or a copy in the dtype of the products.

    Args:
        weight: The whole tensor.
        dtype: Of the products.
        width: Heads or neurons that will be read at most, to copy no more; None for all.
    """
    if weight.dtype == dtype:
        return contiguous(weight)
    return contiguous((weight if width is None else weight[:width]).to(dtype))


def norm_vectors(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of a norm in one dtype, their own where they agree and kernels read it."""
    if weight.dtype != bias.dtype or weight.dtype not in ELEMENT_TYPES:
        weight, bias = weight.float(), bias.float()
    return contiguous(weight), contiguous(bias)


def contiguous(tensor: Tensor) -> Tensor:
    """`tensor` itself where it lies in one aligned piece, else a copy."""
    if tensor.is_contiguous() and tensor.data_ptr() % _ALIGNMENT == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def address(tensor: Tensor | None) -> int:
    """Where a tensor begins; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def scratch(num_bytes: int, hidden: Tensor) -> tuple[int, Tensor]:
    """The address of memory of any content for one call, and what keeps it.

    It is aligned as launchers want it, to 256 bytes; torch gives less than that on a CPU.
    """
    memory = hidden.new_empty(num_bytes + 255, dtype=torch.uint8)
    return -(-memory.data_ptr() // 256) * 256, memory


def place_of(hidden: Tensor) -> tuple[int, int]:
    """The number of a card and its current stream; both 0 in the emulation."""
    if EMULATED:
        return 0, 0
    device = hidden.get_device()
    return device, torch._C._cuda_getCurrentRawStream(device)


def zeroed(use: tuple[object, ...], num_bytes: int, hidden: Tensor) -> int:
    """The address of memory that was zeros before its first use on the current stream.

    It is the stream's own, so that launches which may run at the same time never share it. While a
    CUDA graph is captured it is the graph's: zeros at every replay, valid for what is launched
    before the next allocation, and for the layers of a model's call together.

    Args:
        use: What for, and all that its content depends on.
        num_bytes: Its size.
        hidden: On the device that it should be on.
    """
    device, stream = place_of(hidden)
    key = (use, num_bytes, device, stream)
    if not EMULATED and torch.cuda.is_current_stream_capturing():
        return shared(key, lambda: hidden.new_zeros(num_bytes, dtype=torch.uint8)).data_ptr()
    if key not in _zeros:
        # Not torch's memory: its graph pools must hold nothing that outlives a call.
        _zeros[key] = _cuda_extension.cuda_extension().zeros(device, stream, num_bytes)
    return _zeros[key]


def norm_workspace(hidden: Tensor, norm_weight: Tensor, dtype: torch.dtype, width: Width) -> int:
    """What a LayerNorm fused into a product needs (gemm_sm90.h); 0 where it is not fused."""
    module = _cuda_extension.cuda_extension()
    if (
        width.num_each > 1
        or hidden.shape[1] != module.FUSED_NORM_HIDDEN_SIZE
        or not dtype == hidden.dtype == norm_weight.dtype == torch.bfloat16
    ):
        return 0
    device, _ = place_of(hidden)
    if module.compute_capability(device) != 90:
        return 0
    return zeroed(("norm",), module.norm_workspace_bytes(device), hidden)
