"""Whether the Triton kernels can run here, as sentences. Imports no Triton itself."""

import importlib.util

import torch
from torch import Tensor

from dynabert_kernels import _env

UNPROVEN = "no recorded GPU run proves it yet; choose it with use_backend('triton')"
HEAD_DIMS = (32, 64, 80, 128)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Under Triton's interpreter the kernels run on the CPU, which is how they are tested without a GPU.
INTERPRETED = _env.triton_interpret()
DEVICE = "cpu" if INTERPRETED else "cuda"
# Constants of the process: Dynamo traces the functions that return them.
_MISSING = (
    None
    if importlib.util.find_spec("triton") is not None
    else "the triton package is not installed"
)


def triton_missing() -> str | None:
    """Why no Triton kernel can run on this installation, or None."""
    return _MISSING


def why_not(
    hidden: Tensor,
    matrices: tuple[Tensor, ...],
    *,
    widths: Tensor | None,
    dropout: bool,
    quantization: str | None,
) -> str | None:
    """The reasons both ops share why the kernels cannot run a call, or None.

    Args:
        hidden: Tokens, ``[total_tokens, hidden_size]``.
        matrices: The weight matrices.
        widths: One width per sequence, if the call gives them.
        dropout: Whether the call asks for any dropout.
        quantization: The weights' own.
    """
    if quantization is not None:
        return f"the weights have quantization={quantization!r}, which is not implemented"
    if hidden.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(hidden.device)
        if major < 8:
            return f"the card is sm_{major}{minor}, expected sm_80 or newer"
    if hidden.dtype not in DTYPES:
        return f"hidden is {hidden.dtype}, expected float16, bfloat16 or float32"
    if INTERPRETED and hidden.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 wrongly, expected float16 or float32"
    for matrix in matrices:
        if matrix.dtype != hidden.dtype:
            return f"the weights are {matrix.dtype} and hidden {hidden.dtype}, expected one dtype"
        if not matrix.is_contiguous():
            return "a weight matrix is not contiguous"
    if torch.is_autocast_enabled(hidden.device.type):
        autocast = torch.get_autocast_dtype(hidden.device.type)
        if autocast != hidden.dtype:
            return f"autocast asks for {autocast} and hidden is {hidden.dtype}, expected one dtype"
    if widths is not None:
        return "one width per sequence is given, expected one int for all"
    if dropout:
        return "dropout is not implemented"
    return None
