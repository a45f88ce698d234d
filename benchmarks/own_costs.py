"""What only our model can be asked: fixed cost outside the encoder, encoder time, switching.

Runs in the worker of the peer `ours`, alone. Every figure compares variants interleaved call by
call in one process.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.runtimes import Job, geometry_of
from benchmarks.runtimes.ours import full_model, in_dtype
from dynabert import DynaBertModel, SubnetConfig
from dynabert_kernels.timing import Timing, measure

_WARM_SECONDS = 0.2
_LEAST_SAMPLES = 20


def profile(job: Job, pairs: Sequence[Sequence[float]], seconds: float) -> list[dict[str, Any]]:
    """Rows of costs at each (width, depth) of `pairs`.

    Args:
        job: Model, dtype, input, backend and threads.
        pairs: Subnets as (width, depth).
        seconds: Time to spend on all of it.
    """
    model = in_dtype(full_model(geometry_of(job), Path(job.full_weights)), job.dtype)
    ids, mask = (None if a is None else torch.from_numpy(a) for a in job.read_inputs())
    inputs = {"input_ids": ids, "attention_mask": mask}
    subnets = [SubnetConfig(*pair) for pair in pairs]
    with torch.inference_mode():
        rows = _encoder_and_rest(model, inputs, subnets, seconds / 2)
        if len(subnets) > 1:
            rows.append(_switching(model, inputs, subnets, seconds / 2))
    return rows


def _encoder_and_rest(
    model: DynaBertModel, inputs: dict[str, Any], subnets: list[SubnetConfig], seconds: float
) -> list[dict[str, Any]]:
    """The model against its encoder alone on the state and steps that the model gives it."""
    variants: dict[str, Callable[[], object]] = {}
    for subnet in subnets:
        given: list[Any] = []
        hook = model.encoder.register_forward_pre_hook(
            lambda _, arguments, given=given: given.extend(arguments)
        )
        model(**inputs, subnet=subnet)
        hook.remove()
        variants[f"model {subnet.name}"] = lambda subnet=subnet: model(**inputs, subnet=subnet)
        variants[f"encoder {subnet.name}"] = lambda given=given: model.encoder(*given)
    timings = measure(
        variants,
        seconds=seconds,
        warmup_seconds=_WARM_SECONDS,
        min_samples=_LEAST_SAMPLES,
        max_samples=2000,
    )
    return [
        {
            "case": "outside_encoder",
            "subnet": subnet.name,
            "whole": _row(timings[f"model {subnet.name}"]),
            "encoder": _row(timings[f"encoder {subnet.name}"]),
            "outside_us": 1e3
            * statistics.median(
                whole - part
                for whole, part in zip(
                    timings[f"model {subnet.name}"].samples_ms,
                    timings[f"encoder {subnet.name}"].samples_ms,
                    strict=True,
                )
            ),
        }
        for subnet in subnets
    ]


def _row(timing: Timing) -> dict[str, float | int]:
    return {
        "median_ms": timing.median_ms,
        "p20_ms": timing.p20_ms,
        "p80_ms": timing.p80_ms,
        "n": timing.num_samples,
    }


def _switching(
    model: DynaBertModel, inputs: dict[str, Any], subnets: list[SubnetConfig], seconds: float
) -> dict[str, Any]:
    """Cost of a call at another subnet than the call before.

    The widest and the narrowest are called in random order, so that a call follows its own subnet
    as often as the other, at all times alike. The cost is the difference of the two medians, on
    average over both subnets.
    """
    pair = (subnets[0], subnets[-1])
    draw = random.Random(0)
    samples: dict[tuple[int, bool], list[float]] = {
        (number, switched): [] for number in range(2) for switched in (False, True)
    }
    end = time.perf_counter() + seconds
    before = None
    while time.perf_counter() < end or min(map(len, samples.values())) < _LEAST_SAMPLES:
        number = draw.randrange(2)
        start = time.perf_counter()
        model(**inputs, subnet=pair[number])
        elapsed = (time.perf_counter() - start) * 1e3
        if before is not None:
            samples[number, before != number].append(elapsed)
        before = number
    timings = {key: Timing(tuple(values)) for key, values in samples.items()}
    costs = [timings[n, True].median_ms - timings[n, False].median_ms for n in range(2)]
    return {
        "case": "switching",
        "subnet": "|".join(subnet.name for subnet in pair),
        "switch_us": 1e3 * statistics.mean(costs),
        "switched": [_row(timings[n, True]) for n in range(2)],
        "same": [_row(timings[n, False]) for n in range(2)],
    }
