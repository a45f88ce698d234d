"""Every Triton kernel compiles ahead of time, without a GPU, for the cards it is meant for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest

if find_spec("triton") is None:
    pytest.skip("the triton package is not installed", allow_module_level=True)

from dynabert_kernels.layout import ACTIVATIONS
from dynabert_kernels.triton import configs
from dynabert_kernels.triton.availability import HEAD_DIMS

# The first test waits for all that are selected.
pytestmark = pytest.mark.timeout(1800)

CHECKOUT = Path(__file__).resolve().parents[2]
# Shared memory that one program may have. What is compiled for sm_80 also serves sm_86, sm_89 and
# sm_120, which have 99 KiB; sm_90 has 227.
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024}
DTYPES = ("bfloat16", "float32")
# One batch size for each row of the table of configurations.
BATCHES = (128, 1024, 16384)


def linear(capability, dtype, form, activation, tokens, outputs, inputs):
    return locals() | {"launch": "linear"}


def attention(capability, dtype, head_dim, max_seqlen):
    return locals() | {"launch": "attention"}


def norm(capability, dtype, channels, parts):
    return locals() | {"launch": "norm"}


def case_id(case):
    values = [v for name, v in case.items() if name not in ("launch", "capability")]
    return "-".join(map(str, (case["launch"], f"sm{case['capability']}", *values)))


FAST = [
    case
    for sm in (80, 90)
    for case in (
        *(linear(sm, "bfloat16", "rows", "gelu", tokens, 3072, 768) for tokens in BATCHES),
        *(linear(sm, "bfloat16", "columns", "none", tokens, 768, 3072) for tokens in BATCHES),
        linear(sm, "float32", "rows", "gelu", 1024, 3072, 768),
        linear(sm, "float16", "rows", "gelu", 1024, 77, 768),
        attention(sm, "bfloat16", 64, 128),
        attention(sm, "bfloat16", 64, 512),
        attention(sm, "float32", 64, 128),
        norm(sm, "bfloat16", 768, 1),
        norm(sm, "bfloat16", 768, 8),
    )
]
ALL = [
    *(
        linear(sm, dtype, form, activation, tokens, outputs, inputs)
        for sm, dtype, tokens in product((80, 90), DTYPES, BATCHES)
        for form, activation in (
            *product(["rows"], ["none", *ACTIVATIONS]),
            ("columns", "none"),
        )
        # Whole tiles, tiles cut off on both sides, and rows that no wide copy can fetch.
        for outputs, inputs in ((768, 768), (208, 336), (77, 63))
    ),
    *(
        attention(sm, dtype, head_dim, max_seqlen)
        for sm, dtype, head_dim in product((80, 90), DTYPES, HEAD_DIMS)
        for max_seqlen in (1, 32, 64, 128, 512)
    ),
    *(
        norm(sm, dtype, channels, parts)
        for sm, dtype in product((80, 90), DTYPES)
        for channels, parts in product((77, 768, 1024, 4096), (1, 2, 4, 8))
    ),
]
CASES = [
    *(pytest.param(case, id=case_id(case)) for case in FAST),
    *(
        pytest.param(case, id=case_id(case), marks=pytest.mark.slow)
        for case in ALL
        if case not in FAST
    ),
]


@pytest.fixture(scope="module")
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What each selected case needs, compiled by one process: this one may be interpreting."""
    items = (item for item in request.session.items if item.path == request.path)
    cases = {item.callspec.id: item.callspec.params["case"] for item in items}
    paths = [str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, str(CHECKOUT / "tests/kernels/compile_triton.py")],
        input=json.dumps(list(cases.values())),
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "TRITON_INTERPRET": "0",
            "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton_cache")),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(cases, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_compiles_within_the_limits_of_the_card(request, compiled, case):
    needs = compiled[request.node.callspec.id]
    assert "error" not in needs, needs["error"]
    assert needs["stack"] == needs["local"] == 0, f"registers spill to memory: {needs}"
    assert needs["shared"] <= SHARED_LIMIT[case["capability"]]
    if case["launch"] == "norm":
        return
    if case["capability"] == 90 and case["launch"] == "linear" and case["dtype"] != "float32":
        aligned = case["outputs"] % 16 == case["inputs"] % 16 == 0
        assert (needs["wgmma"] > 0) == aligned
        assert (needs["copy_engine"] > 0) == (aligned and case["tokens"] > configs.SMALL_BATCH)
    assert needs["wgmma"] + needs["mma"] > 0, "no tensor-core instruction"
