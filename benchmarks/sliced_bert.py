"""DynaBERT as one writes it first: dense layers in Hugging Face's layout, sliced per subnet.

The peer of `benchmarks.bench_train`: padded batches, one forward and backward pass per subnet,
``weight[:n]`` in every linear layer. Same mathematics and same weights as the product's model.

Letters: B sequences, S padded length, C hidden_size, H heads, D head_dim, I FFN neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynabert import DynaBertForSequenceClassification
from dynabert.hf_checkpoint import to_hf_state_dict
from dynabert.subnet import SubnetShape


class SlicedLayer(nn.Module):
    """One encoder layer; widths are arguments, so that a compiled layer serves all of them."""

    def __init__(self, hidden: int, heads: int, neurons: int, eps: float, dropout: float) -> None:
        super().__init__()
        self.head_dim = hidden // heads
        self.query, self.key, self.value, self.out = (nn.Linear(hidden, hidden) for _ in range(4))
        self.up, self.down = nn.Linear(hidden, neurons), nn.Linear(neurons, hidden)
        self.norm1, self.norm2 = (nn.LayerNorm(hidden, eps=eps) for _ in range(2))
        self.p = dropout

    def forward(self, x: Tensor, mask: Tensor, heads: int, neurons: int) -> Tensor:
        """``[B, S, C]`` to ``[B, S, C]``; `mask` is true at real keys, ``[B, 1, 1, S]``."""
        batch, seq_len, _ = x.shape
        p = self.p if self.training else 0.0
        inner = heads * self.head_dim
        q, k, v = (
            F.linear(x, part.weight[:inner], part.bias[:inner])
            .view(batch, seq_len, heads, self.head_dim)
            .transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
        context = context.transpose(1, 2).reshape(batch, seq_len, inner)
        projected = F.linear(context, self.out.weight[:, :inner], self.out.bias)
        x = self.norm1(x + F.dropout(projected, p, self.training))
        active = F.gelu(F.linear(x, self.up.weight[:neurons], self.up.bias[:neurons]))
        down = F.linear(active, self.down.weight[:, :neurons], self.down.bias)
        return self.norm2(x + F.dropout(down, p, self.training))


class SlicedBert(nn.Module):
    """A BERT classifier of `SlicedLayer`s with the weights of a product model."""

    def __init__(self, model: DynaBertForSequenceClassification) -> None:
        super().__init__()
        config = model.config
        weights = to_hf_state_dict(model.state_dict(), config)
        self.word, self.position, self.segment = (
            nn.Embedding(count, config.hidden_size)
            for count in (
                config.vocab_size,
                config.max_position_embeddings,
                config.type_vocab_size,
            )
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(
            SlicedLayer(
                config.hidden_size,
                config.num_attention_heads,
                config.intermediate_size,
                config.layer_norm_eps,
                config.hidden_dropout_prob,
            )
            for _ in range(config.num_hidden_layers)
        )
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.p = config.hidden_dropout_prob
        names = {
            "word": "bert.embeddings.word_embeddings",
            "position": "bert.embeddings.position_embeddings",
            "segment": "bert.embeddings.token_type_embeddings",
            "norm": "bert.embeddings.LayerNorm",
            "pooler": "bert.pooler.dense",
            "classifier": "classifier",
        }
        for index in range(config.num_hidden_layers):
            ours, theirs = f"layers.{index}.", f"bert.encoder.layer.{index}."
            for name in ("query", "key", "value"):
                names[ours + name] = f"{theirs}attention.self.{name}"
            names[ours + "out"] = f"{theirs}attention.output.dense"
            names[ours + "norm1"] = f"{theirs}attention.output.LayerNorm"
            names[ours + "up"] = f"{theirs}intermediate.dense"
            names[ours + "down"] = f"{theirs}output.dense"
            names[ours + "norm2"] = f"{theirs}output.LayerNorm"
        self.load_state_dict(
            {
                f"{ours}.{kind}": weights[f"{theirs}.{kind}"]
                for ours, theirs in names.items()
                for kind in ("weight", "bias")
                if f"{theirs}.{kind}" in weights
            }
        )
        self.run_layer: Callable[..., Tensor] = lambda layer, *args: layer(*args)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor, shape: SubnetShape
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits ``[B, K]`` and the hidden states, ``[B, S, C]`` each, of one subnet."""
        positions = torch.arange(input_ids.shape[1])
        x = self.word(input_ids) + self.segment(token_type_ids) + self.position(positions)
        x = F.dropout(self.norm(x), self.p, self.training)
        mask = attention_mask[:, None, None, :] != 0
        states = [x]
        for step in shape.layers:
            layer: Any = self.layers[step.index]
            x = self.run_layer(layer, x, mask, step.num_heads, step.intermediate_size)
            states.append(x)
        pooled = torch.tanh(self.pooler(x[:, 0]))
        return self.classifier(F.dropout(pooled, self.p, self.training)), states
