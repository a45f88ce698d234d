"""A model that only serves gives its packed weights back, and keeps their prepared forms.

Parameters stay where they are, as stand-ins without memory (`dynabert_kernels.released`), which
refuse whatever needs their numbers. The checks here come before work that would fail halfway.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from dynabert_kernels import prepared_forms, release
from dynabert_kernels.released import ReleasedWeight, check_forms, check_stays, refuse_released


def release_model(model: nn.Module, sublayers: Sequence[Any], forms: Sequence[str] | None) -> None:
    """See `DynaBertPreTrainedModel.release_packed`.

    Args:
        model: For its mode, and for messages.
        sublayers: Its elastic sublayers.
        forms: What to keep; None for the form of the next call.
    """
    who = f"{type(model).__name__}.release_packed"
    if model.training:
        raise ValueError(
            f"{who}: training=True, expected a model in evaluation. Released weights cannot be "
            "trained; call eval() first."
        )
    first = next(sublayers[0].parameters())
    refuse_released(who, [first])
    if forms is None:
        forms = [sublayers[0].quantization or str(first.dtype).removeprefix("torch.")]
    forms = check_forms(who, forms)
    made = []
    for sublayer in sublayers:
        packed = sublayer.packed()
        own = [t for t in vars(packed).values() if isinstance(t, Tensor)]
        if {id(t) for t in own} != {id(t) for t in sublayer.parameters()}:
            raise ValueError(
                f"{who}: a {type(sublayer).__name__} has parametrised or further parameters, "
                "expected its packed ones alone. Merge adapters into the weights first."
            )
        made.append(release(packed, forms))
    # Nothing fails from here on: a model is released as a whole or not at all.
    for sublayer, packed in zip(sublayers, made, strict=True):
        for name in sublayer._parameters:
            sublayer._parameters[name] = getattr(packed, name)
        sublayer._kept = None
    for module in model.modules():
        if hasattr(module, "_watches"):  # these hold the former parameters
            module._watches = {}  # type: ignore[assignment]
    del first, packed, own, made, sublayer
    prepared_forms()  # forgets the forms that went with the packed tensors
    return_freed_memory()


def return_freed_memory() -> None:
    """Have the C library give freed memory back to the system; only glibc has to be asked."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, TypeError, AttributeError):
        return


def released_parameter(module: nn.Module) -> ReleasedWeight | None:
    """A released weight of a module, if it has one."""
    found = (weight for weight in module.parameters() if isinstance(weight, ReleasedWeight))
    return next(found, None)


def check_conversion(module: nn.Module, convert: Callable[[Tensor], Tensor]) -> bool:
    """Whether a module has released weights, which `convert` leaves as they are.

    Raises:
        ReleasedWeightsError: It would not.
    """
    weight = released_parameter(module)
    if weight is not None:
        check_stays(weight, convert)
    return weight is not None
