"""Copy a subnet out of a model: a smaller model of the same class that stands on its own.

In packed form a subnet is a prefix, so extraction is ``t[:n].clone()`` of the weights of the kept
layers; everything else is copied as it is.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from dynabert.configuration_dynabert import DynaBertConfig
from dynabert.modeling_dynabert import DynaBertModel
from dynabert.modeling_pretrained import DynaBertPreTrainedModel
from dynabert.rewiring_record import RewiringRecord
from dynabert.subnet import SubnetConfig, SubnetShape

ModelT = TypeVar("ModelT", bound=DynaBertPreTrainedModel)

# The parameters that shrink with width, by sublayer (`dynabert_kernels.layout`).
_ELASTIC = {
    "attention": ("qkv_weight", "qkv_bias", "out_weight"),
    "ffn": ("up_weight", "up_bias", "down_weight"),
}


def extract(model: ModelT, subnet: SubnetConfig | SubnetShape | None) -> ModelT:
    """A standalone model that computes what `model` computes at `subnet`, and shares nothing.

    On the same backend both give the same bits, in float32 and bfloat16. So they do in int8 where
    `subnet` has full width; a narrower one is quantised anew from its own weights, by scales that
    only its own rows decide.

    The copy has the class, dtype, device, mode and quantisation of `model`, and takes gradients
    unless that is frozen altogether. Its full network is the subnet. Where all its layers have the
    same size it is elastic in turn, over its own heads, neurons and layers; where they differ, a
    fraction of the width has to be whole in each layer.

    Args:
        model: A model of this package, with any head.
        subnet: What to copy; None is the full network, or what a view of it runs
            (`DynaBertPreTrainedModel.with_subnet`).

    Raises:
        TypeError: It is not a subnet.
        ValueError: It does not fit the model.

    Example:
        >>> small = extract(model, SubnetConfig(0.5, 0.75))  # doctest: +SKIP
        >>> small.save_pretrained("small")  # doctest: +SKIP
    """
    shape = model.subnet_shape(model.default_subnet if subnet is None else subnet)
    config = extracted_config(model.config, shape)
    base = cast(DynaBertModel, model.base_model)
    # What no configuration says.
    options = {"add_pooling_layer": base.pooler is not None} if base is model else {}
    kind: Any = type(model)
    with torch.device("meta"):
        extracted: ModelT = kind(config, **options)
    weights = _extracted_weights(model, shape)
    extracted.load_state_dict(weights, assign=True)
    extracted.tie_weights()
    extracted.requires_grad_(any(p.requires_grad for p in model.parameters()))
    if model.rewiring is not None:
        extracted.rewiring = restricted(model.rewiring, shape)
    extracted.train(model.training)
    return extracted.quantize(model.quantization)


def extracted_config(config: DynaBertConfig, shape: SubnetShape) -> DynaBertConfig:
    """The configuration of a network of its own that is `shape` of the one of `config`."""
    heads = [layer.num_heads for layer in shape.layers]
    neurons = [layer.intermediate_size for layer in shape.layers]
    smaller = copy.deepcopy(config)
    smaller.num_hidden_layers = len(shape.layers)
    smaller.num_attention_heads, smaller.intermediate_size = max(heads), max(neurons)
    smaller.num_heads_per_layer = heads if len(set(heads)) > 1 else None
    smaller.intermediate_size_per_layer = neurons if len(set(neurons)) > 1 else None
    smaller.validate()
    return smaller


def restricted(record: RewiringRecord, shape: SubnetShape) -> RewiringRecord:
    """What rewiring did to the heads, neurons and layers that `shape` keeps, as if there had been
    no others: orders count the kept ones only."""
    kept = [(layer.index, layer.num_heads, layer.intermediate_size) for layer in shape.layers]
    heads = [_kept(record.head_order[index], count) for index, count, _ in kept]
    neurons = [_kept(record.neuron_order[index], count) for index, _, count in kept]
    return RewiringRecord(
        head_order=tuple(order for order, _ in heads),
        neuron_order=tuple(order for order, _ in neurons),
        head_scores=_scores(record.head_scores, shape, [units for _, units in heads]),
        neuron_scores=_scores(record.neuron_scores, shape, [units for _, units in neurons]),
        provenance={
            **record.provenance,
            "extracted_layers": ".".join(str(index) for index, _, _ in kept),
        },
    )


def _extracted_weights(model: DynaBertPreTrainedModel, shape: SubnetShape) -> dict[str, Tensor]:
    """Clones of what the subnet needs of ``model.state_dict()``, its layers numbered anew."""
    encoder = f"{model.weights_prefix}encoder.layer."
    weights = {}
    by_layer: dict[int, dict[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(encoder):
            index, _, rest = name.removeprefix(encoder).partition(".")
            by_layer.setdefault(int(index), {})[rest] = tensor
        else:
            weights[name] = tensor.clone()
    for place, layer in enumerate(shape.layers):
        counts = {"attention": layer.num_heads, "ffn": layer.intermediate_size}
        for rest, tensor in by_layer[layer.index].items():
            sublayer, _, parameter = rest.partition(".")
            elastic = parameter in _ELASTIC.get(sublayer, ())
            part = tensor[: counts[sublayer]] if elastic else tensor
            weights[f"{encoder}{place}.{rest}"] = part.clone()
    return weights


def _kept(order: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` places of an order, renumbered among themselves; and their original
    indices, increasing."""
    kept, ranks = order[:count].sort()
    return ranks.argsort(), kept


def _scores(
    scores: tuple[Tensor, ...], shape: SubnetShape, kept: list[Tensor]
) -> tuple[Tensor, ...]:
    pairs = zip(shape.layers, kept, strict=True)
    return tuple(scores[layer.index][indices] for layer, indices in pairs)
