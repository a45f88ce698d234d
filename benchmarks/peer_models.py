"""The peers' models: Hugging Face BERT sliced to a subnet, and a plain PyTorch encoder layer.

Every peer runs the extracted dense subnet, the best a static model can do: query, key and value
keep their first heads' rows, the attention output its first columns, the FFN its first neurons,
and the layers are those of the keep-last depth rule.
Letters: see `benchmarks.geometry`.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, BertModel

from benchmarks.geometry import Geometry, Subnet
from benchmarks.gpu_attention import attend, varlen_attention

NORM_EPS = 1e-12


class LayerWeights(NamedTuple):
    """One encoder layer with merged QKV, in `nn.Linear`'s ``[outputs, inputs]`` form."""

    qkv_weight: torch.Tensor  # [3 * H * D, C]
    qkv_bias: torch.Tensor
    out_weight: torch.Tensor  # [C, H * D]
    out_bias: torch.Tensor
    attention_norm_weight: torch.Tensor  # [C]
    attention_norm_bias: torch.Tensor
    up_weight: torch.Tensor  # [I, C]
    up_bias: torch.Tensor
    down_weight: torch.Tensor  # [C, I]
    down_bias: torch.Tensor
    ffn_norm_weight: torch.Tensor  # [C]
    ffn_norm_bias: torch.Tensor


def hf_config(geometry: Geometry, **changes: object) -> BertConfig:
    """BERT's configuration at this geometry, SDPA attention."""
    return BertConfig(
        vocab_size=geometry.vocab_size,
        hidden_size=geometry.hidden_size,
        num_attention_heads=geometry.num_heads,
        intermediate_size=geometry.intermediate_size,
        num_hidden_layers=geometry.num_layers,
        attn_implementation="sdpa",
        **changes,
    )


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Give biases and LayerNorms random values: a fresh model's zeros and ones hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
                scale, shift = (0.1, 1.0) if name.endswith("LayerNorm.weight") else (0.05, 0.0)
                parameter.copy_(noise * scale + shift)


def random_bert(geometry: Geometry, device: str, seed: int = 0) -> BertModel:
    """A float32 `BertModel` with random weights already rounded to bfloat16."""
    torch.manual_seed(seed)
    model = BertModel(hf_config(geometry), add_pooling_layer=False).eval()
    randomize(model, seed)
    model.requires_grad_(False)
    # Rounded once here, so the float32 reference and the bf16 peers hold the same weights.
    return model.to(torch.bfloat16).float().to(device)


def bert_with_weights(geometry: Geometry, state: dict[str, torch.Tensor]) -> BertModel:
    """A float32 `BertModel` on the CPU with the weights of another's `state_dict`."""
    model = BertModel(hf_config(geometry), add_pooling_layer=False).eval()
    model.load_state_dict(state)
    return model.requires_grad_(False)


def _slice(linear: nn.Linear, rows: int, columns: int) -> nn.Linear:
    small = nn.Linear(columns, rows, device="meta")
    small.weight = nn.Parameter(linear.weight[:rows, :columns].clone(), requires_grad=False)
    assert linear.bias is not None
    small.bias = nn.Parameter(linear.bias[:rows].clone(), requires_grad=False)
    return small


def extract(model: BertModel, subnet: Subnet) -> BertModel:
    """A dense `BertModel` holding copies of the subnet's weights only."""
    geometry = subnet.geometry
    inner, neurons = subnet.num_heads * geometry.head_dim, subnet.intermediate_size
    kept = [copy.deepcopy(model.encoder.layer[i]) for i in subnet.layers]
    small = copy.copy(model)
    small._modules = dict(model._modules)
    small.encoder = copy.copy(model.encoder)
    small.encoder._modules = {"layer": nn.ModuleList(kept)}
    for layer in kept:
        attention = layer.attention.self
        for name in ("query", "key", "value"):
            setattr(attention, name, _slice(getattr(attention, name), inner, geometry.hidden_size))
        dense = layer.attention.output
        dense.dense = _slice(dense.dense, geometry.hidden_size, inner)
        layer.intermediate.dense = _slice(layer.intermediate.dense, neurons, geometry.hidden_size)
        layer.output.dense = _slice(layer.output.dense, geometry.hidden_size, neurons)
    return small


def encoder_weights(model: BertModel, dtype: torch.dtype) -> list[LayerWeights]:
    """Merge each Hugging Face layer's weights."""
    layers = []
    for layer in model.encoder.layer:
        attention, out = layer.attention.self, layer.attention.output
        projections = (attention.query, attention.key, attention.value)
        tensors = (
            torch.cat([p.weight for p in projections]),
            torch.cat([p.bias for p in projections]),
            out.dense.weight,
            out.dense.bias,
            out.LayerNorm.weight,
            out.LayerNorm.bias,
            layer.intermediate.dense.weight,
            layer.intermediate.dense.bias,
            layer.output.dense.weight,
            layer.output.dense.bias,
            layer.output.LayerNorm.weight,
            layer.output.LayerNorm.bias,
        )
        layers.append(LayerWeights(*(t.detach().to(dtype).contiguous() for t in tensors)))
    return layers


def _after_attention(context: torch.Tensor, hidden: torch.Tensor, w: LayerWeights) -> torch.Tensor:
    shape = w.attention_norm_weight.shape
    x = F.linear(context, w.out_weight, w.out_bias) + hidden
    x = F.layer_norm(x, shape, w.attention_norm_weight, w.attention_norm_bias, NORM_EPS)
    y = F.linear(F.gelu(F.linear(x, w.up_weight, w.up_bias)), w.down_weight, w.down_bias) + x
    return F.layer_norm(y, shape, w.ffn_norm_weight, w.ffn_norm_bias, NORM_EPS)


def dense_layer(
    hidden: torch.Tensor, mask: torch.Tensor | None, head_dim: int, *weights: torch.Tensor
) -> torch.Tensor:
    """One layer on padded sequences; SDPA's backend is whatever is enabled around the call.

    Args:
        hidden: ``[B, S, C]``.
        mask: True at keys to attend to, ``[B, 1, S, S]``; None if all are real.
        head_dim: Size of a head.
        weights: The fields of a `LayerWeights`.
    """
    w = LayerWeights(*weights)
    batch_size, seq_len, _ = hidden.shape
    qkv = F.linear(hidden, w.qkv_weight, w.qkv_bias)
    context = attend(qkv.view(batch_size, seq_len, 3, -1, head_dim), None, mask)
    return _after_attention(context.transpose(1, 2).flatten(2), hidden, w)


def ragged_layer(
    hidden: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    head_dim: int,
    *weights: torch.Tensor,
) -> torch.Tensor:
    """One layer on real tokens only: hidden ``[T, C]``, cu_seqlens int32 ``[B + 1]``."""
    w = LayerWeights(*weights)
    qkv = F.linear(hidden, w.qkv_weight, w.qkv_bias)
    context = varlen_attention(qkv.view(hidden.shape[0], 3, -1, head_dim), cu_seqlens, max_seqlen)
    return _after_attention(context.flatten(1), hidden, w)
