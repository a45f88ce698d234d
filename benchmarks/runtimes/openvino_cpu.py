"""OpenVINO's CPU plugin: float32, bfloat16, or int8 after NNCF's post-training quantisation."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import openvino

from benchmarks.runtimes import Job, Session
from benchmarks.runtimes.onnx_export import onnx_file

_CALIBRATION_BATCHES = 32


def open_session(job: Job) -> Session:
    """A compiled model at the job's static shape, one latency-oriented stream."""
    core = openvino.Core()
    ids, mask = job.read_inputs()
    feed = {"input_ids": ids, **({} if mask is None else {"attention_mask": mask})}
    can_bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if job.dtype == "bfloat16" and not can_bf16:
        raise ValueError("openvino_cpu: dtype=bfloat16, expected float32 or int8 on this CPU.")
    if job.dtype == "int8":
        model = core.read_model(_quantized(core, job, feed))
    else:
        model = core.read_model(onnx_file(job))
        model.reshape({name: list(array.shape) for name, array in feed.items()})
    # What is not quantised runs in bfloat16 where it can: the plugin's own, faster choice.
    precision = "f32" if job.dtype == "float32" or not can_bf16 else "bf16"
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": job.threads,
        "INFERENCE_PRECISION_HINT": precision,
    }
    compiled = core.compile_model(model, "CPU", settings)
    request = compiled.create_infer_request()
    for name, array in feed.items():
        request.set_tensor(name, openvino.Tensor(array.astype(np.int64)))

    def output() -> np.ndarray[Any, np.dtype[np.float32]]:
        request.infer()
        return np.array(request.get_output_tensor().data, dtype=np.float32)

    notes = {
        "openvino": openvino.__version__,
        "precision_hint": precision,
        "products_run_in": _precisions(compiled),
    }
    return Session(request.infer, output, notes)


def _quantized(core: openvino.Core, job: Job, feed: dict[str, Any]) -> Path:
    """The int8 model, calibrated on random ids of the input's own shape and padding."""
    import nncf

    shape = "x".join(str(size) for size in feed["input_ids"].shape)
    path = job.cached(f"{shape}{'-masked' if len(feed) > 1 else ''}.int8.xml")
    if path.exists():
        return path
    model = core.read_model(onnx_file(job))
    model.reshape({name: list(array.shape) for name, array in feed.items()})
    draw = np.random.default_rng(1)
    high = int(feed["input_ids"].max()) + 1

    def sample(_: int) -> dict[str, Any]:
        drawn = draw.integers(1, high, feed["input_ids"].shape)
        return {**feed, "input_ids": drawn * (feed["input_ids"] > 0)}

    quantized = nncf.quantize(
        model,
        nncf.Dataset(range(_CALIBRATION_BATCHES), sample),
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=_CALIBRATION_BATCHES,
    )
    unfinished = path.with_suffix(".part.xml")
    openvino.save_model(quantized, unfinished, compress_to_fp16=False)
    os.replace(unfinished.with_suffix(".bin"), path.with_suffix(".bin"))
    os.replace(unfinished, path)
    return path


def _precisions(compiled: openvino.CompiledModel) -> dict[str, int]:
    """Precision of each fully connected layer of the graph that runs: proof of the dtype."""
    counts: dict[str, int] = {}
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        if "FullyConnected" in str(_value(info["layerType"])):
            precision = str(_value(info["runtimePrecision"]))
            counts[precision] = counts.get(precision, 0) + 1
    return counts


def _value(entry: Any) -> Any:
    return entry.value if hasattr(entry, "value") else entry
