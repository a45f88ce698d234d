"""The short cut past Triton's own launch: when it is taken, and that it keeps nothing of a call."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if find_spec("triton") is None:
    pytest.skip("the triton package is not installed", allow_module_level=True)

import triton

from dynabert_kernels.triton import dispatch


class CountedKernel:
    """Stands for a ``triton.jit`` function: records what reaches it, and what its code is given."""

    arg_names = ("x_ptr", "T", "seed_ptr", "BLOCK")

    def __init__(self) -> None:
        self.params = [SimpleNamespace(is_constexpr=name == "BLOCK") for name in self.arg_names]
        self.compilations = 0
        self.calls: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_and_run(*args: Any, **options: Any) -> Any:
            self.compilations += 1
            self.calls.append((grid, *args, options["seed_ptr"], options["BLOCK"]))
            return Compiled(self)

        return compile_and_run


class Compiled:
    def __init__(self, kernel: CountedKernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *values: self.kernel.calls.append((grid, *values))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> CountedKernel:
    card = SimpleNamespace(active=SimpleNamespace(get_current_device=lambda: 0))
    monkeypatch.setattr(triton.runtime, "driver", card)
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    monkeypatch.setattr(dispatch, "_kernels", {})
    monkeypatch.setattr(dispatch, "_compiled", set())
    return CountedKernel()


def launch(kernel: CountedKernel, x: Any, tokens: int, seed: Any, block: int = 16) -> None:
    dispatch.start(kernel, (tokens, 2), x, tokens, seed_ptr=seed, BLOCK=block, num_warps=4)


def test_a_second_call_of_a_kind_gets_its_own_arguments(kernel: CountedKernel) -> None:
    for tokens in (17, 19):
        x, seed = torch.empty(tokens), torch.empty(1, dtype=torch.int64)
        launch(kernel, x, tokens, seed)
        assert kernel.calls[-1][1] is x
        assert kernel.calls[-1][2] == tokens
        assert kernel.calls[-1][3] is seed
    assert kernel.calls[-1][0] == (19, 2, 1)
    assert kernel.compilations == dispatch.compilations() == 1


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.empty(64, dtype=torch.float16)},
        {"x": torch.empty(65)[1:]},
        {"tokens": 1},
        {"tokens": 32},
        {"tokens": 2**31 + 1},
        {"seed": None},
        {"block": 32},
    ],
    ids=["dtype", "alignment", "one", "multiple of 16", "64 bits", "absent", "constant"],
)
def test_what_triton_specialises_on_is_another_kind(
    kernel: CountedKernel, other: dict[str, Any]
) -> None:
    call = {"x": torch.empty(64), "tokens": 17, "seed": torch.empty(1, dtype=torch.int64)}
    launch(kernel, **call)
    launch(kernel, **call | other)
    assert kernel.compilations == 2
    launch(kernel, **call | other)
    assert kernel.compilations == 2


def test_a_kept_kernel_keeps_no_tensor_alive(kernel: CountedKernel) -> None:
    x, seed = torch.empty(16), torch.empty(1, dtype=torch.int64)
    launch(kernel, x, 17, seed)
    launch(kernel, x, 17, seed)
    kernel.calls.clear()
    gone = [weakref.ref(x), weakref.ref(seed)]
    del x, seed
    assert [reference() for reference in gone] == [None, None]


def test_parameters_are_tensors_and_other_objects_are_refused(kernel: CountedKernel) -> None:
    seed = torch.empty(1, dtype=torch.int64)
    for _ in range(2):
        weight = torch.nn.Parameter(torch.empty(16))
        launch(kernel, weight, 17, seed)
        assert kernel.calls[-1][1] is weight
    assert kernel.compilations == 1
    with pytest.raises(TypeError, match="an argument is a list, expected a Tensor"):
        launch(kernel, [1.0], 17, seed)


@pytest.mark.slow
def test_the_short_cut_starts_what_triton_would(tmp_path: Path) -> None:
    """In a process of its own: this one may be interpreting."""
    checkout = Path(__file__).resolve().parents[2]
    paths = [str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, str(checkout / "tests/kernels/launch_triton.py")],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "TRITON_INTERPRET": "0",
            "TRITON_CACHE_DIR": str(tmp_path),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["different"] == []
    assert 0 < found["launches"] - found["short"] < found["launches"] / 2
