"""The memory of a call: the growth of the process while it runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dynabert.latency_memory as memory_module
from dynabert.latency_memory import peak_memory_mib

CPU = torch.device("cpu")


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="/proc/self/clear_refs is not there"
)
@pytest.mark.parametrize("num_tensors", [1, 2])
def test_growth_is_what_the_call_had_at_once(num_tensors: int) -> None:
    def call() -> None:
        held = [torch.ones(12 * 2**20, dtype=torch.uint8) for _ in range(num_tensors)]
        assert len(held) == num_tensors

    call()
    for _ in range(2):  # also when the allocator has such memory at hand
        assert peak_memory_mib(call, CPU) == pytest.approx(12 * num_tensors, abs=1.0)


def test_what_cannot_be_told_is_none_and_costs_no_call(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memory_module, "_CLEAR", tmp_path / "missing" / "clear_refs")
    calls: list[int] = []
    assert peak_memory_mib(lambda: calls.append(1), CPU) is None
    assert not calls


def test_an_error_of_the_call_is_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_module, "_reset_peak", lambda: 1)

    def call() -> None:
        raise OSError("the call's own")

    with pytest.raises(OSError, match="the call's own"):
        peak_memory_mib(call, CPU)
