"""The benchmark of the CUDA C++ kernels at tiny sizes on the CPU, PyTorch in the kernels' place."""

from __future__ import annotations

import types

import pytest
import torch
import torch.nn.functional as F

from benchmarks import gpu_cuda, gpu_cuda_cases, gpu_timing
from benchmarks.geometry import SUBNETS, WIDTHS, Geometry, Subnet
from benchmarks.gpu_cuda_cases import Encoder
from benchmarks.records import Deadline, Recorder
from dynabert_kernels import _cuda_extension

GEOMETRY = Geometry("tiny", 64, 4, 16, 128, 4)


class TorchLibrary:
    """Computes what the kernels are documented to; `factor` makes it wrong."""

    def __init__(self, encoder: Encoder, factor: float = 1.0) -> None:
        self.encoder, self.factor = encoder, factor

    def gemm_rows(self, x, weight, bias, out, *, width, gelu, hopper):
        product = F.linear(x, weight[:width], bias[:width])
        return out.copy_((F.gelu(product) if gelu else product) * self.factor)

    def gemm_columns(self, x, weight, bias, out, *, residual, norm, workspace, eps, hopper):
        assert (norm is None) == (workspace is None)
        assert hopper or residual is None
        total = F.linear(x, weight[: x.shape[1]].t(), bias)
        if residual is not None:
            total = total + residual
        if norm is not None:
            total = F.layer_norm(total, bias.shape, *norm, eps)
        return out.copy_(total * self.factor)

    def norm_workspace_bytes(self):
        return 16

    def encoder_why_not(self, shape):
        return "tokens are not from 1 to 512" if shape.tokens > 512 else None

    def encoder_workspace_bytes(self, shape):
        return 16

    def encoder_forward(self, shape, hidden, out, offsets, layers, subnet, workspace, eps):
        # The subnet as a kernel reads it: from the tables.
        num_kept, kept, heads, neurons = (tensor.tolist() for tensor in subnet)
        tensors = self.encoder.tensors
        addresses = [[tensor.data_ptr() for tensor in layer.values()] for layer in tensors]
        assert layers.tolist() == addresses and offsets.tolist() == [0, shape.tokens]
        chosen = Subnet(GEOMETRY, heads[0] / 4, num_kept[0] / 4)
        assert tuple(kept[: num_kept[0]]) == chosen.layers
        assert neurons[0] == chosen.intermediate_size
        dense = self.encoder.dense(chosen, hidden.dtype)
        result = gpu_cuda_cases.plain_layers(hidden, dense, shape.head_dim)
        return out.copy_(result * self.factor)


@pytest.fixture(scope="module")
def encoder():
    return Encoder(GEOMETRY, "cpu")


@pytest.fixture
def recorder(tmp_path):
    return Recorder(tmp_path, {"hardware": "test"}, "abc")


@pytest.fixture(autouse=True)
def few_calls(monkeypatch):
    monkeypatch.setattr(gpu_cuda_cases, "CALLS", 2)
    # What `rehearse` sets: one sample each.
    monkeypatch.setattr(gpu_timing, "_is_rehearsal", True)


def test_every_case_has_its_rows(recorder, encoder):
    gpu_cuda_cases.run(recorder, TorchLibrary(encoder), encoder, Deadline(600), 16, [7, 5])
    assert [row for row in recorder.rows if "error" in row] == []
    assert all(row["median_ms"] > 0 for row in recorder.rows)
    encoders = [row for row in recorder.rows if row["section"] == "encoder"]
    # Two peers, warm and cold: twelve subnets at the first length and two at the other.
    assert len(encoders) == 2 * 2 * (len(SUBNETS) + 2)
    products = [row for row in recorder.rows if row["section"] == "product"]
    assert len(products) == len(WIDTHS) * (2 * 4 + 2 * 8)
    assert "cuda + norm" in gpu_cuda_cases.tables(recorder.rows)


def test_a_wrong_kernel_is_an_error_and_not_a_timing(recorder, encoder):
    wrong = TorchLibrary(encoder, factor=1.1)
    gpu_cuda_cases.run(recorder, wrong, encoder, Deadline(600), 16, [7])
    timed = {row["peer"] for row in recorder.rows if "median_ms" in row}
    assert timed == {"pytorch", "pytorch + residual", "pytorch + norm", "cublas alone"}
    errors = [row["error"] for row in recorder.rows if "error" in row]
    assert errors and all("relative error" in error for error in errors)


def test_a_shape_the_encoder_refuses_is_said(recorder, encoder):
    subnets = [Subnet(GEOMETRY, 1.0, 1.0)]
    library = TorchLibrary(encoder)
    gpu_cuda_cases.time_encoder(recorder, library, encoder, 513, subnets, Deadline(600))
    (row,) = recorder.rows
    assert row["error"] == "tokens are not from 1 to 512"


def test_no_time_left_is_said(recorder, encoder):
    gpu_cuda_cases.run(recorder, TorchLibrary(encoder), encoder, Deadline(0), 16, [7])
    assert {row["case"] for row in recorder.rows} == {"cut short"}


def test_without_kernels_or_a_card_it_says_so(monkeypatch):
    monkeypatch.setattr(_cuda_extension, "_load", lambda: (None, "CUDA kernels not built: no nvcc"))
    with pytest.raises(SystemExit, match="gpu_cuda: CUDA kernels not built: no nvcc"):
        gpu_cuda.main([])
    monkeypatch.setattr(_cuda_extension, "_load", lambda: (types.ModuleType("kernels"), None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch sees no CUDA device"):
        gpu_cuda.main([])
