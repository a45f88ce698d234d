"""The arguments of the attention op as its backends on a GPU get them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from dynabert_kernels.layout import PackedAttention

if TYPE_CHECKING:
    from dynabert_kernels.ops.attention import AttentionCall


class Arguments(NamedTuple):
    """The arguments of the op's schema."""

    hidden: Tensor
    qkv_weight: Tensor
    qkv_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    norm_eps: float
    num_heads: int
    num_heads_each: Tensor | None
    cu_seqlens: Tensor
    max_seqlen: int
    dropout_p: float
    attention_dropout_p: float
    seed: int | None
    compute: str

    @property
    def drops(self) -> bool:
        return self.dropout_p > 0 or self.attention_dropout_p > 0

    @property
    def trained_heads(self) -> int:
        """Heads that the buffers of a call with gradients hold."""
        return self.num_heads if self.num_heads_each is None else self.qkv_weight.shape[0]


def call_of(*arguments: Any) -> AttentionCall:
    """What the arguments of the schema say, for the reference."""
    from dynabert_kernels.ops.attention import AttentionCall

    call = Arguments(*arguments)
    each = call.num_heads_each
    if each is None and int(call.cu_seqlens[-1]) < call.hidden.shape[0]:
        # Compiled calls leave rows past the last sequence, which the reference skips by widths.
        each = call.cu_seqlens.new_full((1,), call.num_heads)
    return AttentionCall(
        call.hidden,
        PackedAttention(*call[1:8]),
        call.num_heads,
        each,
        call.cu_seqlens,
        call.max_seqlen,
        call.dropout_p,
        call.attention_dropout_p,
        call.seed,
        None,
        call.compute,
    )
