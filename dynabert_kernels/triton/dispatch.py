"""Starts kernels: Triton's own way the first time a kind of call is seen, a short cut from then on.

Triton binds and inspects every argument at every launch, which takes the host longer than many of
these kernels take the card. What it looks for is known here: a call of the same kind (same kernel,
constants and dtypes, and the same answer for each argument that Triton specialises on) runs the
same machine code, so that the compiled kernel can be started directly.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dynabert_kernels.triton.availability import INTERPRETED

_LAUNCH_OPTIONS = ("num_warps", "num_stages", "maxnreg")

_kernels: dict[int, "_Kernel"] = {}
_compiled: set[Any] = set()
_DESCRIPTOR_DEFAULTS = {
    field.name: field.default
    for field in dataclasses.fields(TensorDescriptor)
    if field.default is not dataclasses.MISSING
}


@dataclass(frozen=True)
class _Kernel:
    """A ``triton.jit`` function, which lives as long as its module, and what it was compiled to."""

    names: list[str]
    is_constant: list[bool]
    compiled: dict[tuple[Any, ...], Any]

    @classmethod
    def of(cls, kernel: Any) -> "_Kernel":
        return cls(kernel.arg_names, [param.is_constexpr for param in kernel.params], {})


def compilations() -> int:
    """Kernels that were compiled, or loaded from Triton's cache, since the process began.

    Constant once every kind of call has been made: widths and batch sizes compile nothing new.
    """
    return len(_compiled)


def cdiv(numerator: int, denominator: int) -> int:
    """The quotient, rounded up."""
    return -(-numerator // denominator)


def next_power_of_2(number: int) -> int:
    """The least power of two that is not below a positive number."""
    return 1 << (number - 1).bit_length()


def start(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch ``kernel[grid](*args, **options)`` on the current stream.

    Args:
        kernel: A ``triton.jit`` function.
        grid: Programs, one to three numbers.
        *args: Its first arguments: tensors, descriptors, numbers, None.
        **options: All others by name, and ``num_warps``, ``num_stages`` and ``maxnreg``.
    """
    if INTERPRETED:
        kernel[grid](*args, **options)
        return
    known = _kernels.get(id(kernel))
    if known is None:
        known = _kernels[id(kernel)] = _Kernel.of(kernel)
    values = (*args, *[options[name] for name in known.names[len(args) :]])
    key = (
        triton.runtime.driver.active.get_current_device(),
        *[options.get(name) for name in _LAUNCH_OPTIONS],
        *[
            value if is_constant else _KINDS[type(value)](value)
            for value, is_constant in zip(values, known.is_constant, strict=True)
        ],
    )
    compiled = known.compiled.get(key)
    if compiled is None:
        compiled = kernel[grid](*args, **options)
        if compiled is not None:
            known.compiled[key] = compiled
            _compiled.add(compiled)
        return
    compiled[(*grid, 1, 1)[:3]](*values)


def descriptor(matrix: Tensor, block_shape: list[int]) -> TensorDescriptor:
    """``TensorDescriptor.from_tensor`` without its checks, for an aligned matrix.

    They take as long as the rest of a launch, and the launchers have asked `launch.is_aligned`.
    """
    made = object.__new__(TensorDescriptor)
    made.__dict__.update(
        _DESCRIPTOR_DEFAULTS,
        base=matrix,
        shape=list(matrix.shape),
        strides=list(matrix.stride()),
        block_shape=block_shape,
    )
    return made


def _kind_of_tensor(tensor: Tensor) -> Any:
    return tensor.dtype, tensor.data_ptr() % 16 == 0


def _kind_of_int(number: int) -> Any:
    return number == 1, number % 16 == 0, number >> 31


def _kind_of_descriptor(described: TensorDescriptor) -> Any:
    return described.base.dtype, *described.block_shape


class _Kinds(dict[type, Callable[[Any], Any]]):
    """What tells the kind of an argument, by its type: a look-up for all that is ordinary."""

    def __missing__(self, kind: type) -> Callable[[Any], Any]:
        if not issubclass(kind, Tensor):
            raise TypeError(
                f"triton.dispatch.start: an argument is a {kind.__name__}, expected a Tensor, a "
                "TensorDescriptor, an int, a float or None. Add its kind here."
            )
        self[kind] = _kind_of_tensor
        return _kind_of_tensor


# What Triton specialises on: dtype and alignment, and of an int whether it is 1 or aligned.
_KINDS = _Kinds(
    {
        Tensor: _kind_of_tensor,
        int: _kind_of_int,
        TensorDescriptor: _kind_of_descriptor,
        float: type,
        type(None): type,
    }
)
