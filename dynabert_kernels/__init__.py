"""Elastic encoder sublayers: width is an argument of the call, and a prefix of the weights.

The kernel floor: it needs torch alone, and knows no model, no checkpoint and no width multiplier.
"""

from importlib.metadata import PackageNotFoundError, version

from dynabert_kernels.layout import PackedAttention, PackedFFN
from dynabert_kernels.ops import use_backend
from dynabert_kernels.ops.attention import attention
from dynabert_kernels.ops.ffn import ffn
from dynabert_kernels.prepared import (
    clear_prepared,
    invalidate,
    prepared_bytes,
    prepared_forms,
)
from dynabert_kernels.released import ReleasedWeightsError, release
from dynabert_kernels.triton.availability import triton_compilations

try:
    __version__ = version("dynabert-kernels")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0.0.0+source"

__all__ = [
    "PackedAttention",
    "PackedFFN",
    "ReleasedWeightsError",
    "attention",
    "clear_prepared",
    "ffn",
    "invalidate",
    "prepared_bytes",
    "prepared_forms",
    "release",
    "triton_compilations",
    "use_backend",
]
