"""Whether the Triton kernels can run here, as sentences. Imports no Triton itself."""

import functools
import importlib.util

import torch
from torch import Tensor

HEAD_DIMS = (32, 64, 80, 128)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@functools.cache
def triton_missing() -> str | None:
    """Why no Triton kernel can run on this installation, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed"
    return None


@functools.cache
def card_too_old(index: int) -> str | None:
    """Why this card cannot run the kernels, or None."""
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"the card is sm_{major}{minor}, expected sm_80 or newer"
    return None


def why_not(hidden: Tensor, weights: tuple[Tensor, ...], *, dropout: bool) -> str | None:
    """The reasons that both ops share: card, dtypes, autocast, dropout."""
    if hidden.device.type == "cuda":
        old = card_too_old(hidden.device.index or 0)
        if old is not None:
            return old
    if hidden.dtype not in DTYPES:
        return f"hidden is {hidden.dtype}, expected float16, bfloat16 or float32"
    for weight in weights:
        if weight.dtype != hidden.dtype:
            return f"the weights are {weight.dtype} and hidden {hidden.dtype}, expected one dtype"
        if not weight.is_contiguous():
            return "a weight is not contiguous"
    if torch.is_autocast_enabled(hidden.device.type):
        autocast = torch.get_autocast_dtype(hidden.device.type)
        if autocast != hidden.dtype:
            return f"autocast asks for {autocast} and hidden is {hidden.dtype}, expected one dtype"
    if dropout:
        return "dropout is not implemented"
    return None
