"""Every subnet of the grid, BERT and RoBERTa, every head, in every format."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from dynabert import SubnetConfig, subnet_grid
from dynabert.export import export_subnet
from dynabert_kernels import use_backend
from dynabert_kernels.ops import _cpu

pytestmark = pytest.mark.slow

GRID = subnet_grid((1, 0.75, 0.5, 0.25), (1, 2 / 3, 1 / 2))
FULL_WIDTH = [subnet for subnet in GRID if subnet.width_mult == 1]
SHAPES = ((12,), (23, 1, 12), (5, 5, 2, 1))
HEADS = {
    "Model": "AutoModel",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForMaskedLM": "AutoModelForMaskedLM",
}
BACKENDS = ["reference", *(["cpu"] if _cpu.kernels_missing() is None else [])]


def outputs(model: Any, batch: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        output = model(**batch, **options)
    return {name: value for name, value in output.items() if isinstance(value, Tensor)}


def onnx_outputs(folder: Path, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What ONNX Runtime computes, of the inputs the file asks for."""
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    feed = {entry.name: batch[entry.name].numpy() for entry in session.get_inputs()}
    names = [entry.name for entry in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(names, feed)), strict=True))


def assert_near(
    found: dict[str, Tensor], expected: dict[str, Tensor], atol: float, mask: Tensor | None = None
) -> None:
    """Equal everywhere, or with a `mask` at every real token."""
    for name, value in expected.items():
        real: Any = slice(None)
        if mask is not None and value.shape[:2] == mask.shape:
            real = mask != 0
        torch.testing.assert_close(found[name][real], value[real], atol=atol, rtol=0, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_our_own_format_of_every_subnet(
    make_hf: Any, ours: Any, make_batch: Any, architecture: str, backend: str, tmp_path: Path
) -> None:
    model = ours(make_hf(architecture))
    auto = transformers.AutoModelForSequenceClassification
    for subnet in GRID:
        folder = tmp_path / subnet.name
        export_subnet(model, subnet, folder)
        loaded = auto.from_pretrained(folder).eval()
        for lengths in SHAPES:
            batch = make_batch(model.config, lengths, extra=0)
            with use_backend(backend):
                expected = outputs(model, batch, subnet=subnet)["logits"]
                assert torch.equal(outputs(loaded, batch)["logits"], expected), subnet.name


@pytest.mark.parametrize("head", HEADS)
def test_plain_models_of_every_depth(
    make_hf: Any, ours: Any, make_batch: Any, architecture: str, head: str, tmp_path: Path
) -> None:
    model = ours(make_hf(architecture, head), head)
    for subnet in FULL_WIDTH:
        folder = tmp_path / subnet.name
        export_subnet(model, subnet, folder, format="transformers")
        plain = getattr(transformers, HEADS[head]).from_pretrained(folder).eval()
        for lengths in SHAPES:
            batch = make_batch(model.config, lengths, extra=0)
            expected = outputs(model, batch, subnet=subnet)
            assert_near(outputs(plain, batch), expected, 1e-5, batch["attention_mask"])


@pytest.mark.parametrize("subnet", GRID, ids=lambda subnet: subnet.name)
def test_onnx_of_every_subnet(
    make_hf: Any, ours: Any, make_batch: Any, architecture: str, subnet: Any, tmp_path: Path
) -> None:
    model = ours(make_hf(architecture))
    export_subnet(model, subnet, tmp_path / "out", format="onnx")
    for lengths in SHAPES:
        batch = make_batch(model.config, lengths, extra=0)
        expected = outputs(model, batch, subnet=subnet)
        assert_near(onnx_outputs(tmp_path / "out", batch), expected, 1e-4)


@pytest.mark.parametrize("head", HEADS)
def test_onnx_of_every_head(
    make_hf: Any, ours: Any, make_batch: Any, architecture: str, head: str, tmp_path: Path
) -> None:
    # RoBERTa as published has one token type, and no such input.
    types = {"type_vocab_size": 1} if architecture == "roberta" else {}
    model = ours(make_hf(architecture, head, num_hidden_layers=2, **types), head)
    subnet = SubnetConfig(num_heads=(3, 7), intermediate_size=(84, 5))
    export_subnet(model, subnet, tmp_path / "out", format="onnx")
    for lengths in SHAPES:
        batch = make_batch(model.config, lengths, extra=0)
        expected = outputs(model, batch, subnet=subnet)
        assert_near(onnx_outputs(tmp_path / "out", batch), expected, 1e-4)


_WITHOUT_US = """
import sys
import numpy as np

sys.modules.update(dynabert=None, dynabert_kernels=None, transformers=None)
import torch

module = torch.export.load(sys.argv[1] + "/model.pt2").module()
for number in range(int(sys.argv[2])):
    batch = {k: torch.from_numpy(v) for k, v in np.load(f"{sys.argv[1]}/{number}.npz").items()}
    with torch.no_grad():
        np.save(f"{sys.argv[1]}/{number}.npy", module(**batch)[0].numpy())
"""


def test_a_program_runs_without_us(
    make_hf: Any, ours: Any, make_batch: Any, architecture: str, tmp_path: Path
) -> None:
    model, subnet = ours(make_hf(architecture, num_hidden_layers=2)), SubnetConfig(0.5, 0.5)
    export_subnet(model, subnet, tmp_path / "out", format="torch-export")
    made = [
        make_batch(model.config, lengths, extra=0)
        for lengths in (*SHAPES, (1,), (model.config.max_seq_len, 2))
    ]
    for number, batch in enumerate(made):
        np.savez(tmp_path / "out" / f"{number}.npz", **{k: v.numpy() for k, v in batch.items()})
    command = [sys.executable, "-c", _WITHOUT_US, str(tmp_path / "out"), str(len(made))]
    subprocess.run(command, check=True)
    for number, batch in enumerate(made):
        found = torch.from_numpy(np.load(tmp_path / "out" / f"{number}.npy"))
        expected = outputs(model, batch, subnet=subnet)["logits"]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
