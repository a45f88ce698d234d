"""The peers behind one interface: from token ids to the last hidden state.

P1 is Hugging Face as it is, P2 and P2b a plain encoder under torch.compile, P4 the same on real
tokens only. P3 (JAX, the layers alone) runs in a process of its own, `benchmarks.jax_peer`; our
own model joins in `benchmarks.gpu_ours`. Letters: see `benchmarks.geometry`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel
from transformers import BertModel

from benchmarks import peer_models
from benchmarks.geometry import Subnet
from benchmarks.gpu_attention import BACKENDS
from benchmarks.gpu_timing import Variant, eager, graphed, is_rehearsal

Forward = Callable[[torch.Tensor], torch.Tensor]
# An eager forward pass of 12 layers takes the host 3 to 15 ms.
EAGER_BACKLOG_MS = 20.0


@dataclass(frozen=True)
class Batch:
    """One input: token ids, and the lengths if some positions are padding.

    Attributes:
        ids: ``[B, S]`` int64.
        lengths: Real tokens per sequence; None if all are.
        backend: SDPA backend to force; None for PyTorch's choice.
    """

    ids: torch.Tensor
    lengths: tuple[int, ...] | None = None
    backend: str | None = None

    @property
    def real(self) -> torch.Tensor:
        """True at real tokens, ``[B, S]``."""
        batch_size, seq_len = self.ids.shape
        lengths = torch.tensor(self.lengths or [seq_len] * batch_size, device=self.ids.device)
        return torch.arange(seq_len, device=self.ids.device) < lengths[:, None]

    @property
    def mask(self) -> torch.Tensor | None:
        """True at keys to attend to, ``[B, 1, S, S]``; None without padding."""
        if self.lengths is None:
            return None
        batch_size, seq_len = self.ids.shape
        return self.real[:, None, None, :].expand(batch_size, 1, seq_len, seq_len).contiguous()


class Peer:
    """What the harness needs of a competitor.

    Attributes:
        name: In the rows.
        captured: Whether the harness captures the calls in a CUDA graph.
        packed: Whether the input is the real tokens only, ``[T]``, and the output ``[T, C]``.
    """

    name: str
    captured: bool = True
    packed: bool = False

    def prepare(self, subnet: Subnet, batch: Batch) -> Forward:
        """A function from token ids to the last hidden state, ``[B, S]`` to ``[B, S, C]``."""
        raise NotImplementedError

    def variant(self, subnet: Subnet, batch: Batch, static: torch.Tensor, device: str) -> Variant:
        """One call on the input `static`, which the harness may fill anew between calls."""
        call = partial(self.prepare(subnet, batch), static)
        call()
        if self.captured:
            return graphed([call], device)
        variant = eager([call])
        variant.backlog_ms = EAGER_BACKLOG_MS
        return variant


@contextlib.contextmanager
def forced(backend: str | None) -> Iterator[None]:
    """Force one SDPA backend, or leave PyTorch its choice for None."""
    if backend is None:
        yield
    else:
        with sdpa_kernel(BACKENDS[backend]):
            yield


class EmbeddingWeights(NamedTuple):
    """Tables and LayerNorm of a BERT embedding; token types are all 0."""

    word: torch.Tensor  # [vocabulary, C]
    position: torch.Tensor  # [longest, C]
    segment: torch.Tensor  # [C]
    norm_weight: torch.Tensor
    norm_bias: torch.Tensor

    @classmethod
    def of(cls, model: BertModel, dtype: torch.dtype) -> EmbeddingWeights:
        """The weights of a Hugging Face model."""
        e = model.embeddings
        tensors = (
            e.word_embeddings.weight,
            e.position_embeddings.weight,
            e.token_type_embeddings.weight[0],
            e.LayerNorm.weight,
            e.LayerNorm.bias,
        )
        return cls(*(tensor.detach().to(dtype).contiguous() for tensor in tensors))


def embed(ids: torch.Tensor, positions: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    """Embeddings of ``[B, S]`` or ``[T]`` ids; `weights` are the fields of `EmbeddingWeights`."""
    w = EmbeddingWeights(*weights)
    x = F.embedding(ids, w.word) + F.embedding(positions, w.position) + w.segment
    return F.layer_norm(x, w.norm_weight.shape, w.norm_weight, w.norm_bias, peer_models.NORM_EPS)


@dataclass
class HuggingFaceEager(Peer):
    """P1: `BertModel`'s embeddings and encoder, bf16, SDPA with the batch's backend.

    The mask is made beforehand, which spares Hugging Face what it does for it at each call.
    """

    model: BertModel
    dtype: torch.dtype
    name: str = "P1 hf eager"
    captured: bool = False

    def prepare(self, subnet: Subnet, batch: Batch) -> Forward:
        """Extract the subnet and run it."""
        encoder = peer_models.extract(self.model, subnet).encoder.to(self.dtype)
        embeddings = copy.deepcopy(self.model.embeddings).to(self.dtype)
        mask, backend = batch.mask, batch.backend

        def forward(ids: torch.Tensor) -> torch.Tensor:
            with forced(backend):
                return encoder(embeddings(ids), attention_mask=mask).last_hidden_state

        return forward


@dataclass
class CompiledLayers(Peer):
    """P2 and P2b: a plain merged-QKV layer under torch.compile, one compile per width, in a graph.

    Attributes:
        layer: `peer_models.dense_layer` compiled in some mode.
        embed: `embed` compiled likewise.
    """

    model: BertModel
    dtype: torch.dtype
    layer: Callable[..., torch.Tensor]
    name: str
    embed: Callable[..., torch.Tensor] = embed

    def prepare(self, subnet: Subnet, batch: Batch) -> Forward:
        """Merge the subnet's weights; the first call compiles."""
        small = peer_models.extract(self.model, subnet)
        layers = peer_models.encoder_weights(small, self.dtype)
        embedding = EmbeddingWeights.of(self.model, self.dtype)
        positions = torch.arange(batch.ids.shape[1], device=batch.ids.device)
        mask, backend, head_dim = batch.mask, batch.backend, subnet.geometry.head_dim

        def forward(ids: torch.Tensor) -> torch.Tensor:
            hidden = self.embed(ids, positions, *embedding)
            with forced(backend):
                for weights in layers:
                    hidden = self.layer(hidden, mask, head_dim, *weights)
            return hidden

        return forward


@dataclass
class CompiledRagged(Peer):
    """P4: real tokens only, `varlen_attn`, the layer compiled once for any number of tokens."""

    model: BertModel
    dtype: torch.dtype
    layer: Callable[..., torch.Tensor]
    name: str = "P4 varlen compiled"
    embed: Callable[..., torch.Tensor] = embed
    packed: bool = True

    def prepare(self, subnet: Subnet, batch: Batch) -> Forward:
        """A function from ``[T]`` to ``[T, C]``."""
        assert batch.lengths is not None
        small = peer_models.extract(self.model, subnet)
        layers = peer_models.encoder_weights(small, self.dtype)
        embedding = EmbeddingWeights.of(self.model, self.dtype)
        device = batch.ids.device
        offsets = torch.tensor([0, *batch.lengths], device=device).cumsum(0).to(torch.int32)
        positions = torch.cat([torch.arange(n, device=device) for n in batch.lengths])
        longest, head_dim = max(batch.lengths), subnet.geometry.head_dim

        def forward(ids: torch.Tensor) -> torch.Tensor:
            hidden = self.embed(ids, positions, *embedding)
            torch._dynamo.maybe_mark_dynamic(hidden, 0)
            for weights in layers:
                hidden = self.layer(hidden, offsets, longest, head_dim, *weights)
            return hidden

        return forward


def compiled(function: Callable[..., Any], mode: str | None, device: str) -> Callable[..., Any]:
    """torch.compile as the peers use it; on a CPU (a test) and in a rehearsal, where it would
    choose kernels by timing them while others run, the plain function."""
    if device != "cuda" or is_rehearsal():
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
