"""Prepared weights: the forms in which backend ``cpu`` keeps the matrices it has multiplied with.

A form is derived from a whole weight tensor and serves every width; it is built by the first call
that needs it, kept while the tensor lives, and built again once the tensor has changed. Nothing of
it is ever saved.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from dynabert_kernels import _extension
from dynabert_kernels.layout import PackedAttention, PackedFFN
from dynabert_kernels.ops._cpu import kernels_missing
from dynabert_kernels.released import refuse_released


def _module() -> ModuleType | None:
    return _extension.cpu_extension() if kernels_missing() is None else None


def prepared_bytes() -> int:
    """Memory that prepared weights take now; 0 where there are no C++ kernels."""
    module = _module()
    return 0 if module is None else int(module.prepared_stats()["bytes"])


def prepared_forms() -> dict[str, int]:
    """Memory that prepared weights take now, in bytes, by form: float32, bfloat16, int8.

    A form serves every width and every subnet, so it grows with neither.

    Example:
        >>> prepared_forms()  # doctest: +SKIP
        {'bfloat16': 169869312, 'int8': 84934656}
    """
    module = _module()
    return {} if module is None else dict(module.prepared_forms())


def clear_prepared() -> None:
    """Free all prepared weights; calls that need some build them again.

    Forms of released weights stay (`dynabert_kernels.release`): nothing could build them.
    """
    module = _module()
    if module is not None:
        module.clear_prepared()


def invalidate(weights: PackedAttention | PackedFFN | Tensor) -> int:
    """Free the prepared forms of some weights, after a write that torch does not count.

    A write through PyTorch raises a tensor's version, which is noticed, and so is every step of a
    `torch.optim.Optimizer` (fused ones write without raising it). Not counted are writes through
    `Tensor.data`, through NumPy or a pointer, and any to inference tensors (made under
    ``torch.inference_mode``), which have no version: without this call the next one would compute
    with the former values.

    Args:
        weights: The sublayer, or one of its tensors.

    Returns:
        How many forms were freed; 0 where there are no C++ kernels.

    Raises:
        TypeError: `weights` is something else.
        ReleasedWeightsError: They were released, so nothing can have written to them.
    """
    if not isinstance(weights, (PackedAttention, PackedFFN, Tensor)):
        raise TypeError(
            f"invalidate: weights={type(weights).__name__}, expected PackedAttention, PackedFFN or "
            "a Tensor. For a model, call it for each sublayer's packed()."
        )
    fields = [weights] if isinstance(weights, Tensor) else list(vars(weights).values())
    tensors = [field for field in fields if isinstance(field, Tensor)]
    refuse_released("invalidate", tensors)
    module = _module()
    if module is None:
        return 0
    return sum(int(module.invalidate_prepared(tensor)) for tensor in tensors)


def _forget_what_was_trained(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Free the prepared forms of the parameters that an optimizer has just changed."""
    module = _module()
    if module is None or module.prepared_stats()["entries"] == 0:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            module.invalidate_prepared(parameter)


register_optimizer_step_post_hook(_forget_what_was_trained)
