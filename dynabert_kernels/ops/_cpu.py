"""Whether the C++ kernels of backend ``cpu`` can run here, as sentences both ops share."""

from __future__ import annotations

import torch
from torch import Tensor

from dynabert_kernels import _extension
from dynabert_kernels.ops._op import forced_backend

DEVICE = "cpu"
COMPUTE = ("float32", "bfloat16", "int8")
DTYPES = frozenset((torch.float32, torch.bfloat16))


def _find_missing() -> str | None:
    reason = _extension.extension_error()
    if reason is None and not hasattr(_extension.cpu_extension(), "prepared_stats"):
        reason = (
            "the extension was built from older sources, without kernels. Reinstall the package"
        )
    return reason


# A constant of the process, which calls read and Dynamo traces. Finding it loads the extension,
# set to the instruction set that DYNABERT_ISA forces.
_MISSING = _find_missing()


def kernels_missing() -> str | None:
    """Why no C++ kernel can run in this process, or None."""
    return _MISSING


def runs_unforced(tensor: Tensor) -> bool:
    """Whether kernels that are no backend of an op may run on `tensor`'s behalf.

    They have neither gradients nor a shape function, and give way to a backend that is forced.
    """
    return (
        tensor.is_cpu
        and _MISSING is None
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and forced_backend() in (None, "cpu")
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    )


def scope(hidden: Tensor, *, dropout: bool) -> str | None:
    """Why a call is none that the kernels are made for, or None.

    Args:
        hidden: Tokens, ``[total_tokens, hidden_size]``.
        dropout: Whether the call asks for dropout without gradients.
    """
    if hidden.dtype == torch.float64:
        return "hidden is torch.float64, expected float32 or bfloat16"
    if dropout:
        return "dropout is not part of this backend where no gradients are needed"
    return None


def why_not(hidden: Tensor, matrix: Tensor, widths: Tensor | None, compute: str) -> str | None:
    """The reasons both ops share why the kernels cannot run a call, or None.

    Args:
        hidden: Tokens, ``[total_tokens, hidden_size]``.
        matrix: A weight matrix; the others have its dtype.
        widths: One width per sequence, if the call gives them.
        compute: Dtype of the matrix products, by name.
    """
    if compute not in COMPUTE:
        return f"it would compute in {compute}, expected one of {', '.join(COMPUTE)}"
    if hidden.dtype not in DTYPES:
        return f"hidden is {hidden.dtype}, expected float32 or bfloat16"
    if matrix.dtype not in DTYPES:
        return f"the weights are {matrix.dtype}, expected float32 or bfloat16"
    if widths is not None and widths.device.type != DEVICE:
        return f"one width per sequence is given on {widths.device}, expected the CPU"
    return None


def slower_training(hidden: Tensor, *, fewest: int) -> str | None:
    """Where the reference is the faster way to gradients, as a sentence, or None.

    Args:
        hidden: Tokens, ``[total_tokens, hidden_size]``.
        fewest: Tokens from which the kernels are faster.
    """
    if hidden.shape[0] < fewest:
        return f"{hidden.shape[0]} tokens to train on, expected {fewest} or more for a gain"
    return None
