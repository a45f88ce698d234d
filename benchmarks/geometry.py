"""Sizes of the measured encoders, their subnets, and operation counts in closed form.

Letters: B sequences, S tokens each, T tokens in all, C hidden size, H heads, D head size,
I FFN neurons, L layers.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

WIDTHS = (1.0, 0.75, 0.5, 0.25)
# Most wanted first, so that a section cut short has measured what matters.
DEPTHS = (1.0, 0.75, 0.5)
SUBNETS = (
    (1.0, 1.0),
    (0.25, 1.0),
    (0.5, 1.0),
    (0.75, 1.0),
    (0.5, 0.5),
    (0.25, 0.5),
    (1.0, 0.5),
    (0.75, 0.5),
    (1.0, 0.75),
    (0.25, 0.75),
    (0.5, 0.75),
    (0.75, 0.75),
)


@dataclass(frozen=True)
class Geometry:
    """Sizes of a full encoder."""

    name: str
    hidden_size: int
    num_heads: int
    head_dim: int
    intermediate_size: int
    num_layers: int
    vocab_size: int = 30522

    def heads(self, width: float) -> int:
        """Heads of a subnet of this width."""
        return round(self.num_heads * width)

    def neurons(self, width: float) -> int:
        """FFN neurons of a subnet of this width."""
        return round(self.intermediate_size * width)


BASE = Geometry("bert-base", 768, 12, 64, 3072, 12)
LARGE = Geometry("bert-large", 1024, 16, 64, 4096, 24)
# For the CPU: every width is still a whole number of heads.
TINY = Geometry("tiny", 64, 4, 16, 128, 4, vocab_size=100)


@dataclass(frozen=True)
class Subnet:
    """A width and a depth of one geometry."""

    geometry: Geometry
    width: float
    depth: float

    @property
    def name(self) -> str:
        """ "w0.5-d1"."""
        return f"w{self.width:g}-d{self.depth:g}"

    @property
    def num_heads(self) -> int:
        """Heads per layer."""
        return self.geometry.heads(self.width)

    @property
    def intermediate_size(self) -> int:
        """FFN neurons per layer."""
        return self.geometry.neurons(self.width)

    @property
    def layers(self) -> tuple[int, ...]:
        """Kept layers by the paper's keep-last rule (DynaBERT, section 2.2)."""
        kept = round(self.geometry.num_layers * self.depth)
        return tuple(i * self.geometry.num_layers // kept - 1 for i in range(1, kept + 1))

    def flops(self, batch_size: int, seq_len: int) -> float:
        """Operations of the encoder layers, 2 per multiply-add, on padded sequences."""
        return self.ragged_flops([seq_len] * batch_size)

    def ragged_flops(self, lengths: list[int]) -> float:
        """Operations of the encoder layers on sequences of these lengths."""
        inner = self.num_heads * self.geometry.head_dim
        per_token = 2 * self.geometry.hidden_size * (4 * inner + 2 * self.intermediate_size)
        attention = sum(4 * n * n * inner for n in lengths)
        return float(len(self.layers) * (sum(lengths) * per_token + attention))

    def weight_bytes(self, bytes_per_weight: int = 2) -> float:
        """Bytes of the matrices the subnet reads; biases and norms are below a thousandth."""
        inner = self.num_heads * self.geometry.head_dim
        per_layer = self.geometry.hidden_size * (4 * inner + 2 * self.intermediate_size)
        return float(len(self.layers) * per_layer * bytes_per_weight)


def linear_shapes(geometry: Geometry, width: float) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of the four projections of one layer at this width."""
    inner = geometry.heads(width) * geometry.head_dim
    neurons = geometry.neurons(width)
    return {
        "qkv": (3 * inner, geometry.hidden_size),
        "out": (geometry.hidden_size, inner),
        "ffn_up": (neurons, geometry.hidden_size),
        "ffn_down": (geometry.hidden_size, neurons),
    }


def short_text_lengths(batch_size: int, max_len: int, seed: int = 0) -> list[int]:
    """Synthetic lengths like SST-2's: log-normal, mean near 25 word pieces, cut to [4, max_len].

    The log-normal has median 22 and sigma 0.5: mean 22 * exp(0.125) = 24.9.
    """
    draw = random.Random(seed)
    scale = max_len / 128
    lengths = (round(draw.lognormvariate(3.09, 0.5) * scale) for _ in range(batch_size))
    return [min(max_len, max(min(4, max_len), n)) for n in lengths]
