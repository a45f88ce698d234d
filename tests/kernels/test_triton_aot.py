"""Every Triton kernel compiles ahead of time, without a GPU, for the cards it is meant for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
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


def matmul(
    capability, dtype, form, activation, tokens, outputs, inputs, tiled=False, training=False
):
    return locals() | {"launch": "product"}


def attention(
    capability,
    dtype,
    head_dim,
    max_seqlen,
    dropout=False,
    device_heads=False,
    batch_size=99,
    short=False,
    launch="attention",
):
    return locals()


attention_gradient = partial(attention, launch="attention_gradient")


def norm(capability, dtype, channels, parts, training=False):
    return locals() | {"launch": "norm"}


def norm_gradient(capability, dtype, channels, parts=1, training=True):
    return locals() | {"launch": "norm_gradient"}


def weight_gradient(capability, dtype, tokens, outputs, inputs, tiled, with_bias=True):
    return locals() | {"launch": "weight_gradient"}


def padding(capability, dtype, seq_len, channels, ordered):
    return locals() | {"launch": "padding"}


def embeddings(capability, dtype, channels, given):
    return locals() | {"launch": "embeddings"}


def case_id(case):
    values = [v for name, v in case.items() if name not in ("launch", "capability")]
    return "-".join(map(str, (case["launch"], f"sm{case['capability']}", *values)))


FAST = [
    case
    for sm in (80, 90)
    for case in (
        *(matmul(sm, "bfloat16", "rows", "gelu", tokens, 3072, 768) for tokens in BATCHES),
        *(matmul(sm, "bfloat16", "columns", "none", tokens, 768, 3072) for tokens in BATCHES),
        matmul(sm, "float32", "rows", "gelu", 1024, 3072, 768),
        matmul(sm, "float16", "rows", "gelu", 1024, 77, 768),
        *(
            matmul(sm, "bfloat16", form, "gelu", 16384, *sizes, tiled, training=True)
            for form, *sizes in (
                ("rows", 3072, 768),
                ("gradient", 3072, 768),
                ("columns", 768, 3072),
            )
            for tiled in (False, True)
        ),
        attention(sm, "bfloat16", 64, 128),
        attention(sm, "bfloat16", 64, 512),
        attention(sm, "float32", 64, 128),
        attention(sm, "bfloat16", 64, 128, batch_size=1),
        attention(sm, "bfloat16", 64, 128, short=True),
        attention(sm, "bfloat16", 64, 128, dropout=True, device_heads=True),
        attention_gradient(sm, "bfloat16", 64, 128),
        attention_gradient(sm, "bfloat16", 64, 128, short=True),
        attention_gradient(sm, "bfloat16", 64, 128, dropout=True, device_heads=True),
        attention_gradient(sm, "bfloat16", 64, 512),
        norm(sm, "bfloat16", 768, 1),
        norm(sm, "bfloat16", 768, 8),
        norm(sm, "bfloat16", 768, 8, training=True),
        norm_gradient(sm, "bfloat16", 768),
        *(weight_gradient(sm, "bfloat16", 16384, 3072, 768, tiled) for tiled in (False, True)),
        weight_gradient(sm, "float16", 1024, 77, 768, True),
        weight_gradient(sm, "float32", 1024, 3072, 768, True),
        *(padding(sm, "bfloat16", 128, 768, ordered) for ordered in (False, True)),
        *(embeddings(sm, "bfloat16", 768, given) for given in (False, True)),
    )
]
ALL = [
    *(
        matmul(sm, dtype, form, activation, tokens, outputs, inputs)
        for sm, dtype, tokens in product((80, 90), DTYPES, BATCHES)
        for form, activation in (
            *product(["rows"], ["none", *ACTIVATIONS]),
            ("columns", "none"),
        )
        # Whole tiles, tiles cut off on both sides, and rows that no wide copy can fetch.
        for outputs, inputs in ((768, 768), (208, 336), (77, 63))
    ),
    *(
        matmul(sm, dtype, form, activation, tokens, 768, inputs, tiled, training=True)
        for sm, dtype, tokens in product((80, 90), DTYPES, BATCHES)
        for form, activation in (*product(["rows", "gradient"], ACTIVATIONS), ("columns", "none"))
        for inputs, tiled in product((768, 336), (False, True))
    ),
    *(
        direction(sm, dtype, head_dim, max_seqlen, dropout)
        for direction in (attention, attention_gradient)
        for sm, dtype, head_dim in product((80, 90), DTYPES, HEAD_DIMS)
        for max_seqlen, dropout in product((1, 32, 64, 128, 512), (False, True))
    ),
    *(
        norm(sm, dtype, channels, parts, training)
        for sm, dtype in product((80, 90), DTYPES)
        for channels, parts in product((77, 768, 1024, 4096), (1, 2, 4, 8))
        for training in (False, True)
    ),
    *(
        norm_gradient(sm, dtype, channels, training=training)
        for sm, dtype in product((80, 90), DTYPES)
        for channels, training in product((77, 768, 1024, 4096), (False, True))
    ),
    *(
        weight_gradient(sm, dtype, tokens, outputs, inputs, tiled, with_bias)
        for sm, dtype in product((80, 90), DTYPES)
        for tokens, outputs, inputs in product((1024, 16384), (3072, 77), (768, 77))
        for tiled, with_bias in product((False, True), (False, True))
    ),
    *(
        padding(sm, dtype, seq_len, channels, True)
        for sm, dtype in product((80, 90), DTYPES)
        for seq_len, channels in product((1, 77, 512), (77, 1024, 4096))
    ),
    *(
        embeddings(sm, dtype, channels, True)
        for sm, dtype, channels in product((80, 90), DTYPES, (77, 1024, 4096))
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
    if case["launch"] in ("norm", "norm_gradient", "padding", "embeddings"):
        return
    if case["launch"] == "weight_gradient" and case["capability"] == 90:
        aligned = case["dtype"] != "float32" and case["outputs"] % 8 == case["inputs"] % 8 == 0
        assert (needs["copy_engine"] > 0) == aligned
        assert needs["wgmma"] > 0
    if case["capability"] == 90 and case["launch"] == "product" and case["dtype"] != "float32":
        aligned = case["outputs"] % 16 == case["inputs"] % 16 == 0
        assert (needs["wgmma"] > 0) == aligned
        assert (needs["copy_engine"] > 0) == (aligned and case["tokens"] > configs.SMALL_BATCH)
    assert needs["tensor_core"] > 0, "no tensor-core instruction"
