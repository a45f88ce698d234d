"""Which part of the network a call runs: from fractions to whole heads, neurons and layers.

Standard library only. `SubnetConfig` is what users write and pass along; `SubnetShape` is what the
model runs. Resolving happens once, at the model's door (`DynaBertModel.subnet_shape`); nothing
below it sees a fraction.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from itertools import pairwise
from numbers import Real
from typing import Any

# A fraction written with four decimals (0.6667) still means 2/3; anything further off is refused,
# never rounded.
TOLERANCE = 1e-4
DEPTH_RULES = ("paper", "reference")

Count = int | tuple[int, ...]

_NUMBER = r"\d*\.?\d+|\d+\.|\d+/[1-9]\d*"
_COUNTS = r"\d+(?:\.\d+)*"
_WIDTH_AND_DEPTH = re.compile(rf"w?(?P<width>{_NUMBER})(?:(?:x|-d)(?P<depth>{_NUMBER}))?")
_NAME = re.compile(
    rf"(?:w(?P<width>{_NUMBER})-)?(?:h(?P<heads>{_COUNTS})-)?(?:i(?P<neurons>{_COUNTS})-)?"
    rf"(?:d(?P<depth>{_NUMBER})|l(?P<layers>{_COUNTS}))"
)


@dataclass(frozen=True)
class LayerShape:
    """One kept layer: its index in the full network and the prefix it runs."""

    index: int
    num_heads: int
    intermediate_size: int


@dataclass(frozen=True)
class SubnetShape:
    """A subnet in whole numbers.

    Attributes:
        layers: The kept layers, in order.
        hidden_targets: For each hidden state the subnet produces (embeddings, then one per
            kept layer), the index of the full network's hidden state it is distilled from (0 =
            embeddings).
    """

    layers: tuple[LayerShape, ...]
    hidden_targets: tuple[int, ...]


@dataclass(frozen=True)
class SubnetConfig:
    """A subnet: a fraction of the width and of the depth, or explicit counts.

    Attributes:
        width_mult: Share of the attention heads and FFN neurons of every layer, in (0, 1].
        depth_mult: Share of the layers, in (0, 1].
        num_heads: Heads to use, overriding `width_mult`: one number, or one per kept layer.
        intermediate_size: FFN neurons to use, overriding `width_mult`: one number, or one per kept
            layer.
        layers: Indices of the layers to keep, increasing, overriding `depth_mult`.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A field is out of range whatever the network.
    """

    width_mult: float = 1.0
    depth_mult: float = 1.0
    num_heads: Count | None = None
    intermediate_size: Count | None = None
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("width_mult", "depth_mult"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"SubnetConfig: {name}={value!r}, expected a number in (0, 1].")
            share = float(value)
            if not 0 < share <= 1:  # also refuses nan
                raise ValueError(f"SubnetConfig: {name}={value}, expected a number in (0, 1].")
            object.__setattr__(self, name, share)
        for name in ("num_heads", "intermediate_size"):
            object.__setattr__(self, name, _checked_count(name, getattr(self, name)))
        if self.layers is not None:
            object.__setattr__(self, "layers", _checked_layers(self.layers))

    @property
    def name(self) -> str:
        """A short name for files, tables and metrics: ``w0.5-d0.667``, ``h6-i1024-l0.2.5``."""
        width = [f"{letter}{_joined(value)}" for letter, value in self._explicit_width()]
        if len(width) < 2:
            width.insert(0, f"w{_printed(self.width_mult)}")
        depth = f"l{_joined(self.layers)}" if self.layers else f"d{_printed(self.depth_mult)}"
        return "-".join([*width, depth])

    def _explicit_width(self) -> list[tuple[str, Count]]:
        pairs = (("h", self.num_heads), ("i", self.intermediate_size))
        return [(letter, value) for letter, value in pairs if value is not None]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, ready for JSON; `from_dict` is its inverse."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SubnetConfig:
        """Rebuild what `to_dict` wrote; absent fields take their default.

        Raises:
            ValueError: A key is not a field.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"SubnetConfig: fields={unknown}, expected some of {known}.")
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        return cls(**given)

    @classmethod
    def parse(cls, text: str) -> SubnetConfig:
        """Read ``WIDTH`` or ``WIDTHxDEPTH`` (``0.5x0.75``, ``2/3``), or a `name`.

        A decimal with three or more digits is taken as the rounded form of the simplest fraction it
        can stand for, so that the names this class prints can be typed back: ``0.667`` is 2/3.

        Raises:
            ValueError: The text is not of that form, or a number is out of range.
        """
        match = _WIDTH_AND_DEPTH.fullmatch(text.strip()) or _NAME.fullmatch(text.strip())
        if match is None:
            raise ValueError(
                f"SubnetConfig.parse: text={text!r}, expected WIDTH or WIDTHxDEPTH such as "
                "0.5x0.75 or 2/3x1/2, or a name such as h6.4-i1024.512-l0.2."
            )
        given = match.groupdict()
        width, depth = (_parsed_fraction(given[name] or "1") for name in ("width", "depth"))
        heads, neurons, layers = (
            _parsed_counts(given.get(name)) for name in ("heads", "neurons", "layers")
        )
        return cls(width, depth, _one_or_many(heads), _one_or_many(neurons), layers)

    def resolve(
        self,
        *,
        num_hidden_layers: int,
        num_attention_heads: Count,
        intermediate_size: Count,
        depth_rule: str = "paper",
    ) -> SubnetShape:
        """The subnet in whole numbers for a network of the given size.

        Args:
            num_hidden_layers: Layers of the full network.
            num_attention_heads: Heads of its layers: one number, or one per layer. Of layers that
                differ, a fraction takes the same share in each.
            intermediate_size: FFN neurons of its layers, likewise.
            depth_rule: ``"paper"`` keeps the last layer (DynaBERT, section 3.2), ``"reference"``
                the first, as the original code does.

        Returns:
            The kept layers and their distillation targets.

        Raises:
            ValueError: A fraction is not a whole number of heads, neurons or layers, or a count is
                more than the network has. The message lists the legal values.
        """
        kept, targets = _kept_layers(self, num_hidden_layers, depth_rule)
        all_heads, all_neurons = (
            (size,) * len(kept) if isinstance(size, int) else tuple(size[index] for index in kept)
            for size in (num_attention_heads, intermediate_size)
        )
        heads = _per_layer("num_heads", self.num_heads, all_heads)
        if heads is None:
            count, total = _share_of_heads(self.width_mult, all_heads)
            heads = tuple(count * most // total for most in all_heads)
        sizes = _per_layer("intermediate_size", self.intermediate_size, all_neurons)
        if sizes is None:
            sizes = _neurons(self.width_mult, all_heads, all_neurons)
        triples = zip(kept, heads, sizes, strict=True)
        return SubnetShape(tuple(LayerShape(*triple) for triple in triples), targets)


@dataclass(frozen=True)
class ForEach:
    """Several subnets for the whole batch in one call: every sequence runs at each of them.

    The rows of the output are the batch once for each subnet, in this order.

    Attributes:
        subnets: What to run, at least one.

    Raises:
        ValueError: There is none.
    """

    subnets: tuple[SubnetConfig, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "subnets", tuple(self.subnets))
        if not self.subnets:
            raise ValueError("ForEach: subnets=(), expected at least one. Add SubnetConfig().")


def subnet_grid(
    widths: Sequence[float] = (1.0, 0.75, 0.5, 0.25),
    depths: Sequence[float] = (1.0, 0.75, 0.5),
) -> list[SubnetConfig]:
    """Every pair of a width and a depth, largest first: by depth, then by width."""
    return [
        SubnetConfig(width_mult=width, depth_mult=depth)
        for depth in sorted(depths, reverse=True)
        for width in sorted(widths, reverse=True)
    ]


def default_widths(num_attention_heads: Count) -> tuple[float, ...]:
    """1, 3/4, 1/2, 1/4, each taken down to whole heads (6 heads: 1, 2/3, 1/2, 1/6).

    Where layers differ in their heads, to whole heads in each.
    """
    heads = num_attention_heads
    total = heads if isinstance(heads, int) else math.gcd(*heads)
    return _whole_shares(total, (1.0, 0.75, 0.5, 0.25))


def default_depths(num_hidden_layers: int) -> tuple[float, ...]:
    """1, 3/4, 1/2, each taken down to whole layers (12 layers: 1, 3/4, 1/2; 6: 1, 2/3, 1/2)."""
    return _whole_shares(num_hidden_layers, (1.0, 0.75, 0.5))


def _whole_shares(total: int, shares: Sequence[float]) -> tuple[float, ...]:
    counts = {max(1, math.floor(total * share)) for share in shares}
    return tuple(count / total for count in sorted(counts, reverse=True))


def _kept_layers(
    config: SubnetConfig, total: int, depth_rule: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Indices of the kept layers, and of the full network's states they are distilled from."""
    if depth_rule not in DEPTH_RULES:
        raise ValueError(
            f"SubnetConfig: depth_rule={depth_rule!r}, expected one of {list(DEPTH_RULES)}."
        )
    if config.layers is not None:
        if config.layers[-1] >= total:
            raise ValueError(
                f"SubnetConfig: layers={config.layers}, expected indices from 0 to {total - 1}."
            )
        return config.layers, (0, *(index + 1 for index in config.layers))
    count = _whole("depth_mult", config.depth_mult, total, "layers")
    # Both rules distil from the same states; they differ in which physical layers produce them.
    ends = tuple(i * total // count for i in range(1, count + 1))
    kept = tuple(end - 1 for end in ends) if depth_rule == "paper" else (0, *ends[:-1])
    return kept, (0, *ends)


def _share_of_heads(width_mult: float, heads: tuple[int, ...]) -> tuple[int, int]:
    """The fraction that `width_mult` stands for, whole in each of the layers: so many heads of the
    layers' common divisor.

    Whole numbers, because Dynamo traces through this and knows no `Fraction`.
    """
    common = math.gcd(*heads)
    uniform = len(set(heads)) == 1
    unit = "heads" if uniform else f"heads, the common divisor of the layers' {_joined(heads)},"
    return _whole("width_mult", width_mult, common, unit), common


def _neurons(
    width_mult: float, heads: tuple[int, ...], neurons: tuple[int, ...]
) -> tuple[int, ...]:
    """The share of the neurons of each layer that goes with the same share of the heads."""
    count, total = _share_of_heads(width_mult, heads)
    odd = [size for size in neurons if count * size % total]
    if odd:
        whole = math.gcd(total, *neurons)
        legal = range(total // whole, total + 1, total // whole)
        raise ValueError(
            f"SubnetConfig: width_mult={width_mult:g} is {count * odd[0] / total:g} of "
            f"{odd[0]} neurons, expected a whole number. Use one of {_listed(legal, total)}, "
            "or set intermediate_size."
        )
    return tuple(count * size // total for size in neurons)


def _whole(name: str, share: float, total: int, unit: str) -> int:
    count = round(share * total)
    if count < 1 or abs(share - count / total) > TOLERANCE:
        raise ValueError(
            f"SubnetConfig: {name}={share:g} is {share * total:g} of {total} {unit}, expected a "
            f"whole number. Use one of {_listed(range(1, total + 1), total)}."
        )
    return count


def _listed(counts: Sequence[int], total: int) -> str:
    return ", ".join(str(Fraction(count, total)) for count in counts)


def _per_layer(name: str, value: Count | None, most: tuple[int, ...]) -> tuple[int, ...] | None:
    """What is asked for of each kept layer, which has as many as `most` says."""
    if value is None:
        return None
    values = (value,) * len(most) if isinstance(value, int) else value
    if len(values) != len(most):
        raise ValueError(
            f"SubnetConfig: {name} has {len(values)} values, expected one per kept layer "
            f"({len(most)})."
        )
    for place, (count, limit) in enumerate(zip(values, most, strict=True)):
        if count > limit:
            layer = f" in kept layer {place}" if len(set(most)) > 1 else ""
            raise ValueError(
                f"SubnetConfig: {name}={value}, expected 1 to {limit}{layer}. "
                f"The network has {limit}{' there' if layer else ''}."
            )
    return values


def _checked_count(name: str, value: Any) -> Count | None:
    if value is None or (_is_int(value) and value >= 1):
        return value  # type: ignore[no-any-return]
    if not _is_int(value) and not isinstance(value, (tuple, list)):
        raise TypeError(
            f"SubnetConfig: {name}={value!r}, expected a whole number or one per kept layer."
        )
    if _is_int(value) or not value or not all(_is_int(n) and n >= 1 for n in value):
        raise ValueError(f"SubnetConfig: {name}={value!r}, expected whole numbers of at least 1.")
    return tuple(value)


def _checked_layers(layers: Any) -> tuple[int, ...]:
    if not isinstance(layers, (tuple, list)) or not all(_is_int(index) for index in layers):
        raise TypeError(f"SubnetConfig: layers={layers!r}, expected a tuple of layer indices.")
    increasing = all(a < b for a, b in pairwise(layers))
    if not layers or layers[0] < 0 or not increasing:
        raise ValueError(
            f"SubnetConfig: layers={layers!r}, expected at least one index, each above the one "
            "before."
        )
    return tuple(layers)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _joined(value: Count) -> str:
    return str(value) if isinstance(value, int) else ".".join(map(str, value))


def _printed(share: float) -> str:
    """A share as `_parsed_fraction` reads it: three decimals say that there are more."""
    return f"{share:g}" if share == round(share, 2) else f"{share:.3f}"


def _parsed_counts(text: str | None) -> tuple[int, ...] | None:
    return None if text is None else tuple(map(int, text.split(".")))


def _one_or_many(counts: tuple[int, ...] | None) -> Count | None:
    """Counts as `_joined` writes them: a single one is for every layer."""
    return counts[0] if counts is not None and len(counts) == 1 else counts


def _parsed_fraction(text: str) -> float:
    exact = Fraction(text)
    if len(text.partition(".")[2]) >= 3:
        for total in range(1, 33):  # more heads or layers than 32 need more decimals
            share = Fraction(round(exact * total), total)
            if abs(share - exact) <= Fraction(1, 2000):
                return float(share)
    return float(exact)
