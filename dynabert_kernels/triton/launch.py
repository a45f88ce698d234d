"""What the launchers share.

They choose a configuration, allocate, and start kernels on the current stream. None waits for the
device, so every launch can be captured in a CUDA graph.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor


class Dropout(NamedTuple):
    """Which elements a kernel drops; see `dynabert_kernels.dropout`.

    Attributes:
        p: Probability of dropping an element; what is kept is scaled by ``1 / (1 - p)``.
        seed: int64 ``[1]``, on the device of the tensors.
    """

    p: float
    seed: Tensor


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


def is_aligned(matrix: Tensor) -> bool:
    """Whether base and rows start at multiples of what Triton specialises on."""
    return matrix.data_ptr() % 16 == 0 and matrix.stride(0) % 16 == 0
