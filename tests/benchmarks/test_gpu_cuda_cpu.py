"""The benchmark of the CUDA C++ kernels at tiny sizes on the CPU, PyTorch in the kernels' place."""

from __future__ import annotations

import ctypes
import re

import pytest
import torch.nn.functional as F

from benchmarks import cuda_library, gpu_cuda, gpu_cuda_cases, gpu_timing
from benchmarks.geometry import SUBNETS, WIDTHS, Geometry, Subnet
from benchmarks.gpu_cuda_cases import Encoder
from benchmarks.records import Deadline, Recorder

GEOMETRY = Geometry("tiny", 64, 4, 16, 128, 4)


class TorchLibrary:
    """Computes what the kernels are documented to; `factor` makes it wrong."""

    def __init__(self, encoder: Encoder, factor: float = 1.0) -> None:
        self.encoder, self.factor = encoder, factor

    def gemm_rows(self, x, weight, bias, out, *, width, gelu):
        product = F.linear(x, weight[:width], bias[:width])
        return out.copy_((F.gelu(product) if gelu else product) * self.factor)

    def gemm_columns(self, x, weight, bias, residual, out, *, norm, workspace, eps):
        assert (norm is None) == (workspace is None)
        total = F.linear(x, weight[: x.shape[1]].t(), bias) + residual
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
    assert len(products) == len(WIDTHS) * (2 * 3 + 2 * 5)
    assert "cuda + norm" in gpu_cuda_cases.tables(recorder.rows)


def test_a_wrong_kernel_is_an_error_and_not_a_timing(recorder, encoder):
    wrong = TorchLibrary(encoder, factor=1.1)
    gpu_cuda_cases.run(recorder, wrong, encoder, Deadline(600), 16, [7])
    timed = {row["peer"] for row in recorder.rows if "median_ms" in row}
    assert timed == {"pytorch", "pytorch + norm", "cublas alone"}
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


def test_signatures_are_those_of_the_c_names():
    types = {
        "int": ctypes.c_int,
        "std::int32_t": ctypes.c_int32,
        "std::int64_t": ctypes.c_int64,
        "std::size_t": ctypes.c_size_t,
        "float": ctypes.c_float,
        "cudaStream_t": ctypes.c_void_p,
        "const char*": ctypes.c_char_p,
    }
    declared = {}
    for path in (cuda_library.CSRC / "cuda" / "tests").glob("*_c_api.cu"):
        for result, name, arguments in re.findall(
            r"^(\S.*?) (dynabert_\w+)\(([^)]*)\) {", path.read_text(), re.M
        ):
            declared[name] = (
                types[result],
                [
                    types.get(argument.rsplit(" ", 1)[0].strip(), ctypes.c_void_p)
                    for argument in arguments.split(",")
                ],
            )
    assert declared == cuda_library._SIGNATURES


def test_without_a_card_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(gpu_cuda, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(gpu_cuda, "compute_capability", lambda: None)
    with pytest.raises(SystemExit, match="no GPU answers"):
        gpu_cuda.main([])
