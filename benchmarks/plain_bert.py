"""A plain BERT encoder of one dense subnet: token ids to last hidden state, nothing but torch.

What someone would write by hand to serve one size: merged QKV weights, fused attention. The PyTorch
peers run it; exporters take it with attention spelt out, the form that graph optimisers know.

Letters: B sequences, S padded length, C hidden size, H heads, D head size, I FFN neurons.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MASKED = -10000.0  # BERT's own; graph optimisers look for a subtraction and this product
_EMBEDDINGS = {
    "word": "embeddings.word_embeddings",
    "position": "embeddings.position_embeddings",
    "segment": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
}
_LAYER = {
    "out": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm2": "output.LayerNorm",
}


class PlainLayer(nn.Module):
    """One post-norm layer on padded sequences."""

    def __init__(self, hidden: int, inner: int, neurons: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.head_dim, self.spelt_out = head_dim, False
        self.qkv = nn.Linear(hidden, 3 * inner)
        self.out = nn.Linear(inner, hidden)
        self.up, self.down = nn.Linear(hidden, neurons), nn.Linear(neurons, hidden)
        self.norm1, self.norm2 = (nn.LayerNorm(hidden, eps=eps) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """``[B, S, C]`` to ``[B, S, C]``; `mask` is added to the scores, ``[B, 1, 1, S]``."""
        context = self._spelt_out(x, mask) if self.spelt_out else self._fused(x, mask)
        x = self.norm1(self.out(context) + x)
        return self.norm2(self.down(F.gelu(self.up(x))) + x)

    def _fused(self, x: Tensor, mask: Tensor | None) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind()
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return context.transpose(1, 2).flatten(2)

    def _spelt_out(self, x: Tensor, mask: Tensor | None) -> Tensor:
        batch, seq_len = x.shape[0], x.shape[1]
        heads = self.out.in_features // self.head_dim
        split = (batch, seq_len, heads, self.head_dim)
        weights, biases = self.qkv.weight.chunk(3), self.qkv.bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).view(split).permute(0, 2, 1, 3)
            for weight, bias in zip(weights, biases, strict=True)
        )
        scores = torch.matmul(q, k.transpose(-1, -2)) / self.head_dim**0.5
        if mask is not None:
            scores = scores + mask
        context = torch.matmul(scores.softmax(-1), v).permute(0, 2, 1, 3)
        return context.reshape(batch, seq_len, heads * self.head_dim)


class PlainBert(nn.Module):
    """Embeddings and the layers of one dense subnet.

    Args:
        state: Names and weights of a Hugging Face `BertModel`, sliced to the subnet.
        head_dim: Size of a head.
        eps: Of every LayerNorm.
    """

    def __init__(self, state: Mapping[str, Tensor], head_dim: int, eps: float = 1e-12) -> None:
        super().__init__()
        vocab, hidden = state["embeddings.word_embeddings.weight"].shape
        self.word = nn.Embedding(vocab, hidden)
        for name in ("position", "segment"):
            rows = state[f"{_EMBEDDINGS[name]}.weight"].shape[0]
            setattr(self, name, nn.Embedding(rows, hidden))
        self.norm = nn.LayerNorm(hidden, eps=eps)
        depth = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder."))
        layers = []
        weights = {
            f"{ours}.{kind}": state[f"{theirs}.{kind}"]
            for ours, theirs in _EMBEDDINGS.items()
            for kind in ("weight", "bias")
            if f"{theirs}.{kind}" in state
        }
        for index in range(depth):
            theirs = f"encoder.layer.{index}."
            inner = state[f"{theirs}attention.self.query.weight"].shape[0]
            neurons = state[f"{theirs}intermediate.dense.weight"].shape[0]
            layers.append(PlainLayer(hidden, inner, neurons, head_dim, eps))
            for kind in ("weight", "bias"):
                parts = [
                    state[f"{theirs}attention.self.{p}.{kind}"] for p in ("query", "key", "value")
                ]
                weights[f"layers.{index}.qkv.{kind}"] = torch.cat(parts)
                for name, place in _LAYER.items():
                    weights[f"layers.{index}.{name}.{kind}"] = state[f"{theirs}{place}.{kind}"]
        self.layers = nn.ModuleList(layers)
        self.load_state_dict(weights)
        self.eval().requires_grad_(False)

    def spell_out_attention(self) -> PlainBert:
        """Attention as two products and a softmax from here on; returns itself."""
        for layer in self.layers:
            layer.spelt_out = True
        return self

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Encode; ids ``[B, S]``, mask 1 at real tokens ``[B, S]``, to ``[B, S, C]``."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        segments = torch.zeros_like(input_ids)
        x = self.word(input_ids) + self.segment(segments) + self.position(positions)
        x = self.norm(x)
        mask = None
        if attention_mask is not None:
            mask = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * _MASKED
        for layer in self.layers:
            x = layer(x, mask)
        return x


def save_state(state: Mapping[str, Tensor], head_dim: int, path: Path) -> None:
    """Write what `load_plain` and `load_state` read; a killed process leaves no half of it."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().float().contiguous() for name, tensor in state.items()}
    unfinished = path.with_name(f"part-{path.name}")
    save_file(tensors, unfinished, metadata={"sizes": json.dumps({"head_dim": head_dim})})
    unfinished.replace(path)


def load_state(path: Path) -> tuple[dict[str, Tensor], int]:
    """The weights of a file written by `save_state`, and the size of a head."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        sizes = json.loads(file.metadata()["sizes"])
        return {name: file.get_tensor(name) for name in file.keys()}, sizes["head_dim"]  # noqa: SIM118


def load_plain(path: Path) -> PlainBert:
    """The float32 model of a file written by `save_state`."""
    return PlainBert(*load_state(path))
