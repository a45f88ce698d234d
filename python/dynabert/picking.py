"""Choose the subnet to deploy: the most accurate one that meets a latency budget.

Candidates are all subnets that were both evaluated and timed: the cells of the uniform grid, and
those that ``dynabert search`` has added with widths of their own in every layer.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from dynabert.evaluation import ScoredSubnet
from dynabert.latency import LatencyTable, load_latency, measure_latency, save_latency
from dynabert.modeling_pretrained import DynaBertPreTrainedModel
from dynabert.subnet import SubnetConfig
from dynabert_kernels.ops import forced_backend

Percentile = Literal["median", "p20", "p80", "p99"]
PERCENTILES: tuple[Percentile, ...] = ("median", "p20", "p80", "p99")
IfNone = Literal["raise", "fastest"]
IF_NONE: tuple[IfNone, ...] = ("raise", "fastest")
# A machine is not equally fast every minute: share by which a measured latency may grow until the
# budget is missed. benchmarks/bench_pick.py measures how far a second measurement is off.
MARGIN = 0.05

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """A subnet that was evaluated and timed.

    Attributes:
        subnet: The subnet.
        primary: Its score on the task.
        latency_ms: Its latency at the percentile asked for, in milliseconds.
    """

    subnet: SubnetConfig
    primary: float
    latency_ms: float


@dataclass(frozen=True)
class Pick:
    """The chosen subnet.

    Attributes:
        subnet: What to pass as ``model(..., subnet=...)``.
        primary: Its score on the task.
        latency_ms: Its measured latency at the percentile asked for, in milliseconds.
        budget_ms: The budget that was asked for.
        percentile: The percentile of latency that was held to the budget.
        untimed: Names of evaluated subnets that were no candidates because the table has no latency
            for them.
        margin: Share of its latency that was kept free below the budget.
        is_within: Whether the budget is met, with the margin; False only of a fastest subnet that
            was asked for where none fits.
    """

    subnet: SubnetConfig
    primary: float
    latency_ms: float
    budget_ms: float
    percentile: Percentile
    untimed: tuple[str, ...]
    margin: float = 0.0
    is_within: bool = True


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other point beats, from the fastest to the best.

    A point (latency, score) is beaten by one that is at most as slow and at least as good, and
    better in one of the two. Of equal points the first stands for all.

    Example:
        >>> pareto_front([(4.0, 0.90), (2.0, 0.85), (3.0, 0.84), (2.5, 0.85)])
        [1, 0]
    """
    front: list[int] = []
    best = float("-inf")
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i)):
        if points[index][1] > best:
            front.append(index)
            best = points[index][1]
    return front


def pareto_subnets(
    grid: Sequence[ScoredSubnet], latency: LatencyTable, percentile: Percentile = "p80"
) -> list[Candidate]:
    """The subnets worth choosing from: nothing faster is as good; from the fastest to the best.

    Example:
        >>> [found.subnet.name for found in pareto_subnets(grid, table)]  # doctest: +SKIP
        ['w0.25-d0.5', 'w0.25-d1', 'w1-d1']
    """
    candidates, _ = _candidates(grid, latency, percentile)
    front = pareto_front([(each.latency_ms, each.primary) for each in candidates])
    return [candidates[index] for index in front]


def check_request(
    budget_ms: float,
    percentile: str = "p80",
    *,
    if_none: str = "raise",
    margin: float = MARGIN,
) -> None:
    """Refuse what `pick` would refuse, before anything is measured for it.

    Raises:
        ValueError: A budget that is not a positive number, a margin that is negative or not finite,
            or a word that is not known.
    """
    if percentile not in PERCENTILES:
        raise ValueError(
            f"pick: percentile={percentile!r}, expected one of {', '.join(PERCENTILES)}. "
            "p80 is the usual choice."
        )
    if if_none not in IF_NONE:
        raise ValueError(
            f"pick: if_none={if_none!r}, expected {' or '.join(IF_NONE)}. "
            "It says what happens where no subnet is within the budget."
        )
    if not 0 < budget_ms < math.inf:
        raise ValueError(
            f"pick: budget_ms={budget_ms}, expected a positive number of milliseconds. "
            "Give the longest acceptable latency of one batch."
        )
    if not 0 <= margin < math.inf:
        raise ValueError(
            f"pick: margin={margin}, expected a share of 0 or more. {MARGIN} keeps "
            f"{MARGIN:.0%} of the latency free."
        )


def pick(
    grid: Sequence[ScoredSubnet],
    latency: LatencyTable,
    budget_ms: float,
    percentile: Percentile = "p80",
    *,
    if_none: IfNone = "raise",
    margin: float = MARGIN,
) -> Pick:
    """The most accurate subnet within the budget; of equally accurate ones the fastest.

    A subnet is within the budget if its measured latency and `margin` on top of it are: a machine
    is a little faster or slower from one minute to the next.

    Args:
        grid: Scores, one row per subnet.
        latency: Latencies on the machine that will serve, in milliseconds.
        budget_ms: Longest acceptable latency of one batch, in milliseconds.
        percentile: Which percentile of the measured latencies must fit.
        if_none: What to do where no subnet is within the budget: ``"raise"``, or take the
            ``"fastest"``, marked by `Pick.is_within`.
        margin: Share of the measured latency to keep free; 0 takes it at its word.

    Raises:
        ValueError: An argument `check_request` refuses, no subnet that was both evaluated and
            timed, or none within the budget; the last names the fastest.

    Example:
        >>> choice = pick(grid, latency, budget_ms=10.0)  # doctest: +SKIP
        >>> model(**inputs, subnet=choice.subnet)  # doctest: +SKIP
    """
    check_request(budget_ms, percentile, if_none=if_none, margin=margin)
    candidates, untimed = _candidates(grid, latency, percentile)
    if not candidates:
        raise ValueError(
            f"pick: grid=[{', '.join(untimed)}], expected subnets that the latency table holds "
            f"({', '.join(row.subnet.name for row in latency.rows)}). "
            "Measure the latency of the evaluated subnets."
        )
    within = [each for each in candidates if each.latency_ms * (1 + margin) <= budget_ms]
    if within:
        best = min(within, key=lambda each: (-each.primary, each.latency_ms))
    else:
        best = min(candidates, key=lambda each: (each.latency_ms, -each.primary))
        if if_none == "raise":
            enough = math.ceil(best.latency_ms * (1 + margin) * 100) / 100
            free = f", and {margin:.3g} of that is kept free (margin)" if margin else ""
            raise ValueError(
                f"pick: budget_ms={budget_ms:g}, expected at least {enough:g}. The fastest subnet, "
                f"{best.subnet.name}, takes {best.latency_ms:.3g} ms ({percentile}){free}."
            )
    return Pick(
        best.subnet,
        best.primary,
        best.latency_ms,
        budget_ms,
        percentile,
        untimed,
        margin=margin,
        is_within=bool(within),
    )


def pick_for_model(
    model: DynaBertPreTrainedModel,
    budget_ms: float,
    *,
    batch_size: int = 1,
    seq_len: int = 128,
    percentile: Percentile = "p80",
    if_none: IfNone = "raise",
    margin: float = MARGIN,
    folder: Path | str | None = None,
    seconds_per_subnet: float = 2.0,
) -> Pick:
    """What `DynaBertPreTrainedModel.pick` does; see there."""
    from dynabert.report import GridReport  # which itself builds on this module

    check_request(budget_ms, percentile, if_none=if_none, margin=margin)
    place = folder_of_reports(model) if folder is None else Path(folder)
    grid_json = place / "grid.json"
    if not grid_json.is_file():
        raise FileNotFoundError(
            f"pick: {grid_json} is missing, expected the score of every subnet. "
            "Run `dynabert evaluate` first, or name the folder that holds it."
        )
    rows = GridReport.load(grid_json).rows
    table = latency_here(
        model,
        [row.subnet for row in rows],
        place / "latency.json",
        batch_size=batch_size,
        seq_len=seq_len,
        seconds_per_subnet=seconds_per_subnet,
    )
    return pick(rows, table, budget_ms, percentile, if_none=if_none, margin=margin)


def latency_here(
    model: DynaBertPreTrainedModel,
    subnets: Sequence[SubnetConfig],
    path: Path,
    *,
    batch_size: int = 1,
    seq_len: int = 128,
    threads: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    seconds_per_subnet: float = 2.0,
    keep: Callable[[LatencyTable], object] | None = None,
) -> LatencyTable:
    """Latencies of every subnet on this machine: those of ``latency.json``, or measured now.

    What has to be measured is said in the log and kept in the file.

    Args:
        model: The model.
        subnets: What the table must hold.
        path: The file; need not exist.
        batch_size: As for `measure_latency`, like the next ones.
        seq_len: Tokens per sequence.
        threads: CPU threads; None for as many as PyTorch uses now.
        device: Where to run; None where the model is.
        dtype: Element type; None leaves the model's.
        backend: Backend to force; None leaves the choice as it is.
        seconds_per_subnet: Time to measure each subnet for, in seconds.
        keep: Called with what was measured, to keep it; None adds it to the file.

    Raises:
        ValueError: What `measure_latency` refuses, or a subnet that does not fit the model.
    """
    weight = next(model.parameters())
    own = torch.int8 if model.quantization == "int8" else weight.dtype
    where = weight.device if device is None else torch.device(device)
    known: LatencyTable | None = None
    missing = list({subnet.name: subnet for subnet in subnets}.values())
    try:
        known = load_latency(
            path,
            batch_size=batch_size,
            seq_len=seq_len,
            device=where.type,
            threads=torch.get_num_threads() if threads is None else threads,
            dtype=str(own if dtype is None else dtype).removeprefix("torch."),
            backend=backend or forced_backend() or "auto",
            model=model,
        )
    except (FileNotFoundError, ValueError) as reason:
        _log.info("measuring, since there is no table to use: %s", reason)
    else:
        missing = [subnet for subnet in missing if known.row(subnet) is None]
        if not missing:
            return known
        _log.info("measuring %d subnets that the table does not hold", len(missing))
    measured = measure_latency(
        model,
        missing,
        batch_size=batch_size,
        seq_len=seq_len,
        threads=threads,
        device=device,
        dtype=dtype,
        backend=backend,
        seconds_per_subnet=seconds_per_subnet,
    )
    if keep is None:
        save_latency(measured, path)
    else:
        keep(measured)
    return measured if known is None else known.merged(measured)


def _candidates(
    grid: Sequence[ScoredSubnet], latency: LatencyTable, percentile: Percentile
) -> tuple[list[Candidate], tuple[str, ...]]:
    """What can be chosen, and the names of the subnets that have no latency."""
    candidates, untimed = [], []
    for row in grid:
        times = latency.row(row.subnet)
        if times is None:
            untimed.append(row.subnet.name)
        else:
            candidates.append(Candidate(row.subnet, row.primary, times.at(percentile)))
    return candidates, tuple(untimed)


def folder_of_reports(model: DynaBertPreTrainedModel) -> Path:
    """The folder the model was loaded from, or that of the run it is the result of.

    Raises:
        FileNotFoundError: It was not loaded from a folder.
    """
    name = str(model.name_or_path or "")
    own = Path(name)
    if not name or not own.is_dir():
        raise FileNotFoundError(
            f"pick: the model comes from {name or 'no file'!r}, expected a folder with grid.json "
            "beside it. Load the model from its run, or name the folder that holds grid.json."
        )
    run = own.resolve().parent
    return run if not (own / "grid.json").is_file() and (run / "run.json").is_file() else own
