"""The peers behind one interface: a name and `prepare(subnet, batch)` -> function on hidden states.

P1 is Hugging Face as it is, P2 and P2b a plain encoder under torch.compile, P4 the same on real
tokens only. P3 (JAX) runs in a process of its own, `benchmarks.jax_peer`. Another backend joins
by being one more class with these members. Letters: see `benchmarks.geometry`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn.attention import sdpa_kernel
from transformers import BertModel

from benchmarks import peer_models
from benchmarks.geometry import Subnet
from benchmarks.gpu_attention import BACKENDS

Forward = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """One input: hidden states, and the lengths if some positions are padding.

    Attributes:
        hidden: Embedded tokens, ``[B, S, C]``.
        lengths: Real tokens per sequence; None if all are.
        backend: SDPA backend to force; None for PyTorch's choice.
    """

    hidden: torch.Tensor
    lengths: tuple[int, ...] | None = None
    backend: str | None = None

    @property
    def real(self) -> torch.Tensor:
        """True at real tokens, ``[B, S]``."""
        batch_size, seq_len, _ = self.hidden.shape
        lengths = torch.tensor(self.lengths or [seq_len] * batch_size, device=self.hidden.device)
        return torch.arange(seq_len, device=self.hidden.device) < lengths[:, None]

    @property
    def mask(self) -> torch.Tensor | None:
        """True at keys to attend to, ``[B, 1, S, S]``; None without padding."""
        if self.lengths is None:
            return None
        batch_size, seq_len, _ = self.hidden.shape
        return self.real[:, None, None, :].expand(batch_size, 1, seq_len, seq_len).contiguous()


class Peer(Protocol):
    """What the harness needs of a competitor."""

    name: str
    captured: bool  # whether the harness may capture the function in a CUDA graph

    def prepare(self, subnet: Subnet, batch: Batch) -> Forward:
        """A function on hidden states ``[B, S, C]`` (``[T, C]`` if the peer is unpadded)."""
        ...


@contextlib.contextmanager
def forced(backend: str | None) -> Iterator[None]:
    """Force one SDPA backend, or leave PyTorch its choice for None."""
    if backend is None:
        yield
    else:
        with sdpa_kernel(BACKENDS[backend]):
            yield


@dataclass
class HuggingFaceEager:
    """P1: `BertModel`'s encoder as it is, bf16, SDPA with the batch's backend."""

    model: BertModel
    dtype: torch.dtype
    name: str = "P1 hf eager"
    captured: bool = False

    def prepare(self, subnet: Subnet, batch: Batch) -> Forward:
        """Extract the subnet and run its encoder."""
        encoder = peer_models.extract(self.model, subnet).to(self.dtype).encoder
        mask, backend = batch.mask, batch.backend

        def forward(hidden: torch.Tensor) -> torch.Tensor:
            with forced(backend):
                return encoder(hidden, attention_mask=mask).last_hidden_state

        return forward


@dataclass
class CompiledLayers:
    """P2 and P2b: a plain merged-QKV layer under torch.compile, one compile per width, in a graph.

    Attributes:
        layer: `peer_models.dense_layer` compiled in some mode.
    """

    model: BertModel
    dtype: torch.dtype
    layer: Callable[..., torch.Tensor]
    name: str
    captured: bool = True

    def prepare(self, subnet: Subnet, batch: Batch) -> Forward:
        """Merge the subnet's weights; the first call compiles."""
        small = peer_models.extract(self.model, subnet)
        layers = peer_models.encoder_weights(small, self.dtype)
        mask, backend, head_dim = batch.mask, batch.backend, subnet.geometry.head_dim

        def forward(hidden: torch.Tensor) -> torch.Tensor:
            with forced(backend):
                for weights in layers:
                    hidden = self.layer(hidden, mask, head_dim, *weights)
            return hidden

        return forward


@dataclass
class CompiledRagged:
    """P4: real tokens only, `varlen_attn`, the layer compiled once for any number of tokens."""

    model: BertModel
    dtype: torch.dtype
    layer: Callable[..., torch.Tensor]
    name: str = "P4 varlen compiled"
    captured: bool = True

    def prepare(self, subnet: Subnet, batch: Batch) -> Forward:
        """A function on ``[T, C]``."""
        assert batch.lengths is not None
        small = peer_models.extract(self.model, subnet)
        layers = peer_models.encoder_weights(small, self.dtype)
        device = batch.hidden.device
        offsets = torch.tensor([0, *batch.lengths], device=device).cumsum(0).to(torch.int32)
        longest, head_dim = max(batch.lengths), subnet.geometry.head_dim

        def forward(hidden: torch.Tensor) -> torch.Tensor:
            torch._dynamo.maybe_mark_dynamic(hidden, 0)
            for weights in layers:
                hidden = self.layer(hidden, offsets, longest, head_dim, *weights)
            return hidden

        return forward


def compiled(function: Callable[..., Any], mode: str | None, device: str) -> Callable[..., Any]:
    """torch.compile as the peers use it; on a CPU (a test) the plain function."""
    if device != "cuda":
        return function
    dynamo = torch._dynamo.config
    # The widths and batch shapes share one code object; at the default limit of 8 Dynamo would
    # quietly go back to eager.
    dynamo.recompile_limit = 256
    dynamo.fail_on_recompile_limit_hit = True
    # Only dimensions marked dynamic may vary: a new width must get kernels of its own sizes.
    dynamo.automatic_dynamic_shapes = False
    dynamic = None if function is peer_models.ragged_layer else False
    if mode == "tma":
        options = {"max_autotune": True, "triton.enable_persistent_tma_matmul": True}
        return torch.compile(function, dynamic=dynamic, options=options)
    return torch.compile(function, dynamic=dynamic, mode=mode)
