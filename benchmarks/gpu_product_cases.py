"""The cases of `gpu_products`: what PyTorch and what our launchers run for a step of a layer.

Letters: see `benchmarks.geometry`; n is the outputs or inputs a width leaves. The launchers are
imported where they run: without a GPU the peers' side is tested, and Triton may be missing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.geometry import Geometry

EPS = 1e-12
NORM = "norm backward"
Outputs = tuple[Tensor, ...]


@dataclass
class Operands:
    """What the cases of one matrix read, for tokens of one width.

    Attributes:
        x: Tokens, ``[T, C]``; as gradients where a case goes backward.
        residual: ``[T, C]``.
        inner: ``[T, n]``: activations, their gradient, or what an activation was applied to.
        weight: Packed, prefix first, full: ``[limit * unit, C]``.
        bias: Of the elastic side, ``[limit * unit]``.
        out_bias: Of the other, ``[C]``.
        norm_weight: ``[C]``.
        count: n.
        turned: The prefix as `nn.Linear` stores it where the elastic side is the input, ``[C, n]``.
        mean: Of each row of `residual`, float32 ``[T, 1]``, as PyTorch keeps it from a LayerNorm.
        inverse_deviation: Likewise.
    """

    x: Tensor
    residual: Tensor
    inner: Tensor
    weight: Tensor
    bias: Tensor
    out_bias: Tensor
    norm_weight: Tensor
    count: int
    turned: Tensor
    mean: Tensor = field(init=False)
    inverse_deviation: Tensor = field(init=False)

    def __post_init__(self) -> None:
        wide = self.residual.float()
        self.mean = wide.mean(-1, keepdim=True)
        self.inverse_deviation = (wide.var(-1, correction=0, keepdim=True) + EPS).rsqrt()

    def rows(self, begin: int, end: int, count: int) -> Operands:
        """The same for some of the tokens at another width."""
        return replace(
            self,
            x=self.x[begin:end],
            residual=self.residual[begin:end],
            inner=self.inner[begin:end, :count].contiguous(),
            count=count,
            turned=self.turned[:, :count].contiguous(),
        )

    def wide(self) -> Operands:
        """In float32, for the truth."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        return Operands(**{k: v.float() if k != "count" else v for k, v in given.items()})

    def with_room(self, full: int) -> Operands:
        """With `full` columns in `inner`, NaN beyond the prefix: where only the device knows n."""
        if full == self.count:
            return self
        inner = self.inner.new_full((self.inner.shape[0], full), float("nan"))
        inner[:, : self.count] = self.inner
        return replace(self, inner=inner)


@dataclass(frozen=True)
class Case:
    """One measured step.

    Attributes:
        kind: In the rows.
        matrix: "qkv", "out", "up" or "down".
        plain: What PyTorch runs.
        ours: The launchers, given a width and a unit.
        alone: The product of `plain` alone; None where there is no product.
        compile: Whether torch.compile could fuse anything.
    """

    kind: str
    matrix: str
    plain: Callable[[Operands], Outputs]
    ours: Callable[[Operands, Any, int, int], Outputs]
    alone: Callable[[Operands], Tensor] | None = None
    compile: bool = False


def _linear(o: Operands) -> Tensor:
    return F.linear(o.x, o.weight[: o.count], o.bias[: o.count])


def _linear_gelu(o: Operands) -> Outputs:
    return (F.gelu(_linear(o)),)


def _linear_gelu_keep(o: Operands) -> Outputs:
    before = _linear(o)
    return F.gelu(before), before


def _linear_norm(o: Operands) -> Outputs:
    total = F.linear(o.inner, o.turned, o.out_bias) + o.residual
    return (F.layer_norm(total, o.norm_weight.shape, o.norm_weight, o.out_bias, EPS),)


def _gelu_gradient(o: Operands) -> Outputs:
    gradient = torch.ops.aten.gelu_backward(torch.mm(o.x, o.turned), o.inner)
    return gradient, F.gelu(o.inner)


def _weight_gradient(o: Operands) -> Outputs:
    return torch.mm(o.inner.t(), o.x).float(), o.inner.float().sum(0)


def _norm_gradient(o: Operands) -> Outputs:
    total, weight, bias = torch.ops.aten.native_layer_norm_backward(
        o.x,
        o.residual,
        list(o.norm_weight.shape),
        o.mean,
        o.inverse_deviation,
        o.norm_weight,
        o.out_bias,
        [True, True, True],
    )
    return total, weight.float(), bias.float(), total.float().sum(0)


def _our_rows(o: Operands, width: Any, unit: int, _: int, **options: Any) -> Outputs:
    from dynabert_kernels.triton.launch_gemm import rows_product

    out = rows_product(
        o.x, o.weight, options.pop("bias", o.bias), width=width, unit=unit, **options
    )
    return out if isinstance(out, tuple) else (out,)


def _our_norm(o: Operands, width: Any, unit: int, _: int) -> Outputs:
    from dynabert_kernels.triton.launch_gemm import columns_product
    from dynabert_kernels.triton.launch_norm import residual_norm

    out = columns_product(
        o.inner, o.weight, width=width, unit=unit, bias=o.out_bias, residual=o.residual
    )
    return (residual_norm(out, o.out_bias, o.residual, o.norm_weight, o.out_bias, EPS),)


def _our_columns(o: Operands, width: Any, unit: int, _: int) -> Outputs:
    from dynabert_kernels.triton.launch_gemm import columns_product

    out = columns_product(o.inner, o.weight, width=width, unit=unit, bias=None, residual=o.residual)
    # Partial sums, which the op leaves to the row kernel.
    return ((out.sum(0) + o.residual).to(o.x.dtype) if out.dim() == 3 else out,)


def _our_gelu_gradient(o: Operands, width: Any, unit: int, _: int) -> Outputs:
    from dynabert_kernels.triton.launch_gemm import rows_gradient

    return rows_gradient(o.x, o.weight, o.inner, width=width, unit=unit, activation="gelu")


def _our_weight_gradient(o: Operands, width: Any, unit: int, limit: int) -> Outputs:
    from dynabert_kernels.triton.weight_gradient import weight_gradient

    return weight_gradient(
        o.inner, o.x, width=width, unit=unit, limit=limit, dtype=torch.float32, with_bias=True
    )


def _our_norm_gradient(o: Operands, _: Any, __: int, ___: int) -> Outputs:
    from dynabert_kernels.triton.launch_norm import norm_gradient

    found = norm_gradient(
        o.x, o.residual, o.norm_weight, EPS, dropout=None, projected_dtype=o.x.dtype
    )
    return found.total, found.norm_weight, found.norm_bias, found.bias


CASES = (
    Case("qkv", "qkv", lambda o: (_linear(o),), _our_rows),
    Case(
        "up+gelu",
        "up",
        _linear_gelu,
        partial(_our_rows, activation="gelu"),
        _linear,
        compile=True,
    ),
    Case(
        "out+residual+norm",
        "out",
        _linear_norm,
        _our_norm,
        lambda o: F.linear(o.inner, o.turned),
        compile=True,
    ),
    Case(
        "down+residual+norm",
        "down",
        _linear_norm,
        _our_norm,
        lambda o: F.linear(o.inner, o.turned),
        compile=True,
    ),
    Case(
        "up+gelu, both kept",
        "up",
        _linear_gelu_keep,
        partial(_our_rows, activation="gelu", keep_before=True),
        _linear,
    ),
    Case(
        "down backward+gelu backward",
        "down",
        _gelu_gradient,
        _our_gelu_gradient,
        lambda o: torch.mm(o.x, o.turned),
        compile=True,
    ),
    Case(
        "up weight gradient",
        "up",
        _weight_gradient,
        _our_weight_gradient,
        lambda o: torch.mm(o.inner.t(), o.x),
    ),
    Case(
        "qkv weight gradient",
        "qkv",
        _weight_gradient,
        _our_weight_gradient,
        lambda o: torch.mm(o.inner.t(), o.x),
    ),
    Case(
        "out weight gradient",
        "out",
        _weight_gradient,
        _our_weight_gradient,
        lambda o: torch.mm(o.inner.t(), o.x),
    ),
    Case(
        "up backward+residual",
        "up",
        lambda o: (torch.addmm(o.residual, o.inner, o.weight[: o.count]),),
        _our_columns,
    ),
    Case(
        "qkv backward+residual",
        "qkv",
        lambda o: (torch.addmm(o.residual, o.inner, o.weight[: o.count]),),
        _our_columns,
    ),
    Case(
        "out backward",
        "out",
        lambda o: (torch.mm(o.x, o.turned),),
        partial(_our_rows, bias=None),
    ),
    Case(NORM, "out", _norm_gradient, _our_norm_gradient),
)
MIXED = ("up+gelu", "down+residual+norm", "down backward+gelu backward", "up weight gradient")


def unit_and_limit(matrix: str, geometry: Geometry) -> tuple[int, int]:
    """Outputs per head or neuron of a packed matrix, and its heads or neurons."""
    if matrix in ("up", "down"):
        return 1, geometry.intermediate_size
    return (3 if matrix == "qkv" else 1) * geometry.head_dim, geometry.num_heads


def operands(
    matrix: str, geometry: Geometry, width: float, tokens: int, dtype: torch.dtype, device: str
) -> Operands:
    """Random operands of LayerNorm's scale; products of about the same."""
    unit, limit = unit_and_limit(matrix, geometry)
    count = round(limit * width) * unit
    hidden = geometry.hidden_size

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device=device) * scale).to(dtype)

    elastic_input = matrix in ("out", "down")
    weight = draw(limit * unit, hidden, scale=(count if elastic_input else hidden) ** -0.5)
    return Operands(
        draw(tokens, hidden),
        draw(tokens, hidden),
        draw(tokens, count),
        weight,
        draw(limit * unit, scale=0.1),
        draw(hidden, scale=0.1),
        draw(hidden, scale=0.1) + 1,
        count,
        weight[:count].t().contiguous(),
    )
