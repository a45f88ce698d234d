"""Starts kernels: Triton's own way the first time a kind of call is seen, a short cut from then on.

Triton binds and inspects every argument at every launch, which takes the host longer than many of
these kernels take the card. What it looks for is known here: a call of the same kind (same kernel,
constants and dtypes, and the same answer for each argument that Triton specialises on) runs the
same machine code, so that the compiled kernel can be started directly.
"""

import dataclasses
from collections.abc import Callable, Sequence
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


class _Calls:
    """Calls of one kernel whose arguments have the same types, and what they were compiled to."""

    def __init__(self, types: Sequence[type], is_constant: Sequence[bool]) -> None:
        parts = [
            part.format(f"v[{place}]")
            for place, (kind, constant) in enumerate(zip(types, is_constant, strict=True))
            for part in (("{}",) if constant else _parts_of(kind))
        ]
        # Written out for these types: asking each argument what it is would take several times
        # as long, at every launch.
        self.key_of: Callable[[tuple[Any, ...]], tuple[Any, ...]] = eval(
            f"lambda v: ({', '.join(parts)},)"
        )
        self.compiled: dict[tuple[Any, ...], Any] = {}


class _Kernel:
    """A ``triton.jit`` function, which lives as long as its module, and its calls by types."""

    def __init__(self, kernel: Any) -> None:
        self.names: list[str] = kernel.arg_names
        self.is_constant = [param.is_constexpr for param in kernel.params]
        self.by_types: dict[tuple[type, ...], _Calls] = {}


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
        known = _kernels[id(kernel)] = _Kernel(kernel)
    values = (*args, *[options[name] for name in known.names[len(args) :]])
    types = tuple(map(type, values))
    calls = known.by_types.get(types)
    if calls is None:
        calls = known.by_types[types] = _Calls(types, known.is_constant)
    key = (
        triton.runtime.driver.active.get_current_device(),
        *map(options.get, _LAUNCH_OPTIONS),
        calls.key_of(values),
    )
    compiled = calls.compiled.get(key)
    if compiled is None:
        compiled = kernel[grid](*args, **options)
        if compiled is not None:
            calls.compiled[key] = compiled
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


def _parts_of(kind: type) -> tuple[str, ...]:
    """What Triton specialises on: dtype and alignment, and of an int whether it is 1 or aligned."""
    if issubclass(kind, Tensor):
        return "{}.dtype", "{}.data_ptr() % 16 == 0"
    if issubclass(kind, TensorDescriptor):
        return "{}.base.dtype", "*{}.block_shape"
    if kind is int:
        return "{} == 1", "{} % 16 == 0", "{} >> 31"
    if kind in (float, type(None)):
        return ()
    raise TypeError(
        f"triton.dispatch.start: an argument is a {kind.__name__}, expected a Tensor, a "
        "TensorDescriptor, an int, a float or None. Say here what Triton specialises on."
    )
