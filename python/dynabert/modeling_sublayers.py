"""The two elastic sublayers as modules: packed parameters, and a call of the op of the same name.

The sublayers themselves are `dynabert_kernels.attention` and `dynabert_kernels.ffn`.

Letters: T real tokens of the batch, C hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import is_
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from dynabert.configuration_dynabert import DynaBertConfig
from dynabert.modeling_release import check_conversion
from dynabert_kernels import PackedAttention, PackedFFN, attention, ffn
from dynabert_kernels.ops import Op, forced_backend
from dynabert_kernels.ops._sublayer import compute_name
from dynabert_kernels.ops.attention import ATTENTION, AttentionCall
from dynabert_kernels.ops.ffn import FFN, FFNCall
from dynabert_kernels.varlen import Packing

if TYPE_CHECKING:
    from typing_extensions import Self

PackedT = TypeVar("PackedT", PackedAttention, PackedFFN)
_TENSORS_PER_SUBLAYER = 6
# Leaves rows that belong to no sequence alone, in a compiled graph too.
_RAGGED = ("cuda", "triton")


class DynaBertSublayer(nn.Module, Generic[PackedT]):
    """An elastic sublayer, which owns its packed parameters and nothing else.

    Attributes:
        norm_eps: LayerNorm epsilon.
        quantization: See `DynaBertPreTrainedModel.quantize`.
    """

    norm_eps: float
    quantization: str | None = None
    _kept: tuple[tuple[Any, ...], PackedT] | None = None

    def packed(self) -> PackedT:
        """The parameters as the kernels take them; references, no copy."""
        own: dict[str, Any] = self._parameters
        # A parametrised tensor is computed at each access, and is no parameter of the module.
        is_plain = len(own) == _TENSORS_PER_SUBLAYER
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not is_plain:
            return self._bundle()
        # Inference asks once per layer and call, and making a bundle takes longer than comparing.
        parts, kept = (*own.values(), *self._settings()), self._kept
        if kept is None or not all(map(is_, parts, kept[0])):
            kept = self._kept = parts, self._bundle()
        return kept[1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if not check_conversion(self, fn):  # released weights are no tensors to convert
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _settings(self) -> tuple[Any, ...]:
        """What a bundle holds beside the parameters."""
        return self.norm_eps, self.quantization

    def _bundle(self) -> PackedT:
        raise NotImplementedError


class DynaBertAttention(DynaBertSublayer[PackedAttention]):
    """Attention sublayer; its parameters are packed heads first, so a width is a prefix.

    Args:
        config: Sizes and settings of the model.
        num_heads: Heads of this layer; default: ``config.num_attention_heads``.
    """

    def __init__(self, config: DynaBertConfig, num_heads: int | None = None) -> None:
        super().__init__()
        heads = config.num_attention_heads if num_heads is None else num_heads
        head_dim, hidden = config.head_dim, config.hidden_size
        self.qkv_weight = nn.Parameter(torch.empty(heads, 3, head_dim, hidden))
        self.qkv_bias = nn.Parameter(torch.empty(heads, 3, head_dim))
        self.out_weight = nn.Parameter(torch.empty(heads, head_dim, hidden))
        self.out_bias = nn.Parameter(torch.empty(hidden))
        self.norm_weight = nn.Parameter(torch.empty(hidden))
        self.norm_bias = nn.Parameter(torch.empty(hidden))
        self.norm_eps = config.layer_norm_eps
        self.dropout_p = config.hidden_dropout_prob
        self.attention_dropout_p = config.attention_probs_dropout_prob

    def _bundle(self) -> PackedAttention:
        return PackedAttention(
            self.qkv_weight,
            self.qkv_bias,
            self.out_weight,
            self.out_bias,
            self.norm_weight,
            self.norm_bias,
            *self._settings(),
        )

    def forward(
        self, hidden: Tensor, num_heads: int | Tensor, packing: Packing, attn_mask: Tensor | None
    ) -> Tensor:
        """Run the first `num_heads` heads, ``[T, C]`` to ``[T, C]``."""
        return attention(
            hidden,
            self.packed(),
            num_heads=num_heads,
            cu_seqlens=packing.cu_seqlens,
            max_seqlen=packing.max_seqlen,
            dropout_p=self.dropout_p if self.training else 0.0,
            attention_dropout_p=self.attention_dropout_p if self.training else 0.0,
            attn_mask=attn_mask,
        )


class DynaBertFFN(DynaBertSublayer[PackedFFN]):
    """Feed-forward sublayer; its parameters are packed neurons first, so a width is a prefix.

    Args:
        config: Sizes and settings of the model.
        intermediate_size: Neurons of this layer; default: ``config.intermediate_size``.
    """

    def __init__(self, config: DynaBertConfig, intermediate_size: int | None = None) -> None:
        super().__init__()
        neurons = config.intermediate_size if intermediate_size is None else intermediate_size
        hidden = config.hidden_size
        self.up_weight = nn.Parameter(torch.empty(neurons, hidden))
        self.up_bias = nn.Parameter(torch.empty(neurons))
        self.down_weight = nn.Parameter(torch.empty(neurons, hidden))
        self.down_bias = nn.Parameter(torch.empty(hidden))
        self.norm_weight = nn.Parameter(torch.empty(hidden))
        self.norm_bias = nn.Parameter(torch.empty(hidden))
        self.norm_eps = config.layer_norm_eps
        self.activation = config.activation
        self.dropout_p = config.hidden_dropout_prob

    def _settings(self) -> tuple[Any, ...]:
        return self.norm_eps, self.activation, self.quantization

    def _bundle(self) -> PackedFFN:
        return PackedFFN(
            self.up_weight,
            self.up_bias,
            self.down_weight,
            self.down_bias,
            self.norm_weight,
            self.norm_bias,
            *self._settings(),
        )

    def forward(self, hidden: Tensor, intermediate_size: int | Tensor, packing: Packing) -> Tensor:
        """Run the first `intermediate_size` neurons, ``[T, C]`` to ``[T, C]``."""
        return ffn(
            hidden,
            self.packed(),
            intermediate_size=intermediate_size,
            cu_seqlens=packing.cu_seqlens,
            dropout_p=self.dropout_p if self.training else 0.0,
        )


def takes_spare_rows(attention: DynaBertAttention, ffn: DynaBertFFN, like: Tensor) -> bool:
    """Whether kernels would run both sublayers that leave rows past the last token alone.

    Args:
        attention: Attention of some layer.
        ffn: Feed-forward of the same.
        like: A tensor with the dtype and device of the tokens.
    """
    hidden = like.detach().new_empty(1, attention.out_bias.shape[0])
    offsets = torch.zeros(2, dtype=torch.int32, device=like.device)
    compute = compute_name(hidden, attention.quantization)
    packed, feed = attention.packed(), ffn.packed()
    return _runs_ragged(
        ATTENTION,
        AttentionCall(hidden, packed, 1, None, offsets, 1, 0.0, 0.0, None, None, compute),
    ) and _runs_ragged(FFN, FFNCall(hidden, feed, 1, None, offsets, 0.0, None, compute))


def _runs_ragged(op: Op[Any], call: Any) -> bool:
    forced = forced_backend()
    return any(
        op.why_not(backend.name, call) is None
        for backend in op.backends
        if backend.name in _RAGGED
        and (backend.unproven is None if forced is None else forced == backend.name)
    )
