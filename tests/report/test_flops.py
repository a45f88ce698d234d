"""Closed forms against the paper's printed sizes and against models that were really cut."""

from __future__ import annotations

import doctest
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, RobertaConfig

from dynabert import flops, picking
from dynabert.flops import encoder_flops, encoder_parameters, subnet_parameters
from dynabert.subnet import SubnetConfig, SubnetShape

BERT = BertConfig()
ROBERTA = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)

# width, depth, parameters BERT (M), encoder (M), GFLOPs at 128 tokens, parameters RoBERTa (M); the
# first and the last row are the ends the paper's Figure 2 shows (109.5 to 35.1 M, 22.4 GFLOPs).
PRINTED = [
    (1.0, 1.0, "109.5", "85.1", "22.35", "124.6"),
    (0.75, 1.0, "88.2", "63.8", "16.76", "103.4"),
    (0.5, 1.0, "67.0", "42.6", "11.17", "82.1"),
    (0.25, 1.0, "45.7", "21.3", "5.59", "60.9"),
    (1.0, 0.75, "88.2", "63.8", "16.76", "103.4"),
    (0.75, 0.75, "72.3", "47.9", "12.57", "87.4"),
    (0.5, 0.75, "56.3", "31.9", "8.38", "71.5"),
    (0.25, 0.75, "40.4", "16.0", "4.19", "55.6"),
    (1.0, 0.5, "67.0", "42.5", "11.17", "82.1"),
    (0.75, 0.5, "56.3", "31.9", "8.38", "71.5"),
    (0.5, 0.5, "45.7", "21.3", "5.59", "60.9"),
    (0.25, 0.5, "35.1", "10.7", "2.79", "50.2"),
]
IDS = [f"w{row[0]:g}-d{row[1]:g}" for row in PRINTED]


def shape_of(config: BertConfig, subnet: SubnetConfig) -> SubnetShape:
    return subnet.resolve(
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
    )


def linear(in_features: int, out_features: int) -> nn.Linear:
    return nn.Linear(in_features, out_features, device="meta")


def cut(config: BertConfig, shape: SubnetShape) -> BertModel:
    """A Hugging Face model whose layers were replaced by narrower ones, without memory for its
    weights."""
    with torch.device("meta"):
        model = BertModel(config)
    head_dim = config.hidden_size // config.num_attention_heads
    layers = []
    for kept in shape.layers:
        layer = model.encoder.layer[kept.index]
        attended = kept.num_heads * head_dim
        for name in ("query", "key", "value"):
            setattr(layer.attention.self, name, linear(config.hidden_size, attended))
        layer.attention.output.dense = linear(attended, config.hidden_size)
        layer.intermediate.dense = linear(config.hidden_size, kept.intermediate_size)
        layer.output.dense = linear(kept.intermediate_size, config.hidden_size)
        layers.append(layer)
    model.encoder.layer = nn.ModuleList(layers)
    return model


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("row", PRINTED, ids=IDS)
def test_closed_forms_print_the_published_table(
    row: tuple[float, float, str, str, str, str],
) -> None:
    width, depth, *expected = row
    shape = shape_of(BERT, SubnetConfig(width, depth))
    got = [
        f"{subnet_parameters(BERT, shape) / 1e6:.1f}",
        f"{encoder_parameters(BERT, shape) / 1e6:.1f}",
        f"{encoder_flops(BERT, shape, seq_len=128) / 1e9:.2f}",
        f"{subnet_parameters(ROBERTA, shape) / 1e6:.1f}",
    ]
    assert got == expected


@pytest.mark.parametrize(
    "subnet",
    [
        SubnetConfig(),
        SubnetConfig(width_mult=0.25, depth_mult=0.5),
        SubnetConfig(num_heads=(1, 5, 12), intermediate_size=(7, 3072, 1), layers=(0, 4, 11)),
    ],
    ids=["full", "smallest", "uneven"],
)
@pytest.mark.parametrize("config", [BERT, ROBERTA], ids=["bert", "roberta"])
def test_parameters_equal_those_of_a_cut_model(config: BertConfig, subnet: SubnetConfig) -> None:
    shape = shape_of(config, subnet)
    model = cut(config, shape)
    assert subnet_parameters(config, shape) == num_parameters(model)
    assert encoder_parameters(config, shape) == num_parameters(model.encoder)
    assert subnet_parameters(config, shape, pooler=False) == (
        num_parameters(model) - num_parameters(model.pooler)
    )


def test_flops_equal_those_torch_counts_in_a_full_encoder() -> None:
    config = BertConfig(
        vocab_size=11,
        hidden_size=20,
        num_hidden_layers=3,
        num_attention_heads=5,
        intermediate_size=35,
        max_position_embeddings=16,
    )
    config._attn_implementation = "eager"
    model = BertModel(config, add_pooling_layer=False).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.ones(3, 7, dtype=torch.long))
    assert encoder_flops(config, shape_of(config, SubnetConfig()), 7, batch_size=3) == (
        counter.get_total_flops()
    )


@pytest.mark.parametrize("module", [flops, picking], ids=["flops", "picking"])
def test_examples_print_what_they_say(module: ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("sizes", [(0, 1), (128, 0)], ids=["no-tokens", "no-sequences"])
def test_flops_refuse_an_empty_batch(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="expected 1 or more"):
        encoder_flops(BERT, shape_of(BERT, SubnetConfig()), *sizes)
