"""Bounds of memory for kernels in Triton's interpreter: every address must lie in an argument.

The interpreter reads and writes plain host memory, so that an address outside a tensor gives some
number, or damages the heap, and no test need notice. On a card the same kernel would fault. Here
each unmasked address of a load or store is compared with the tensors of the launch: of a weight
only its prefix, where only that was passed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

_Range = tuple[int, int]


def _range_of(tensor: torch.Tensor) -> _Range:
    """First byte of a tensor, and the one after its last."""
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in sizes)
    return start, start + (last + 1) * tensor.element_size()


def _ranges_of(arguments: list[Any]) -> list[_Range]:
    bases = [getattr(argument, "base", argument) for argument in arguments]
    return [_range_of(base) for base in bases if isinstance(base, torch.Tensor)]


class BoundsError(Exception):
    """A kernel left the memory of its arguments."""


class Bounds:
    """Wraps the interpreter's launches, loads and stores."""

    def __init__(self) -> None:
        self.ranges: list[_Range] = []
        self.kernel = ""
        self._launch = interpreter.GridExecutor._init_args_hst
        self._load = interpreter.InterpreterBuilder.create_masked_load
        self._store = interpreter.InterpreterBuilder.create_masked_store

    def install(self) -> None:
        """Check from here on."""
        bounds = self

        def launch(executor: Any, arguments: Any, options: Any) -> Any:
            made = bounds._launch(executor, arguments, options)
            bounds.kernel = executor.fn.__name__
            bounds.ranges = _ranges_of([*made[0], *made[1].values()])
            return made

        def load(builder: Any, addresses: Any, mask: Any, *rest: Any, **options: Any) -> Any:
            bounds.check("loads", addresses, mask)
            return bounds._load(builder, addresses, mask, *rest, **options)

        def store(builder: Any, addresses: Any, value: Any, mask: Any, *rest: Any) -> Any:
            bounds.check("stores", addresses, mask)
            return bounds._store(builder, addresses, value, mask, *rest)

        interpreter.GridExecutor._init_args_hst = launch
        interpreter.InterpreterBuilder.create_masked_load = load
        interpreter.InterpreterBuilder.create_masked_store = store

    def remove(self) -> None:
        """Check no longer."""
        interpreter.GridExecutor._init_args_hst = self._launch
        interpreter.InterpreterBuilder.create_masked_load = self._load
        interpreter.InterpreterBuilder.create_masked_store = self._store

    def check(self, what: str, addresses: Any, mask: Any) -> None:
        """Raise where an unmasked address is in no argument."""
        size = max(1, addresses.get_element_ty().primitive_bitwidth // 8)
        used = np.broadcast_to(mask.data, addresses.data.shape).astype(bool)
        places = addresses.data[used].astype(np.uint64)
        inside = np.zeros(places.shape, dtype=bool)
        for start, end in self.ranges:
            inside |= (places >= start) & (places + np.uint64(size) <= end)
        if inside.all():
            return
        outside = int(places[~inside][0])
        nearest = min(self.ranges, key=lambda found: min(abs(outside - edge) for edge in found))
        raise BoundsError(
            f"{self.kernel} {what} {size} bytes at {outside - nearest[0]:+d} from the start of an "
            f"argument of {nearest[1] - nearest[0]} bytes ({(~inside).sum()} such addresses)"
        )
