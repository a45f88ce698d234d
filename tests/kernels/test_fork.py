"""A process that forks after the import, as pre-forking servers do: children share prepared weights
and compute the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dynabert_kernels import clear_prepared, ffn, release, use_backend
from dynabert_kernels._extension import cpu_extension
from dynabert_kernels.ops import _cpu
from dynabert_kernels.testing import random_ffn, random_hidden

if _cpu.kernels_missing() is not None:
    pytest.skip(str(_cpu.kernels_missing()), allow_module_level=True)
if not hasattr(os, "fork"):
    pytest.skip("this system has no fork", allow_module_level=True)


def in_child(work: Callable[[], bytes]) -> bytes:
    """What `work` returns in a forked child; fails where the child does not end well."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # Python warns of forking a process that has threads; this child uses none of them.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            signal.alarm(60)
            os.write(writing, work())
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writing)
    with open(reading, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return answer


def builds() -> int:
    return int(cpu_extension().prepared_stats()["builds"])


@pytest.mark.parametrize("is_released", [False, True], ids=["", "released"])
def test_a_child_reads_the_forms_of_its_parent(is_released: bool) -> None:
    """With one thread: a child has none of OpenMP's threads that its parent may have started."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    clear_prepared()
    weights, other = random_ffn(600, 72), random_ffn(40, 72, seed=1)
    hidden = random_hidden(70, 72, seed=2)
    if is_released:
        weights = release(weights, ["float32"])

    def run() -> list[Tensor]:
        with torch.no_grad(), use_backend("cpu"):
            return [ffn(hidden, weights, intermediate_size=n) for n in (37, 600)]

    expected = run()

    def work() -> bytes:
        former = builds()
        same = all(map(torch.equal, run(), expected))
        found = builds() - former
        with torch.no_grad(), use_backend("cpu"):
            one_more = ffn(hidden, other, intermediate_size=9).sum()  # which it builds for itself
        return b"%d %d %d %d" % (same, found, builds() - former, bool(one_more.isfinite()))

    former = builds()
    try:
        assert in_child(work) == b"1 0 1 1"
        assert builds() == former
        assert all(map(torch.equal, run(), expected))
    finally:
        torch.set_num_threads(before)


_TWO_THREADS = """
import os, torch
from dynabert_kernels import ffn, use_backend
from dynabert_kernels.testing import random_ffn, random_hidden
weights, hidden = random_ffn(600, 72), random_hidden(300, 72)
def run():
    with torch.no_grad(), use_backend("cpu"):
        return ffn(hidden, weights, intermediate_size=523)
children = []
for _ in range(2):
    child = os.fork()
    if child == 0:
        torch.set_num_threads(2)
        torch.save(run(), f"{child}-{os.getpid()}.pt")
        os._exit(0)
    children.append(child)
assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
torch.set_num_threads(2)
mine = run()
for child in children:
    assert torch.equal(torch.load(f"0-{child}.pt"), mine)
"""


@pytest.mark.slow
def test_children_of_a_process_that_only_imported_use_threads_of_their_own(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", _TWO_THREADS], cwd=tmp_path, check=True, timeout=120)
