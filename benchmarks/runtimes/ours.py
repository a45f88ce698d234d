"""Our own model: the full network at a subnet, or a dense copy of the subnet alone."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from torch import nn

import dynabert_kernels
from benchmarks.geometry import Geometry
from benchmarks.plain_bert import load_state
from benchmarks.runtimes import Job, Session, geometry_of
from dynabert import DynaBertConfig, DynaBertModel, SubnetConfig
from dynabert.hf_checkpoint import from_hf_state_dict
from dynabert.subnet import LayerShape, SubnetShape
from dynabert_kernels import use_backend

EXTRACTED = "extracted"
_INELASTIC = ("out_bias", "down_bias", "norm_weight", "norm_bias")


def full_model(geometry: Geometry, weights: Path) -> DynaBertModel:
    """A float32 model in eval mode with the weights of a file of Hugging Face's names."""
    config = DynaBertConfig(
        vocab_size=geometry.vocab_size,
        hidden_size=geometry.hidden_size,
        num_hidden_layers=geometry.num_layers,
        num_attention_heads=geometry.num_heads,
        intermediate_size=geometry.intermediate_size,
    )
    model = DynaBertModel(config, add_pooling_layer=False)
    model.load_state_dict(from_hf_state_dict(load_state(weights)[0], config, prefix=""))
    model.eval().requires_grad_(False)
    return model


def extracted_model(model: DynaBertModel, subnet: SubnetConfig) -> DynaBertModel:
    """A model that holds copies of the subnet's weights and no others; run it at `dense_shape`."""
    shape = model.subnet_shape(subnet)
    small = copy.copy(model)
    small.config = copy.deepcopy(model.config)
    small.config.num_hidden_layers = len(shape.layers)
    small._modules = dict(model._modules)
    small.encoder = copy.copy(model.encoder)
    small.encoder._modules = {}
    kept = nn.ModuleList()
    for layer in shape.layers:
        dense = copy.deepcopy(model.encoder.layer[layer.index])
        for sublayer, count in (
            (dense.attention, layer.num_heads),
            (dense.ffn, layer.intermediate_size),
        ):
            for name, tensor in sublayer.named_parameters():
                if name not in _INELASTIC:
                    prefix = nn.Parameter(tensor[:count].clone(), requires_grad=False)
                    setattr(sublayer, name, prefix)
        kept.append(dense)
    small.encoder.layer = kept
    return small


def dense_shape(shape: SubnetShape) -> SubnetShape:
    """The shape of the whole of an extracted model."""
    layers = tuple(
        LayerShape(index, layer.num_heads, layer.intermediate_size)
        for index, layer in enumerate(shape.layers)
    )
    return SubnetShape(layers, tuple(range(len(layers) + 1)))


def in_dtype(model: DynaBertModel, dtype: str) -> DynaBertModel:
    """The model in a dtype; int8 through the model's own `quantize`.

    Raises:
        NotImplementedError: The model cannot be quantised.
    """
    if dtype != "int8":
        return nn.Module.to(model, getattr(torch, dtype))
    if not hasattr(model, "quantize"):
        raise NotImplementedError("DynaBertModel has no quantize()")
    return model.quantize("int8") or model


def open_session(job: Job) -> Session:
    """The full model called with ``subnet=``, or the extracted one."""
    torch.set_num_threads(job.threads)
    if job.backend:
        use_backend(job.backend)
    subnet: SubnetConfig | SubnetShape = SubnetConfig(job.width, job.depth)
    model = full_model(geometry_of(job), Path(job.full_weights))
    if job.variant == EXTRACTED:
        shape = dense_shape(model.subnet_shape(subnet))
        model, subnet = extracted_model(model, SubnetConfig(job.width, job.depth)), shape
    model = in_dtype(model, job.dtype)
    ids, mask = (None if a is None else torch.from_numpy(a) for a in job.read_inputs())

    def run() -> torch.Tensor:
        with torch.inference_mode():
            return model(input_ids=ids, attention_mask=mask, subnet=subnet).last_hidden_state

    notes = {
        "torch": torch.__version__,
        "dynabert_kernels": dynabert_kernels.__version__,
        "backend": job.backend or "auto",
        "isa": isa_name(),
    }
    return Session(run, lambda: run().float().numpy().astype(np.float32), notes)


def isa_name() -> str:
    """Instruction set the extension uses, or why there is none."""
    from dynabert_kernels._extension import cpu_extension

    try:
        return str(cpu_extension().isa_name())
    except (ImportError, ValueError) as error:
        return f"none: {error}"
