"""Score every subnet of one model on one dataset.

Stands above the model and the data, below training and the command line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from dynabert.data.examples import TaskSpec
from dynabert.data.metrics import compute_metrics
from dynabert.subnet import SubnetConfig


class EncodedRows(Protocol):
    """A tokenised dataset: each row a dict of input_ids, labels and, when known, length."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


Collator = Callable[[list[dict[str, Any]]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class GridRow:
    """How well one subnet does.

    Attributes:
        subnet: The subnet.
        metrics: Every metric of the task, by name, as fractions.
        primary: The metric the task is judged by; one of `metrics`.
        num_rows: Examples it was computed on.
    """

    subnet: SubnetConfig
    metrics: Mapping[str, float]
    primary: float
    num_rows: int


class ScoredSubnet(Protocol):
    """A subnet with the score it is chosen by; `GridRow` is one."""

    @property
    def subnet(self) -> SubnetConfig: ...
    @property
    def primary(self) -> float: ...


def grid_mean(rows: Sequence[ScoredSubnet]) -> float:
    """Mean of the primary metric over the grid: the number a checkpoint is selected by.

    Raises:
        ValueError: There are no rows.
    """
    if not rows:
        raise ValueError("grid_mean: rows=[], expected at least one. Evaluate a subnet first.")
    return math.fsum(row.primary for row in rows) / len(rows)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode, and give each its own former mode back afterwards."""
    former = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in former:
            module.training = training


def evaluate_grid(
    model: nn.Module,
    dataset: EncodedRows,
    collator: Collator,
    spec: TaskSpec,
    subnets: Sequence[SubnetConfig],
    *,
    batch_size: int = 32,
    device: torch.device | str | None = None,
    autocast_dtype: torch.dtype | None = None,
    progress: bool = True,
) -> list[GridRow]:
    """Evaluate every subnet of a classification or regression model.

    Rows are batched by length, so a batch carries little padding; a batch is collated and moved
    once and serves every subnet. Predictions are put back in the dataset's order before the metrics
    are computed. The model is in eval mode meanwhile, and leaves in the mode it came in.

    Args:
        model: Called as ``model(**batch, subnet=subnet)``; its output has ``logits``,
            ``[batch_size, num_labels]``.
        dataset: Tokenised rows, each with its label under ``labels``.
        collator: Makes a padded batch of a list of rows.
        spec: The task: kind of problem and metrics.
        subnets: What to evaluate; the result has the same order.
        batch_size: Sequences per forward pass.
        device: Where to run; the model is moved there. None: where the model is.
        autocast_dtype: Run under ``torch.autocast`` with this dtype, for instance bfloat16. None:
            no autocast.
        progress: Show a progress bar, on stderr.

    Returns:
        One `GridRow` per subnet.

    Raises:
        ValueError: Nothing to evaluate, no labels, a task without labels, or logits that are not
            finite.

    Example:
        >>> rows = evaluate_grid(model, dataset, collator, spec, subnet_grid())  # doctest: +SKIP
        >>> {row.subnet.name: row.primary for row in rows}  # doctest: +SKIP
        {'w1-d1': 0.881, 'w0.75-d1': 0.883, ...}
    """
    _check(dataset, spec, subnets, batch_size)
    if device is not None:
        model.to(device)
    where = next(model.parameters()).device

    lengths, labels = _lengths_and_labels(dataset)
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    logits = _logits_of_grid(
        model, dataset, collator, subnets, order, batch_size, where, autocast_dtype, progress
    )
    rows = []
    for subnet, sorted_logits in zip(subnets, logits, strict=True):
        in_dataset_order = torch.empty_like(sorted_logits)
        in_dataset_order[torch.tensor(order)] = sorted_logits
        try:
            metrics = compute_metrics(spec, in_dataset_order.numpy(), labels)
        except ValueError as error:
            raise ValueError(f"evaluate_grid: subnet {subnet.name}: {error}") from error
        rows.append(GridRow(subnet, metrics, metrics[spec.primary_metric], len(labels)))
    return rows


def _logits_of_grid(
    model: nn.Module,
    dataset: EncodedRows,
    collator: Collator,
    subnets: Sequence[SubnetConfig],
    order: Sequence[int],
    batch_size: int,
    device: torch.device,
    autocast_dtype: torch.dtype | None,
    progress: bool,
) -> list[Tensor]:
    """Logits of each subnet, ``[len(order), num_labels]`` float32 on the CPU, in that order."""
    collected: list[list[Tensor]] = [[] for _ in subnets]
    # no_grad, not inference_mode: what a model prepares here and keeps must stay usable in
    # training.
    with (
        evaluation_mode(model),
        torch.no_grad(),
        torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None),
        tqdm(total=len(order), desc="evaluate", unit="row", disable=not progress) as bar,
    ):
        for start in range(0, len(order), batch_size):
            rows = [dict(dataset[index]) for index in order[start : start + batch_size]]
            inputs = {
                name: tensor.to(device)
                for name, tensor in collator(rows).items()
                if name != "labels"
            }
            for subnet, outputs in zip(subnets, collected, strict=True):
                outputs.append(model(**inputs, subnet=subnet).logits.float().cpu())
            bar.update(len(rows))
    return [torch.cat(outputs) for outputs in collected]


def _lengths_and_labels(dataset: EncodedRows) -> tuple[list[int], list[int | float]]:
    lengths, labels = [], []
    for index in range(len(dataset)):
        row = dataset[index]
        if "labels" not in row:
            raise ValueError(
                f"evaluate_grid: dataset row {index} has no labels, expected one for every row. "
                "Evaluate on labelled data."
            )
        lengths.append(row["length"] if "length" in row else len(row["input_ids"]))
        labels.append(row["labels"])
    return lengths, labels


def _check(
    dataset: EncodedRows, spec: TaskSpec, subnets: Sequence[SubnetConfig], batch_size: int
) -> None:
    if spec.problem == "none":
        raise ValueError(
            f"evaluate_grid: spec.problem={spec.problem!r}, expected classification or regression. "
            "Evaluate the model on a labelled task."
        )
    for name, count in (
        ("dataset rows", len(dataset)),
        ("subnets", len(subnets)),
        ("batch_size", batch_size),
    ):
        if count < 1:
            raise ValueError(
                f"evaluate_grid: {name}={count}, expected 1 or more. Give it something to evaluate."
            )
