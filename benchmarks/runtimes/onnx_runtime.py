"""ONNX Runtime: the graph fused by its transformer optimiser; int8 by dynamic quantisation."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers import optimizer
from onnxruntime.transformers.fusion_options import FusionOptions

from benchmarks.runtimes import Job, Session
from benchmarks.runtimes.onnx_export import onnx_file


def open_session(job: Job) -> Session:
    """A session on the fused graph, quantised if the job is int8.

    Raises:
        ValueError: The dtype is one ONNX Runtime has no CPU kernels for.
    """
    if job.dtype not in ("float32", "int8"):
        raise ValueError(f"onnx_runtime: dtype={job.dtype}, expected float32 or int8.")
    notes: dict[str, Any] = {"onnxruntime": onnxruntime.__version__}
    path = _fused(onnx_file(job))
    if job.dtype == "int8":
        path = _quantized(path)
        notes["quantised"] = "dynamic, QInt8 per channel"
    notes["nodes"] = _count_nodes(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    ids, mask = job.read_inputs()
    given = {"input_ids": ids, "attention_mask": mask}
    feed = {entry.name: given[entry.name] for entry in session.get_inputs()}
    return Session(lambda: session.run(None, feed), lambda: session.run(None, feed)[0], notes)


def _fused(plain: Path) -> Path:
    """The graph after the transformer optimiser: fused attention, bias + GELU, skip + LayerNorm."""
    path = plain.with_suffix(".fused.onnx")
    if not path.exists():
        logging.getLogger("onnxruntime.transformers").setLevel(logging.ERROR)
        # 0 heads and 0 hidden: read from the graph, where a narrow subnet's differ from BERT's.
        model = optimizer.optimize_model(
            str(plain),
            model_type="bert",
            num_heads=0,
            hidden_size=0,
            opt_level=0,
            optimization_options=FusionOptions("bert"),
        )
        unfinished = path.with_suffix(".part")
        model.save_model_to_file(str(unfinished))
        os.replace(unfinished, path)
    return path


def _quantized(fused: Path) -> Path:
    path = fused.with_suffix(".int8.onnx")
    if not path.exists():
        unfinished = path.with_suffix(".part")
        quantize_dynamic(
            fused,
            unfinished,
            per_channel=True,
            weight_type=QuantType.QInt8,
            # ONNX's shape inference stops at the fused operators; all their tensors are float32.
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )
        os.replace(unfinished, path)
    return path


def _count_nodes(path: Path) -> dict[str, int]:
    """How often each heavy operator occurs: whether fusion and quantisation took place."""
    heavy = ("Attention", "MatMul", "Gelu", "LayerNorm")
    counts: dict[str, int] = {}
    for node in onnx.load(path, load_external_data=False).graph.node:
        if any(part in node.op_type for part in heavy):
            counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts
