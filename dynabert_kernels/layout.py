"""Packed weights of a sublayer: the one place where the elastic layout is defined.

Every tensor that shrinks with width has its heads or neurons on dimension 0, so a narrower
sublayer is ``t[:n]`` (a contiguous view), rewiring is ``t[order]``, and extraction is
``t[:n].clone()``. Both classes are bundles of references: building one copies nothing.

Letters: H heads, D head_dim, C hidden_size, I intermediate_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

ACTIVATIONS = ("gelu", "gelu_tanh", "relu")
"""Activations an FFN may use: ``gelu`` is the exact (erf) form that BERT and RoBERTa use."""

QUANTIZATIONS = ("int8",)
"""Forms the matrix products may take beside the dtype of the tokens; see `quantization`."""


@dataclass(frozen=True, eq=False)
class PackedAttention:
    """Weights of one post-norm attention sublayer.

    Attributes:
        qkv_weight: Query, key and value rows of each head, ``[H, 3, D, C]``.
        qkv_bias: Their biases, ``[H, 3, D]``.
        out_weight: Output projection, input dimension first, ``[H, D, C]``.
        out_bias: ``[C]``, the same for every width.
        norm_weight: LayerNorm scale, ``[C]``.
        norm_bias: LayerNorm shift, ``[C]``.
        norm_eps: LayerNorm epsilon.
        quantization: ``"int8"`` to compute the matrix products in integers, as
            `dynabert_kernels.quantization` defines; the tensors stay as they are. None for floats.
    """

    qkv_weight: Tensor
    qkv_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    norm_eps: float = 1e-12
    quantization: str | None = None

    @property
    def num_heads(self) -> int:
        """Heads the weights hold."""
        return self.qkv_weight.shape[0]

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return self.qkv_weight.shape[2]

    @property
    def hidden_size(self) -> int:
        """Size of the residual stream."""
        return self.qkv_weight.shape[3]

    def prefix(self, num_heads: int) -> PackedAttention:
        """The sublayer of the first `num_heads` heads: views, no copy.

        Args:
            num_heads: Heads to keep, 1 to ``self.num_heads``.

        Raises:
            ValueError: `num_heads` is out of range.
        """
        _check_count("PackedAttention.prefix", "num_heads", num_heads, self.num_heads, "heads")
        if not torch.compiler.is_compiling() and num_heads == self.num_heads:
            return self
        return self.with_elastic([t[:num_heads] for t in self.elastic()])

    def permuted(self, order: Tensor) -> PackedAttention:
        """The same sublayer with its heads in another order ("rewiring"), as new tensors.

        Args:
            order: Which head comes at each place, a permutation, ``[H]``, integer dtype.

        Raises:
            ValueError: `order` is not a permutation of the heads.
            TypeError: `order` is not an integer tensor.
        """
        _check_order("PackedAttention.permuted", order, self.num_heads)
        return self.with_elastic([t[order.to(t.device)] for t in self.elastic()])

    def elastic(self) -> tuple[Tensor, ...]:
        """The tensors that shrink with width: `qkv_weight`, `qkv_bias`, `out_weight`."""
        return self.qkv_weight, self.qkv_bias, self.out_weight

    def with_elastic(self, tensors: Sequence[Tensor]) -> PackedAttention:
        """The same sublayer with others in the place of `elastic`."""
        return replace(self, qkv_weight=tensors[0], qkv_bias=tensors[1], out_weight=tensors[2])

    def validate(self) -> PackedAttention:
        """Check every shape, dtype and device, and return `self`.

        Raises:
            ValueError: A shape, dtype, device, epsilon or quantisation is wrong.
            TypeError: A field is not a tensor, or not a floating-point one.
        """
        who, matrix = "PackedAttention", self.qkv_weight
        _check_is_tensor(who, "qkv_weight", matrix)
        shape = matrix.shape
        if len(shape) != 4 or shape[1] != 3:
            raise ValueError(
                f"{who}: qkv_weight.shape={list(shape)}, expected "
                "[num_heads, 3, head_dim, hidden_size]. Use PackedAttention.from_hf to pack."
            )
        heads, _, head_dim, hidden = shape
        _check_like(who, "qkv_bias", self.qkv_bias, (heads, 3, head_dim), matrix)
        _check_like(who, "out_weight", self.out_weight, (heads, head_dim, hidden), matrix)
        _check_like(who, "out_bias", self.out_bias, (hidden,), matrix)
        _check_norm(who, self.norm_weight, self.norm_bias, self.norm_eps, hidden, matrix)
        _check_quantization(who, self.quantization)
        return self

    @classmethod
    def from_hf(
        cls,
        *,
        query_weight: Tensor,
        query_bias: Tensor,
        key_weight: Tensor,
        key_bias: Tensor,
        value_weight: Tensor,
        value_bias: Tensor,
        out_weight: Tensor,
        out_bias: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        num_heads: int,
        norm_eps: float = 1e-12,
    ) -> PackedAttention:
        """Pack the tensors of a Hugging Face style attention sublayer (new tensors).

        Args:
            query_weight: ``[H * D, C]``; likewise `key_weight` and `value_weight`.
            query_bias: ``[H * D]``; likewise `key_bias` and `value_bias`.
            key_weight: See `query_weight`.
            key_bias: See `query_bias`.
            value_weight: See `query_weight`.
            value_bias: See `query_bias`.
            out_weight: Output projection as ``nn.Linear`` stores it, ``[C, H * D]``.
            out_bias: ``[C]``.
            norm_weight: ``[C]``.
            norm_bias: ``[C]``.
            num_heads: Heads in these tensors.
            norm_eps: LayerNorm epsilon.

        Raises:
            ValueError: The rows do not divide into `num_heads`, or shapes disagree.
            TypeError: A tensor is not a floating-point tensor.
        """
        who = "PackedAttention.from_hf"
        _check_is_tensor(who, "query_weight", query_weight)
        if query_weight.dim() != 2:
            raise ValueError(
                f"{who}: query_weight.shape={list(query_weight.shape)}, expected "
                "[num_heads * head_dim, hidden_size]. Pass the matrix as nn.Linear stores it."
            )
        rows, hidden = query_weight.shape
        if not _is_int(num_heads) or num_heads < 1 or rows % num_heads != 0 or rows == 0:
            raise ValueError(
                f"{who}: num_heads={num_heads!r}, expected a divisor of the {rows} rows of "
                "query_weight. Use num_attention_heads of the checkpoint's configuration."
            )
        for name, matrix in (("key_weight", key_weight), ("value_weight", value_weight)):
            _check_like(who, name, matrix, (rows, hidden), query_weight)
        for name, bias in (
            ("query_bias", query_bias),
            ("key_bias", key_bias),
            ("value_bias", value_bias),
        ):
            _check_like(who, name, bias, (rows,), query_weight)
        _check_like(who, "out_weight", out_weight, (hidden, rows), query_weight)
        head_dim = rows // num_heads
        by_head = [
            t.reshape(num_heads, head_dim, hidden) for t in (query_weight, key_weight, value_weight)
        ]
        bias_by_head = [t.reshape(num_heads, head_dim) for t in (query_bias, key_bias, value_bias)]
        return cls(
            torch.stack(by_head, dim=1),
            torch.stack(bias_by_head, dim=1),
            out_weight.t().contiguous().view(num_heads, head_dim, hidden),
            out_bias,
            norm_weight,
            norm_bias,
            norm_eps,
        ).validate()

    def to_hf(self) -> dict[str, Tensor]:
        """The tensors as `from_hf` takes them, under the same names (new tensors where elastic)."""
        rows, hidden = self.num_heads * self.head_dim, self.hidden_size
        tensors: dict[str, Tensor] = {}
        for index, role in enumerate(("query", "key", "value")):
            tensors[f"{role}_weight"] = self.qkv_weight[:, index].reshape(rows, hidden)
            tensors[f"{role}_bias"] = self.qkv_bias[:, index].reshape(rows)
        tensors["out_weight"] = self.out_weight.reshape(rows, hidden).t().contiguous()
        tensors["out_bias"] = self.out_bias
        tensors["norm_weight"] = self.norm_weight
        tensors["norm_bias"] = self.norm_bias
        return tensors


@dataclass(frozen=True, eq=False)
class PackedFFN:
    """Weights of one post-norm feed-forward sublayer.

    Attributes:
        up_weight: One row per neuron, ``[I, C]``.
        up_bias: ``[I]``.
        down_weight: One row per neuron (an ``nn.Linear`` weight transposed), ``[I, C]``.
        down_bias: ``[C]``, the same for every width.
        norm_weight: LayerNorm scale, ``[C]``.
        norm_bias: LayerNorm shift, ``[C]``.
        norm_eps: LayerNorm epsilon.
        activation: ``"gelu"`` (erf), ``"gelu_tanh"`` or ``"relu"``.
        quantization: ``"int8"`` to compute the matrix products in integers, as
            `dynabert_kernels.quantization` defines; the tensors stay as they are. None for floats.
    """

    up_weight: Tensor
    up_bias: Tensor
    down_weight: Tensor
    down_bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    norm_eps: float = 1e-12
    activation: str = "gelu"
    quantization: str | None = None

    @property
    def intermediate_size(self) -> int:
        """Neurons the weights hold."""
        return self.up_weight.shape[0]

    @property
    def hidden_size(self) -> int:
        """Size of the residual stream."""
        return self.up_weight.shape[1]

    def prefix(self, intermediate_size: int) -> PackedFFN:
        """The sublayer of the first `intermediate_size` neurons: views, no copy.

        Args:
            intermediate_size: Neurons to keep, 1 to ``self.intermediate_size``.

        Raises:
            ValueError: `intermediate_size` is out of range.
        """
        _check_count(
            "PackedFFN.prefix",
            "intermediate_size",
            intermediate_size,
            self.intermediate_size,
            "neurons",
        )
        if not torch.compiler.is_compiling() and intermediate_size == self.intermediate_size:
            return self
        return self.with_elastic([t[:intermediate_size] for t in self.elastic()])

    def permuted(self, order: Tensor) -> PackedFFN:
        """The same sublayer with its neurons in another order ("rewiring"), as new tensors.

        Args:
            order: Which neuron comes at each place, a permutation, ``[I]``, integer dtype.

        Raises:
            ValueError: `order` is not a permutation of the neurons.
            TypeError: `order` is not an integer tensor.
        """
        _check_order("PackedFFN.permuted", order, self.intermediate_size)
        return self.with_elastic([t[order.to(t.device)] for t in self.elastic()])

    def elastic(self) -> tuple[Tensor, ...]:
        """The tensors that shrink with width: `up_weight`, `up_bias`, `down_weight`."""
        return self.up_weight, self.up_bias, self.down_weight

    def with_elastic(self, tensors: Sequence[Tensor]) -> PackedFFN:
        """The same sublayer with others in the place of `elastic`."""
        return replace(self, up_weight=tensors[0], up_bias=tensors[1], down_weight=tensors[2])

    def validate(self) -> PackedFFN:
        """Check every shape, dtype and device, and return `self`.

        Raises:
            ValueError: A shape, dtype, device, epsilon, activation or quantisation is wrong.
            TypeError: A field is not a tensor, or not a floating-point one.
        """
        who, matrix = "PackedFFN", self.up_weight
        _check_is_tensor(who, "up_weight", matrix)
        shape = matrix.shape
        if len(shape) != 2:
            raise ValueError(
                f"{who}: up_weight.shape={list(shape)}, expected "
                "[intermediate_size, hidden_size]. Use PackedFFN.from_hf to pack."
            )
        neurons, hidden = shape
        _check_like(who, "up_bias", self.up_bias, (neurons,), matrix)
        _check_like(who, "down_weight", self.down_weight, (neurons, hidden), matrix)
        _check_like(who, "down_bias", self.down_bias, (hidden,), matrix)
        _check_norm(who, self.norm_weight, self.norm_bias, self.norm_eps, hidden, matrix)
        _check_quantization(who, self.quantization)
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"{who}: activation={self.activation!r}, expected one of {', '.join(ACTIVATIONS)}. "
                "Other activations have no kernel."
            )
        return self

    @classmethod
    def from_hf(
        cls,
        *,
        up_weight: Tensor,
        up_bias: Tensor,
        down_weight: Tensor,
        down_bias: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        norm_eps: float = 1e-12,
        activation: str = "gelu",
    ) -> PackedFFN:
        """Pack the tensors of a Hugging Face style feed-forward sublayer.

        Args:
            up_weight: First linear layer, ``[I, C]``.
            up_bias: ``[I]``.
            down_weight: Second linear layer as ``nn.Linear`` stores it, ``[C, I]``.
            down_bias: ``[C]``.
            norm_weight: ``[C]``.
            norm_bias: ``[C]``.
            norm_eps: LayerNorm epsilon.
            activation: See `PackedFFN`.

        Raises:
            ValueError: Shapes disagree, or the activation is unknown.
            TypeError: A tensor is not a floating-point tensor.
        """
        who = "PackedFFN.from_hf"
        _check_is_tensor(who, "up_weight", up_weight)
        if up_weight.dim() != 2:
            raise ValueError(
                f"{who}: up_weight.shape={list(up_weight.shape)}, expected "
                "[intermediate_size, hidden_size]. Pass the matrix as nn.Linear stores it."
            )
        neurons, hidden = up_weight.shape
        _check_like(who, "down_weight", down_weight, (hidden, neurons), up_weight)
        return cls(
            up_weight,
            up_bias,
            down_weight.t().contiguous(),
            down_bias,
            norm_weight,
            norm_bias,
            norm_eps,
            activation,
        ).validate()

    def to_hf(self) -> dict[str, Tensor]:
        """The tensors as `from_hf` takes them, under the same names."""
        return {
            "up_weight": self.up_weight,
            "up_bias": self.up_bias,
            "down_weight": self.down_weight.t().contiguous(),
            "down_bias": self.down_bias,
            "norm_weight": self.norm_weight,
            "norm_bias": self.norm_bias,
        }


# As pytrees, packed weights may be inputs of torch.export and of functional transforms.
torch.export.register_dataclass(
    PackedAttention, serialized_type_name="dynabert_kernels.PackedAttention"
)
torch.export.register_dataclass(PackedFFN, serialized_type_name="dynabert_kernels.PackedFFN")


def _is_int(value: object) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def _check_count(who: str, name: str, got: int, limit: int, what: str) -> None:
    if not _is_int(got):
        raise TypeError(f"{who}: {name}={got!r}, expected an int. Pass a whole number of {what}.")
    if got < 1 or got > limit:
        raise ValueError(
            f"{who}: {name}={got}, expected 1 to {limit}. The weights hold {limit} {what}."
        )


def _check_order(who: str, order: Tensor, count: int) -> None:
    if not isinstance(order, Tensor) or order.is_floating_point() or order.dtype == torch.bool:
        kind = order.dtype if isinstance(order, Tensor) else type(order).__name__
        raise TypeError(f"{who}: order={kind}, expected an integer tensor. Pass int64 indices.")
    if order.dim() != 1 or not torch.equal(
        order.detach().cpu().sort().values, torch.arange(count, dtype=order.dtype)
    ):
        raise ValueError(
            f"{who}: order of shape {list(order.shape)}, expected a permutation of 0 to "
            f"{count - 1}. Each index must appear once."
        )


def _check_is_tensor(who: str, name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"{who}: {name}={type(tensor).__name__}, expected a Tensor. Pass the weight itself."
        )
    if not tensor.is_floating_point():
        raise TypeError(
            f"{who}: {name}.dtype={tensor.dtype}, expected a floating-point dtype. "
            "Convert the weight first."
        )


def _check_like(
    who: str, name: str, tensor: Tensor, shape: tuple[int, ...], matrix: Tensor
) -> None:
    _check_placed(who, name, tensor, shape, matrix.device)
    if tensor.dtype != matrix.dtype:
        raise ValueError(
            f"{who}: {name}.dtype={tensor.dtype}, expected {matrix.dtype}. "
            "The matrices and biases of a sublayer share one dtype."
        )


def _check_placed(
    who: str, name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device
) -> None:
    # In one line each, without calls of our own: this runs for every tensor at every call of an op.
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        _check_is_tensor(who, name, tensor)
    if tensor.shape != shape:
        raise ValueError(
            f"{who}: {name}.shape={list(tensor.shape)}, expected {list(shape)}. "
            "All tensors of a sublayer must agree."
        )
    if tensor.device != device:
        raise ValueError(
            f"{who}: {name}.device={tensor.device}, expected {device}. "
            "Move all tensors of a sublayer to one device."
        )


def _check_norm(
    who: str, weight: Tensor, bias: Tensor, eps: float, hidden: int, matrix: Tensor
) -> None:
    # LayerNorm parameters may stay float32 beside half-precision matrices.
    _check_placed(who, "norm_weight", weight, (hidden,), matrix.device)
    _check_placed(who, "norm_bias", bias, (hidden,), matrix.device)
    if not isinstance(eps, (float, int, torch.SymFloat)) or eps < 0:
        raise ValueError(f"{who}: norm_eps={eps!r}, expected a number >= 0. BERT uses 1e-12.")


def _check_quantization(who: str, quantization: str | None) -> None:
    if quantization is not None and quantization not in QUANTIZATIONS:
        allowed = ", ".join(map(repr, QUANTIZATIONS))
        raise ValueError(
            f"{who}: quantization={quantization!r}, expected None or {allowed}. "
            "None computes in the dtype of the tokens."
        )
