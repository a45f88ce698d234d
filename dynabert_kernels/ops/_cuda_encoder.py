"""Consecutive layers of a small batch in one launch of the persistent CUDA kernel.

For few tokens a layer takes less time than its launches. Here one launch runs all layers; which,
and how wide, it reads from device memory, so that a captured one serves every width. Its sums are
cut otherwise than those of the two ops: results agree to rounding, not to the bit.
"""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from dynabert_kernels import _cuda_extension, proof
from dynabert_kernels.ops import _cuda, _trust
from dynabert_kernels.ops._op import forced_backend
from dynabert_kernels.ops._sublayer import compute_name

if TYPE_CHECKING:
    from dynabert_kernels.ops.encoder import EncoderLayers

# Limits of csrc/encoder/encoder_cuda.h that spare larger calls the questions below.
_MAX_TOKENS = 512
_TENSORS = 6  # of a sublayer
_device_of, _dtype_of = attrgetter("device"), attrgetter("dtype")


class _Tables(NamedTuple):
    """What the kernel reads of some layers, on the device.

    Attributes:
        addresses: The tensors' addresses when this was made.
        refused: Whether the kernel is not made for these layers.
        weights: Those addresses, int64 ``[L, 12]``.
        subnet: Number of layers, their indices, heads and neurons, int32 ``[4, L]``.
    """

    addresses: list[int]
    refused: bool
    weights: Tensor
    subnet: Tensor


_tables: WeakKeyDictionary[EncoderLayers, _Tables] = WeakKeyDictionary()
# Those that a captured launch reads at every replay: kept, since nobody tells when a graph is gone.
_captured: dict[int, _Tables] = {}


def run(hidden: Tensor, layers: EncoderLayers, cu_seqlens: Tensor) -> Tensor | None:
    """The layers in order, or None where the ops have to run one by one.

    Args:
        hidden: Tokens, ``[total_tokens, hidden_size]``; rows past the last sequence give undefined
            ones.
        layers: What to run.
        cu_seqlens: Ragged offsets, ``[batch_size + 1]``, int32.
    """
    if not _may_run(hidden, layers):
        return None
    head_dim = layers.attention_weights[0].shape[2]
    use = (proof.CUDA, "encoder", "bfloat16", head_dim, False, hidden.get_device())
    if use not in _trust.trusted and _trust.doubt(use, hidden.device, _check, may_wait=False):
        return None
    return launch(hidden, layers, cu_seqlens)


def _check(path: proof.Path, device: torch.device) -> str | None:
    from dynabert_kernels.ops import _self_check

    return _self_check.encoder_difference(path, device)


def _may_run(hidden: Tensor, layers: EncoderLayers) -> bool:
    """Whether backend `cuda` would run every layer of an inference call with few tokens."""
    forced = forced_backend()
    if (
        hidden.dtype != torch.bfloat16
        or not 0 < hidden.shape[0] <= _MAX_TOKENS
        or hidden.device.type != _cuda.DEVICE
        or forced not in (None, proof.CUDA)
        or (forced is None and not _cuda.encoder_precedes(hidden))
        or _cuda.cuda_missing() is not None
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        # Who watches or fakes the operators of a call is to see the two ops.
        or type(hidden) is not Tensor
        or _get_current_dispatch_mode() is not None
    ):
        return False
    return compute_name(hidden, layers.quantization) == "bfloat16" and layers.activation == "gelu"


def launch(hidden: Tensor, layers: EncoderLayers, cu_seqlens: Tensor) -> Tensor | None:
    """The launch alone; None where the kernel is not made for these sizes or this card."""
    sequences = cu_seqlens.shape[0] - 1
    tables = _tables_of(layers, hidden.device)
    if tables is None or tables.refused or sequences < 1:
        return None
    module = _cuda_extension.cuda_extension()
    hidden, cu_seqlens = _cuda.contiguous(hidden), cu_seqlens.contiguous()
    with torch.cuda.device_of(hidden):
        device, stream = _cuda.place_of(hidden)
        shape = (
            hidden.shape[0],
            sequences,
            len(layers.num_heads),
            hidden.shape[1],
            layers.attention_weights[0].shape[2],
            max(weight.shape[0] for weight in layers.attention_weights[::_TENSORS]),
            max(weight.shape[0] for weight in layers.ffn_weights[::_TENSORS]),
        )
        if module.encoder_why_not(device, *shape) is not None:
            return None
        output = torch.empty_like(hidden)
        # The counter of its barrier lies at the start and goes on from call to call; what follows
        # may be anything. Few sizes, so that few pieces of memory are kept.
        room = 1 << (module.encoder_workspace_bytes(device, *shape) - 1).bit_length()
        num_kept, indices, *widths = tables.subnet
        heads, neurons = widths if layers.device_widths is None else layers.device_widths
        module.encoder(
            device,
            stream,
            *shape,
            hidden.data_ptr(),
            output.data_ptr(),
            cu_seqlens.data_ptr(),
            tables.weights.data_ptr(),
            num_kept.data_ptr(),
            indices.data_ptr(),
            heads.data_ptr(),
            neurons.data_ptr(),
            layers.device_widths is not None,
            layers.norm_eps[0],
            _cuda.zeroed(("encoder", shape[4]), room, hidden),
        )
        if _trust.is_capturing(hidden.device):
            _captured[tables.weights.data_ptr()] = tables
    return output


def _tables_of(layers: EncoderLayers, device: torch.device) -> _Tables | None:
    """Made by the first call and after weights have moved; None while a graph is being captured."""
    pairs = zip(_by_layer(layers.attention_weights), _by_layer(layers.ffn_weights), strict=True)
    tensors = [tensor for attention, ffn in pairs for tensor in (*attention, *ffn)]
    addresses = list(map(Tensor.data_ptr, tensors))
    tables = _tables.get(layers)
    if tables is not None and tables.addresses == addresses:
        return tables
    if _trust.is_capturing(device):
        return None
    refused = (
        set(map(_dtype_of, tensors)) != {torch.bfloat16}
        or set(map(_device_of, tensors)) != {device}
        or not all(map(Tensor.is_contiguous, tensors))
        or any(address % 16 != 0 for address in addresses)
        or len(set(layers.norm_eps)) != 1
        or len({weight.shape[2] for weight in layers.attention_weights[::_TENSORS]}) != 1
    )
    count = len(layers.num_heads)
    subnet = [[count] * count, [*range(count)], layers.num_heads, layers.intermediate_sizes]
    tables = _tables[layers] = _Tables(
        addresses,
        refused,
        torch.tensor(addresses, dtype=torch.int64, device=device).view(count, 2 * _TENSORS),
        torch.tensor(subnet, dtype=torch.int32, device=device),
    )
    return tables


def _by_layer(tensors: list[Tensor]) -> list[list[Tensor]]:
    return [tensors[i : i + _TENSORS] for i in range(0, len(tensors), _TENSORS)]
