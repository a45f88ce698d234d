"""The plain encoder as an ONNX file, exported once per subnet and kept for later workers."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch

from benchmarks.plain_bert import load_plain
from benchmarks.runtimes import Job

_OPSET = 17


def onnx_file(job: Job) -> Path:
    """Path of the float32 graph, batch and length dynamic, with a mask input if the job has one."""
    masked = job.read_inputs()[1] is not None
    path = job.cached("masked.onnx" if masked else "onnx")
    if path.exists():
        return path
    model = load_plain(Path(job.subnet_weights)).spell_out_attention()
    ids = torch.ones(2, 8, dtype=torch.long)  # two of each, or exporters take the 1 for granted
    inputs = {"input_ids": ids, **({"attention_mask": torch.ones_like(ids)} if masked else {})}
    unfinished = path.with_suffix(".part")
    with torch.no_grad(), warnings.catch_warnings():
        # The tracing exporter: its graph is the one that graph optimisers look for.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            tuple(inputs.values()),
            str(unfinished),
            input_names=list(inputs),
            output_names=["last_hidden_state"],
            dynamic_axes={name: {0: "batch", 1: "seq"} for name in inputs},
            opset_version=_OPSET,
            dynamo=False,
        )
    os.replace(unfinished, path)
    return path
