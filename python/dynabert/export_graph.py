"""A fixed-size model as a graph that needs no code of this package: `torch.export`, and ONNX.

Both come from one recording on the reference backend, with the number of sequences and their length
left open.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynabert.export_check import Batch, Outputs, Run, example_batch, input_names
from dynabert.modeling_pretrained import DynaBertPreTrainedModel
from dynabert_kernels import use_backend

PROGRAM_FILE = "model.pt2"
ONNX_FILE = "model.onnx"
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# Lengths of the recorded batch: two of each, or the recorder takes a 1 for granted.
_RECORDED = (7, 4)


class _Graph(nn.Module):
    """The model with tensors in, tensors out: what recorders take."""

    def __init__(self, model: DynaBertPreTrainedModel, outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.outputs = model, outputs

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """The outputs named at the start, in that order."""
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            return_dict=True,
        )
        return tuple(output[name] for name in self.outputs)


def check_onnx_packages() -> None:
    """Look for what ONNX files are made and checked with, before anything is done.

    Raises:
        ImportError: A package is missing; the message names the extra that brings it.
    """
    missing = [name for name in _ONNX_PACKAGES if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"export_subnet: format='onnx' needs {', '.join(missing)}. "
            'Install with: pip install "dynabert-kernels[onnx]"'
        )


def output_names(model: DynaBertPreTrainedModel) -> tuple[str, ...]:
    """What a call of `model` without labels returns, in order."""
    with torch.no_grad(), use_backend("reference"):
        output = model(**example_batch(model.config, _RECORDED), return_dict=True)
    return tuple(name for name, value in output.items() if isinstance(value, Tensor))


def record(model: DynaBertPreTrainedModel) -> torch.export.ExportedProgram:
    """The graph of a call of `model`, a float32 model in evaluation mode on the CPU."""
    batch = torch.export.Dim("batch")
    sequence = torch.export.Dim("sequence", max=model.config.max_seq_len)
    inputs = example_batch(model.config, _RECORDED)
    # Kernels of other backends do not exist where the graph will run.
    with torch.no_grad(), use_backend("reference"):
        return torch.export.export(
            _Graph(model, output_names(model)).eval(),
            (),
            inputs,
            dynamic_shapes={name: {0: batch, 1: sequence} for name in inputs},
            strict=False,
        )


def write_program(model: DynaBertPreTrainedModel, folder: Path) -> Run:
    """Write ``model.pt2`` into `folder`; returns what runs the file as it was written."""
    torch.export.save(record(model), folder / PROGRAM_FILE)
    module: Any = torch.export.load(folder / PROGRAM_FILE).module()
    names = output_names(model)

    def run(batch: Batch) -> Outputs:
        with torch.no_grad():
            return dict(zip(names, module(**batch), strict=True))

    return run


def write_onnx(model: DynaBertPreTrainedModel, folder: Path) -> Run:
    """Write ``model.onnx`` into `folder`; returns what runs the file in ONNX Runtime.

    Weights of more than 2 GB go into a file of their own beside it.
    """
    onnxruntime: Any = import_module("onnxruntime")
    names = output_names(model)
    with _quiet_exporter():
        program = torch.onnx.export(
            record(model),
            dynamo=True,
            verbose=False,
            input_names=list(input_names(model.config)),
            output_names=list(names),
        )
    assert program is not None  # it is None for the exporter that dynamo=False selects
    program.save(folder / ONNX_FILE)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        str(folder / ONNX_FILE), options, providers=["CPUExecutionProvider"]
    )

    def run(batch: Batch) -> Outputs:
        arrays = session.run(list(names), {name: ids.numpy() for name, ids in batch.items()})
        return dict(zip(names, map(torch.from_numpy, arrays), strict=True))

    return run


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Without what the exporter says about itself: names of axes, packages it could also use."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
