"""Whether the Triton kernels can run here, as sentences. Imports no Triton itself."""

import importlib.util
import sys

import torch
from torch import Tensor

from dynabert_kernels import _env

HEAD_DIMS = (32, 64, 80, 128)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Under Triton's interpreter the kernels run on the CPU, which is how they are tested without a GPU.
INTERPRETED = _env.triton_interpret()
DEVICE = "cpu" if INTERPRETED else "cuda"
OPT_IN = (
    "Triton's interpreter is for tests; choose it with use_backend('triton')"
    if INTERPRETED
    else None
)
"""Why only `use_backend` may choose the kernels, or None."""
# Constants of the process: Dynamo traces the functions that return them.
_MISSING = (
    None
    if importlib.util.find_spec("triton") is not None
    else "the triton package is not installed"
)


def triton_missing() -> str | None:
    """Why no Triton kernel can run on this installation, or None."""
    return _MISSING


def triton_compilations() -> int:
    """Triton kernels compiled, or loaded from Triton's cache, since the process began.

    Constant once every kind of call has been made: a change while serving is a pause that a warm-up
    should have taken. 0 where no Triton kernel has run.
    """
    dispatch = sys.modules.get("dynabert_kernels.triton.dispatch")
    return 0 if dispatch is None else int(dispatch.compilations())


def why_not(
    hidden: Tensor,
    matrices: tuple[Tensor, ...],
    *,
    compute: torch.dtype,
    quantization: str | None,
) -> str | None:
    """The reasons both ops share why the kernels cannot run a call, or None.

    Args:
        hidden: Tokens, ``[total_tokens, hidden_size]``.
        matrices: The weight matrices.
        compute: Dtype of the matrix products.
        quantization: The weights' own.
    """
    if quantization is not None:
        return f"the weights have quantization={quantization!r}, which is not implemented"
    if hidden.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(hidden.device)
        if major < 8:
            return f"the card is sm_{major}{minor}, expected sm_80 or newer"
    dtypes = (("hidden is", hidden.dtype), ("it would compute in", compute))
    for what, dtype in (*dtypes, *(("the weights are", matrix.dtype) for matrix in matrices)):
        if dtype not in DTYPES:
            return f"{what} {dtype}, expected float16, bfloat16 or float32"
    if INTERPRETED and torch.bfloat16 in (hidden.dtype, compute):
        return "Triton's interpreter multiplies bfloat16 wrongly, expected float16 or float32"
    if not all(matrix.is_contiguous() for matrix in matrices):
        return "a weight matrix is not contiguous"
    return None
