"""The `backend` fixture: every backend of the op that a test module names as `OP`.

A backend that joins the op table joins these tests with nothing more to write. A skip prints the
table's own reason. Without a GPU, `triton` runs in Triton's interpreter (tests/conftest.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dynabert_kernels import use_backend
from dynabert_kernels.ops import Op
from dynabert_kernels.triton import availability

_OF_SINGLE_KERNELS = {
    f"test_triton_{name}.py" for name in ("attention", "gemm", "norm", "weight_gradient")
}


@dataclass(frozen=True)
class BackendUnderTest:
    """One backend of one op; calling it runs a function with this backend forced."""

    op: Op[Any]
    name: str
    device: str

    @property
    def repeats(self) -> int:
        """Calls that a test of repeatability makes; Triton's interpreter is slow and serial."""
        return 1 if self.name == "triton" and self.device == "cpu" else 20

    def __call__(self, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        # NumPy would warn of every NaN it computes with.
        with use_backend(self.name), np.errstate(all="ignore"):
            try:
                return function(*args, **kwargs)
            except NotImplementedError as error:
                reasons = [line.strip() for line in str(error).splitlines()]
                pytest.skip(next(r for r in reasons if r.startswith(f"{self.name}:")))


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves to `slow` what Triton's interpreter need not run every time.

    It takes a good part of a second a call. Without a GPU the quick tests of an op take the first
    value of each parameter, the ordinary case, and vary one at a time in a single test; those of
    single kernels take every third case of a test.
    """
    ordinary: dict[str, dict[str, Any]] = {}
    seen: Counter[str] = Counter()
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if item.path.name in _OF_SINGLE_KERNELS and availability.INTERPRETED:
            test = item.nodeid.partition("[")[0]
            if seen[test] % 3 > 0:
                item.add_marker(pytest.mark.slow)
            seen[test] += 1
        case = params.get("backend")
        if isinstance(case, BackendUnderTest) and (case.name, case.device) == ("triton", "cpu"):
            first = ordinary.setdefault(item.nodeid.partition("[")[0], params)
            varied = sum(params[name] != value for name, value in first.items())
            if varied > ("::test_is_as_accurate_as_pytorch[" in item.nodeid):
                item.add_marker(pytest.mark.slow)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        op = metafunc.module.OP
        cases = [BackendUnderTest(op, backend.name, backend.device) for backend in op.backends]
        cases.append(BackendUnderTest(op, "reference", "cpu"))
        if torch.cuda.is_available():
            cases.append(BackendUnderTest(op, "reference", "cuda"))
        names = [case.name if case.device == "cpu" else f"{case.name}_cuda" for case in cases]
        metafunc.parametrize("backend", cases, ids=names, indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> BackendUnderTest:
    case = request.param
    reason = dict(case.op.status(case.device))[case.name]
    if reason is None and case.device == "cuda" and not torch.cuda.is_available():
        reason = "torch.cuda.is_available() is False"
    if reason is not None:
        pytest.skip(f"{case.name}: {reason}")
    return case


@pytest.fixture(autouse=True)
def automatic_backend() -> Iterator[None]:
    """Every test starts and ends with no backend forced."""
    with use_backend(None):
        yield


@pytest.fixture(autouse=True, scope="session")
def bounds_of_memory() -> Iterator[None]:
    """In Triton's interpreter, no kernel may leave the memory of its arguments (bounds.py)."""
    if not availability.INTERPRETED or availability.triton_missing() is not None:
        yield
        return
    from tests.kernels.bounds import Bounds

    bounds = Bounds()
    bounds.install()
    yield
    bounds.remove()
