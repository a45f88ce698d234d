"""Freed memory serves the next allocation without page faults."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from dynabert.training import allocator

_FAULTS = """
import ctypes, resource, runpy, sys
if sys.argv[1] == "reuse":
    assert runpy.run_path(sys.argv[2])["reuse_freed_memory"]() is True
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def use():
    memory = libc.malloc(64 << 20)
    libc.memset(memory, 1, 64 << 20)
    libc.free(memory)
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_memory_is_faulted_in_once() -> None:
    faults = {
        mode: int(
            subprocess.run(
                [sys.executable, "-c", _FAULTS, mode, str(Path(allocator.__file__))],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for mode in ("default", "reuse")
    }
    assert faults["reuse"] < 100 < faults["default"]


def test_another_libc_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    assert allocator.reuse_freed_memory() is False
