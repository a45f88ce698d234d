"""Predict the latency of any subnet from tables of its two ops, measured on this machine.

A search looks at hundreds of subnets; timing each would take hours. A layer of a subnet costs what
its attention costs at that many heads and its FFN at that many neurons, so two tables say it all::

    latency = fixed + sum over kept layers of (layer + a * attention(heads) + f * ffn(neurons))

The ops are timed alone (`measure_ops`). A call of the whole model spends some more outside the
layers (embeddings, head) and differs a little in every layer, by what is in the caches and by the
launches it saves: `fixed`, `layer`, `a` and `f` are fitted to whole-model latencies of a few
subnets. How far predictions are off is then measured on others, drawn at random.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynabert.configuration_dynabert import DynaBertConfig
from dynabert.evaluation import evaluation_mode
from dynabert.json_file import read_json, write_json
from dynabert.latency import LatencySetting, LatencyTable, measure_latency
from dynabert.modeling_pretrained import DynaBertPreTrainedModel
from dynabert.subnet import SubnetConfig, SubnetShape
from dynabert_kernels import use_backend
from dynabert_kernels.timing import measure
from dynabert_kernels.varlen import Packing

SCHEMA = 1
# Neurons of a weight panel of the CPU kernels; a part of one costs as much as all of it. The
# kernels of GPUs have larger tiles, whose steps the knots follow as far as they are near enough.
PANEL = 16
_MOST_KNOTS = 17
_WARMUP_SECONDS = 0.1


@dataclass(frozen=True)
class OpTable:
    """Latency of one op at some widths; in between it grows linearly from panel to panel.

    Attributes:
        counts: Heads or neurons, increasing.
        latency_ms: Median latency of one call at each, in milliseconds.
        panel: Heads or neurons that are computed together; a count is rounded up to a multiple.
    """

    counts: tuple[int, ...]
    latency_ms: tuple[float, ...]
    panel: int = 1

    def __call__(self, count: int) -> float:
        """Latency at `count` heads or neurons, in milliseconds.

        Raises:
            ValueError: It is more than the table holds.
        """
        if not 1 <= count <= self.counts[-1]:
            raise ValueError(
                f"OpTable: count={count}, expected 1 to {self.counts[-1]}. The table was measured "
                "for another model."
            )
        whole = min(-(-count // self.panel) * self.panel, self.counts[-1])
        place = bisect_left(self.counts, whole)
        if place == 0:
            return self.latency_ms[0]
        (low, high), (fast, slow) = (
            (values[place - 1], values[place]) for values in (self.counts, self.latency_ms)
        )
        return fast + (slow - fast) * (whole - low) / (high - low)


@dataclass(frozen=True)
class PredictorError:
    """How far predictions are from measurements of subnets that nothing was fitted to.

    Attributes:
        num_subnets: Subnets compared.
        mean: Mean of ``|predicted - measured| / measured``.
        worst: The largest of them.
    """

    num_subnets: int
    mean: float
    worst: float

    @classmethod
    def of(cls, predicted: Sequence[float], measured: Sequence[float]) -> PredictorError:
        """Compare at least one prediction with its measurement."""
        errors = [abs(p - m) / m for p, m in zip(predicted, measured, strict=True)]
        return cls(len(errors), math.fsum(errors) / len(errors), max(errors))

    def describe(self) -> str:
        """One line for a terminal."""
        return (
            f"off by {self.mean:.1%} on average and {self.worst:.1%} at most, on "
            f"{self.num_subnets} subnets it was not fitted to"
        )


@dataclass(frozen=True)
class LatencyPredictor:
    """Predicts the median latency of a subnet in one setting.

    Attributes:
        setting: What the predictions hold for.
        attention: Latency of the attention sublayer by heads.
        ffn: Latency of the FFN sublayer by neurons.
        fixed_ms: What a call spends outside the layers, in milliseconds.
        layer_ms: What a layer takes beside its ops in turn; negative where the model saves time
            that an op alone has to spend.
        attention_scale: Factor on the op's own latency inside the model.
        ffn_scale: The same for the FFN.
        error: How far off it is.
    """

    setting: LatencySetting
    attention: OpTable
    ffn: OpTable
    fixed_ms: float
    layer_ms: float
    attention_scale: float
    ffn_scale: float
    error: PredictorError

    def predict_ms(self, shape: SubnetShape) -> float:
        """Median latency of one batch in milliseconds.

        Raises:
            ValueError: The subnet is wider than the model that was measured.
        """
        return self.fixed_ms + sum(
            self.layer_ms
            + self.attention_scale * self.attention(layer.num_heads)
            + self.ffn_scale * self.ffn(layer.intermediate_size)
            for layer in shape.layers
        )

    def save(self, path: Path | str) -> None:
        """Write the predictor as JSON, whole or not at all."""
        write_json(path, {"schema": SCHEMA, **asdict(self)})

    @classmethod
    def load(
        cls, path: Path | str, *, allow_foreign: bool = False, **wanted: str | int
    ) -> LatencyPredictor:
        """Read what `save` wrote.

        Args:
            path: The file.
            allow_foreign: Also take one that was measured on another machine or with other
                versions.
            **wanted: Fields of the setting that must have these values, such as ``batch_size=1``;
                ``backend="auto"`` stands for whatever was chosen automatically.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is not such a file, was measured in another setting, or does not hold for
                this machine; the message says why.
        """
        document = read_json(path, schema=SCHEMA)
        try:
            predictor = cls._from_dict(document)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"LatencyPredictor: {path} cannot be read ({error!r}), expected what `save` "
                "writes. Remove the file and measure again."
            ) from error
        other = [
            f"{name}={getattr(predictor.setting, name)} and not {value}"
            for name, value in wanted.items()
            if getattr(predictor.setting, name) != value
            and not (name == "backend" and predictor.setting.backend.startswith(f"{value} ("))
        ]
        reason = f"it was measured with {', '.join(other)}" if other else None
        reason = reason or (None if allow_foreign else predictor.setting.why_not_here())
        if reason is not None:
            raise ValueError(
                f"LatencyPredictor: {path} does not hold here: {reason}. Measure again."
            )
        return predictor

    @classmethod
    def _from_dict(cls, values: Mapping[str, Any]) -> LatencyPredictor:
        given = {name: value for name, value in values.items() if name != "schema"}
        for name in ("attention", "ffn"):
            table = given[name]
            given[name] = OpTable(
                tuple(table["counts"]), tuple(table["latency_ms"]), table["panel"]
            )
        given["setting"] = LatencySetting(**given["setting"])
        given["error"] = PredictorError(**given["error"])
        return cls(**given)


def refuse_uneven(who: str, config: DynaBertConfig) -> None:
    """Refuse a model whose layers differ in size: one table of each op could not stand for all.

    Raises:
        ValueError: They differ.
    """
    if config.num_heads_per_layer or config.intermediate_size_per_layer:
        raise ValueError(
            f"{who}: the model's layers have {config.head_counts} heads and "
            f"{config.neuron_counts} neurons, expected the same in each. Use the model that this "
            "one was extracted from."
        )


def build_predictor(
    model: DynaBertPreTrainedModel,
    *,
    batch_size: int = 1,
    seq_len: int = 128,
    threads: int | None = None,
    backend: str | None = None,
    seconds: float = 20.0,
    num_fitted: int = 12,
    num_checked: int = 12,
    seed: int = 0,
    progress: bool = True,
) -> tuple[LatencyPredictor, LatencyTable]:
    """Measure what a predictor needs, on this machine.

    Args:
        model: The model, on the device and of the dtype to predict for.
        batch_size: Sequences per forward pass.
        seq_len: Tokens per sequence, all of them real.
        threads: CPU threads; None leaves them as they are.
        backend: Backend to force; None leaves the choice as it is.
        seconds: Time to measure for, in seconds, warm-up not included; half of it the ops.
        num_fitted: Subnets that the constants are fitted to, at least 5.
        num_checked: Further subnets that the error is measured on, at least 1.
        seed: Draws the subnets.
        progress: Show a progress bar, on stderr, where that is a terminal.

    Returns:
        The predictor, and the latencies of the subnets it was fitted to and checked on.

    Raises:
        ValueError: A count or time is out of range, or the model's layers differ in size.
    """
    refuse_uneven("build_predictor", model.config)
    least = {"num_fitted": (num_fitted, 5), "num_checked": (num_checked, 1)}
    for name, (count, fewest) in least.items():
        if count < fewest:
            raise ValueError(f"build_predictor: {name}={count}, expected {fewest} or more.")
    if not 0 < seconds < math.inf:
        raise ValueError(f"build_predictor: seconds={seconds}, expected a positive number.")
    attention, ffn = measure_ops(
        model,
        batch_size=batch_size,
        seq_len=seq_len,
        threads=threads,
        backend=backend,
        seconds=seconds / 2,
    )
    # The full network is always fitted to: no other says as much about the scales.
    subnets = list(
        dict.fromkeys(
            [
                _explicit(model.subnet_shape(None)),
                *random_subnets(model, 4 * (num_fitted + num_checked), seed=seed),
            ]
        )
    )[: num_fitted + num_checked]  # small models have few
    table = measure_latency(
        model,
        subnets,
        batch_size=batch_size,
        seq_len=seq_len,
        threads=threads,
        backend=backend,
        seconds_per_subnet=seconds / 2 / len(subnets),
        progress=progress,
    )
    return fit_predictor(model, attention, ffn, table, num_fitted=num_fitted), table


def fit_predictor(
    model: DynaBertPreTrainedModel,
    attention: OpTable,
    ffn: OpTable,
    table: LatencyTable,
    *,
    num_fitted: int,
) -> LatencyPredictor:
    """A predictor of the ops' latencies and those of the whole model at some subnets.

    Args:
        model: The model that was measured.
        attention: Latency of its attention sublayer.
        ffn: Latency of its FFN sublayer.
        table: Latencies of subnets in the setting to predict for.
        num_fitted: Rows of `table` to fit to, from the first; the error is measured on the rest.

    Raises:
        ValueError: No rows are left to check, or fewer than 5 to fit to.
    """
    if not 5 <= num_fitted < len(table.rows):
        raise ValueError(
            f"fit_predictor: num_fitted={num_fitted} of {len(table.rows)} subnets, expected 5 or "
            "more, and some left to check. Measure more of them."
        )
    shapes = [model.subnet_shape(row.subnet) for row in table.rows]
    measured = torch.tensor([row.median_ms for row in table.rows], dtype=torch.float64)
    parts = torch.tensor(
        [
            [
                1.0,
                len(shape.layers),
                sum(attention(layer.num_heads) for layer in shape.layers),
                sum(ffn(layer.intermediate_size) for layer in shape.layers),
            ]
            for shape in shapes
        ],
        dtype=torch.float64,
    )
    # Relative errors are what counts: a millisecond is much for a small subnet.
    weighed = (parts / measured[:, None])[:num_fitted]
    solved = torch.linalg.lstsq(weighed, torch.ones(num_fitted, 1, dtype=torch.float64)).solution
    fixed, layer, attention_scale, ffn_scale = solved.flatten().tolist()
    predicted = (parts @ solved).flatten().tolist()[num_fitted:]
    return LatencyPredictor(
        setting=table.setting,
        attention=attention,
        ffn=ffn,
        fixed_ms=fixed,
        layer_ms=layer,
        attention_scale=attention_scale,
        ffn_scale=ffn_scale,
        error=PredictorError.of(predicted, measured.tolist()[num_fitted:]),
    )


def measure_ops(
    model: DynaBertPreTrainedModel,
    *,
    batch_size: int,
    seq_len: int,
    threads: int | None = None,
    backend: str | None = None,
    seconds: float = 10.0,
) -> tuple[OpTable, OpTable]:
    """Tables of the attention and the FFN sublayer of a model on random tokens.

    A sample is one pass through the op of every layer in turn, divided by the layers: each has
    weights of its own, as in a forward pass, so they are not always in the fastest cache.

    Args:
        model: The model, run where it is and as it is.
        batch_size: Sequences.
        seq_len: Tokens per sequence.
        threads: CPU threads; None leaves them as they are.
        backend: Backend to force; None leaves the choice as it is.
        seconds: Time to spend on all of it, in seconds, warm-up not included.

    Returns:
        Attention by heads, FFN by neurons; milliseconds of one layer.
    """
    weight = next(model.parameters())
    layers: Any = model.base_model.encoder.layer  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(batch_size * seq_len, model.config.hidden_size, generator=generator)
    hidden = hidden.to(weight.device, weight.dtype)
    packing = Packing.dense(batch_size, seq_len, weight.device)
    heads = knots(model.config.num_attention_heads, 1)
    neurons = knots(model.config.intermediate_size, PANEL)
    calls: dict[str, Callable[[], object]] = {
        **{f"attention {n}": _pass(layers, _attention_call(hidden, n, packing)) for n in heads},
        **{f"ffn {n}": _pass(layers, _ffn_call(hidden, n, packing)) for n in neurons},
    }
    former = torch.get_num_threads()
    torch.set_num_threads(former if threads is None else threads)
    try:
        with (
            nullcontext() if backend is None else use_backend(backend),
            evaluation_mode(model),
            torch.no_grad(),
        ):
            # In an order of its own: neighbours of like size would be timed in caches of like fill.
            names = random.Random(0).sample(sorted(calls), len(calls))
            timings = measure(
                {name: calls[name] for name in names},
                seconds=seconds,
                warmup_seconds=_WARMUP_SECONDS,
                min_samples=5,
            )
    finally:
        torch.set_num_threads(former)

    def table(op: str, counts: Sequence[int], panel: int) -> OpTable:
        medians = (timings[f"{op} {n}"].median_ms / len(layers) for n in counts)
        return OpTable(tuple(counts), tuple(medians), panel)

    return table("attention", heads, 1), table("ffn", neurons, PANEL)


def knots(most: int, panel: int) -> list[int]:
    """Up to 17 widths from one panel to all of them, evenly spread, whole panels where they can be.

    Example:
        >>> knots(4, 1), knots(1536, 16)[:4], knots(1536, 16)[-1]
        ([1, 2, 3, 4], [16, 96, 192, 288], 1536)
    """
    panels = -(-most // panel)
    steps = min(panels, _MOST_KNOTS - 1)
    spread = {round(panels * step / steps) for step in range(1, steps + 1)} | {1}
    return sorted({min(count * panel, most) for count in spread})


def random_subnets(
    model: DynaBertPreTrainedModel, count: int, *, seed: int = 0, panel: int = PANEL
) -> list[SubnetConfig]:
    """Subnets whose number of layers, and each layer's heads and neurons, are drawn evenly.

    Args:
        model: The model they are for.
        count: How many to draw; fewer come back where some are the same.
        seed: Draws them.
        panel: Neurons are whole multiples of this, or all of them.
    """
    draw = random.Random(seed)
    config = model.config
    panels = -(-config.intermediate_size // panel)
    subnets = []
    for _ in range(count):
        kept = draw.randint(1, config.num_hidden_layers)
        subnets.append(
            SubnetConfig(
                num_heads=tuple(draw.randint(1, config.num_attention_heads) for _ in range(kept)),
                intermediate_size=tuple(
                    min(draw.randint(1, panels) * panel, config.intermediate_size)
                    for _ in range(kept)
                ),
                layers=tuple(sorted(draw.sample(range(config.num_hidden_layers), kept))),
            )
        )
    return list({subnet.name: subnet for subnet in subnets}.values())


def _explicit(shape: SubnetShape) -> SubnetConfig:
    return SubnetConfig(
        num_heads=tuple(layer.num_heads for layer in shape.layers),
        intermediate_size=tuple(layer.intermediate_size for layer in shape.layers),
        layers=tuple(layer.index for layer in shape.layers),
    )


def _attention_call(hidden: Tensor, heads: int, packing: Packing) -> Callable[[Any], object]:
    return lambda layer: layer.attention(hidden, heads, packing, None)


def _ffn_call(hidden: Tensor, neurons: int, packing: Packing) -> Callable[[Any], object]:
    return lambda layer: layer.ffn(hidden, neurons, packing)


def _pass(layers: Sequence[Any], run: Callable[[Any], Any]) -> Callable[[], None]:
    def call() -> None:
        for layer in layers:
            output = run(layer)
        if output.is_cuda:
            torch.cuda.synchronize(output.device)

    return call
