"""The Triton benchmark's logic at tiny sizes, in Triton's interpreter: every case has its row."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

if find_spec("triton") is None:
    pytest.skip("the triton package is not installed", allow_module_level=True)

from benchmarks import gpu_attention, gpu_products, gpu_triton
from benchmarks.geometry import Geometry
from benchmarks.gpu_product_cases import CASES, MIXED, NORM
from benchmarks.gpu_timing import relative_error
from benchmarks.records import Deadline, Recorder
from dynabert_kernels import use_backend
from dynabert_kernels.triton.availability import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET is not set")
GEOMETRY = Geometry("tiny", 32, 4, 32, 64, 2)


@pytest.fixture
def recorder(tmp_path):
    return Recorder(tmp_path, {"hardware": "test"}, "abc")


@pytest.mark.slow
def test_every_section_records_checked_timings(recorder):
    with use_backend(None):
        gpu_triton.run(recorder, Deadline(600), "cpu", torch.float16, GEOMETRY, [[3, 3]])
    assert [row for row in recorder.rows if "error" in row] == []
    peers = {}
    for row in recorder.rows:
        assert row["median_ms"] > 0
        peers.setdefault(row["section"], set()).add(row["peer"])
    assert peers["encoder"] == {"triton", "reference"}
    assert {"pytorch", "table"} < peers["gemm"] and {"pytorch", "table"} < peers["attention"]


def test_a_wrong_variant_is_an_error_and_not_a_timing(recorder):
    truth = torch.randn(4, 4, dtype=torch.float64)
    calls = {"wrong": lambda: truth.float() * 1.01, "right": truth.float}
    gpu_triton._time(recorder, "cpu", "gemm", "case", calls, truth.float(), truth, 1.0)
    assert [row["peer"] for row in recorder.rows if "median_ms" in row] == ["right"]
    (row,) = (row for row in recorder.rows if "error" in row)
    assert row["peer"] == "wrong" and row["error"].startswith("AssertionError: wrong: ")


def test_no_time_left_is_said(recorder):
    gpu_triton.run(recorder, Deadline(0), "cpu", torch.float16, GEOMETRY, [[3]])
    (row,) = recorder.rows
    assert row["case"] == "cut short"


@pytest.mark.slow
def test_our_launchers_do_what_the_peers_of_each_product_do(recorder):
    sweep = gpu_products.Sweep(recorder, "cpu", tokens=16, with_ours=True)
    with torch.no_grad():
        for case in CASES:
            sweep.run(case, GEOMETRY, 0.5, compile=False)
            if case.kind in MIXED:
                sweep.mixed(case, GEOMETRY)
    assert [row for row in recorder.rows if "error" in row] == []
    timed = {(row["case"], row["peer"]) for row in recorder.rows}
    assert timed >= {(case.kind, "ours") for case in CASES}
    assert timed >= {(case.kind, "ours device width") for case in CASES if case.kind != NORM}
    assert timed >= {(f"{kind} mixed", "ours") for kind in MIXED}


@pytest.mark.slow
def test_our_attention_does_what_the_peers_do(recorder):
    # The peers compute in bfloat16, which the interpreter's products do not; ours is checked alone.
    qkv = torch.randn(2, 8, 3, 4, 32)
    gradient = torch.randn(2, 4, 8, 32)
    for backward in (False, True):
        calls = gpu_attention._dense_calls(qkv, gradient, backward, with_ours=True)
        expected = gpu_attention._reference(qkv, gradient, backward)
        for name in [name for name in calls if name.startswith("ours")]:
            found = calls[name].restored(calls[name].run())
            assert relative_error(found, expected) < 1e-3, name
