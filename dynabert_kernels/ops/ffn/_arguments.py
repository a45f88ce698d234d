"""The arguments of the feed-forward op as its backends on a GPU get them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from dynabert_kernels.layout import PackedFFN

if TYPE_CHECKING:
    from dynabert_kernels.ops.ffn import FFNCall


class Arguments(NamedTuple):
    """The arguments of the op's schema."""

    hidden: Tensor
    up_weight: Tensor
    up_bias: Tensor
    down_weight: Tensor
    down_bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    norm_eps: float
    activation: str
    intermediate_size: int
    intermediate_sizes: Tensor | None
    cu_seqlens: Tensor | None
    dropout_p: float
    seed: int | None
    compute: str

    @property
    def trained_neurons(self) -> int:
        """Neurons that the buffers of a call with gradients hold."""
        if self.intermediate_sizes is None:
            return self.intermediate_size
        return self.up_weight.shape[0]


def call_of(*arguments: Any) -> FFNCall:
    """What the arguments of the schema say, for the reference."""
    from dynabert_kernels.ops.ffn import FFNCall

    call = Arguments(*arguments)
    return FFNCall(
        call.hidden,
        PackedFFN(*call[1:9]),
        call.intermediate_size,
        call.intermediate_sizes,
        call.cu_seqlens,
        call.dropout_p,
        call.seed,
        call.compute,
    )
