"""The memory a call needs beyond what is there before it: activations and workspaces.

Weights and their prepared forms are there before; what those take is their size. On a GPU PyTorch
counts its own allocations. On a CPU Linux keeps the most pages a process has had resident, a mark
that a process may reset.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # Documentation/filesystems/proc.rst: resets VmHWM to what is resident now


def peak_memory_mib(call: Callable[[], object], device: torch.device) -> float | None:
    """Most memory that `call` had on the device beyond what was there before it, in MiB.

    The call must have run before, so that what it makes once and keeps is there. On a CPU it is
    the growth of the process's resident set, with what the allocator holds besides live tensors:
    other threads of the process count too, and the kernel rounds to some hundred KiB.

    Returns:
        The growth, or None where it cannot be told: on a CPU without Linux's ``clear_refs`` and
        glibc's ``malloc_trim``.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - allocated) / 2**20
    before = _reset_peak()
    if before is None:
        return None
    call()
    return max(0, _resident_kib("VmHWM") - before) / 2**10


def _reset_peak() -> int | None:
    """What is resident now, in KiB, after the mark was set to it; None where there is none."""
    try:
        # Pages of freed memory that the allocator keeps would hide that the call uses them again.
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text(_RESET_PEAK)
        return _resident_kib("VmRSS")
    except (OSError, AttributeError, TypeError):  # no /proc, no glibc, not even a C library
        return None


def _resident_kib(field: str) -> int:
    """A line of the process's status.

    Raises:
        OSError: There is none.
    """
    for line in _STATUS.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise OSError(f"{_STATUS} has no {field}")
