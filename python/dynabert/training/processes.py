"""The processes that train one model together, as torchrun or accelerate starts them.

What decides or writes goes through the first process, so that all agree. In a process alone every
function here does its work at once, or nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

Item = TypeVar("Item")
Result = TypeVar("Result")

# How long a process waits for the others, which may be scoring a model for importance or a grid
# meanwhile; the half hour that is usual is too short for a CPU.
_PATIENCE = timedelta(days=1)


def join_processes(use_cpu: bool) -> None:
    """Meet the other processes of a launch, if there are any and this has not been done.

    Args:
        use_cpu: Stay on the CPU even if there is a GPU.
    """
    if distributed.is_available() and not distributed.is_initialized():
        from accelerate import PartialState  # comes with the extra `train`

        PartialState(cpu=use_cpu or not torch.cuda.is_available(), timeout=_PATIENCE)


def leave_processes() -> None:
    """Part from the other processes; the last thing a program does."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    # A thread of the gloo backend needs the interpreter's lock to let go of the last backward pass.
    # Who drops the process group before that waits for the thread with the lock in hand, for ever.
    time.sleep(1)
    distributed.destroy_process_group()


def is_first() -> bool:
    """Whether this process is alone, or the one that writes and reports."""
    return _num_processes() == 1 or distributed.get_rank() == 0


def from_first(make: Callable[[], Result]) -> Result:
    """What `make` returns in the first process, in every process.

    Raises:
        ValueError: In the other processes, if `make` raised an error in the first.
    """
    if _num_processes() == 1:
        return make()
    message: list[Any] = [None, None]
    raised: Exception | None = None
    if is_first():
        try:
            message[0] = make()
        except Exception as error:
            raised = error
            message[1] = str(error)
    distributed.broadcast_object_list(message)
    if raised is not None:
        raise raised
    if message[1] is not None:
        raise ValueError(message[1])
    result: Result = message[0]
    return result


def shared_out(
    items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Result]]
) -> list[Result]:
    """The result of `work` for each of `items`; every process works on some of them."""
    count = _num_processes()
    if count == 1:
        return list(work(items))
    own = items[distributed.get_rank() :: count]
    parts: list[Any] = [None] * count
    distributed.all_gather_object(parts, list(work(own)) if own else [])
    return [parts[number % count][number // count] for number in range(len(items))]


def _num_processes() -> int:
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1
