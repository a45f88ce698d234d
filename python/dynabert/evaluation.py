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

from dynabert.data.collators import IGNORED_LABEL, LABEL_NAMES, EncodedDataset
from dynabert.data.examples import Problem, TaskSpec
from dynabert.data.metrics import compute_metrics, require_finite
from dynabert.data.question_rows import QuestionRows, Span, best_spans
from dynabert.data.token_rows import TokenRows
from dynabert.subnet import SubnetConfig


class EncodedRows(Protocol):
    """A tokenised dataset: each row a dict of input_ids, labels and, when known, length."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


Rows = list[dict[str, Any]]
Batch = Mapping[str, Tensor]
Collator = Callable[[Rows], Batch]
# What a model's output predicts for each row of a batch.
Reader = Callable[[Any, Batch, Rows], list[Any]]


@dataclass(frozen=True)
class GridRow:
    """How well one subnet does.

    Attributes:
        subnet: The subnet.
        metrics: Every metric of the task, by name, as fractions.
        primary: The metric the task is judged by; one of `metrics`.
        num_rows: Examples it was computed on, however many rows they were tokenised to.
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
    """Evaluate every subnet of a model with a head.

    Rows are batched by length, so a batch carries little padding; a batch is collated and moved
    once and serves every subnet. Predictions are put back in the dataset's order before the metrics
    are computed. The model is in eval mode meanwhile, and leaves in the mode it came in.

    Args:
        model: Called as ``model(**batch, subnet=subnet)``; its output has ``logits``,
            ``[batch_size, num_labels]`` or for token classification ``[batch_size, seq_len,
            num_labels]``, or for question answering ``start_logits`` and ``end_logits``,
            ``[batch_size, seq_len]``.
        dataset: Tokenised rows: each with its label under ``labels`` for classification and
            regression, else `TokenRows` or `QuestionRows`.
        collator: Makes a padded batch of a list of rows.
        spec: The task: kind of problem and metrics.
        subnets: What to evaluate; the result has the same order.
        batch_size: Sequences per forward pass.
        device: Where to run; the model is moved there. None: where the model is.
        autocast_dtype: Run under ``torch.autocast`` with this dtype, for instance bfloat16. None:
            no autocast.
        progress: Show a progress bar, on stderr, where that is a terminal.

    Returns:
        One `GridRow` per subnet.

    Raises:
        TypeError: The rows are not those of the task's problem.
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

    truth = _truth(dataset, spec)
    lengths = [row.get("length", len(row["input_ids"])) for row in _rows(dataset)]
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    predictions = _predictions_of_grid(
        model, dataset, collator, spec, subnets, order, batch_size, where, autocast_dtype, progress
    )
    rows = []
    for subnet, by_length in zip(subnets, predictions, strict=True):
        back = dict(zip(order, by_length, strict=True))
        in_dataset_order = [back[index] for index in range(len(order))]
        with _named(subnet):
            metrics = compute_metrics(spec, _predicted(dataset, spec, in_dataset_order), truth)
        rows.append(GridRow(subnet, metrics, metrics[spec.primary_metric], len(truth)))
    return rows


def _predictions_of_grid(
    model: nn.Module,
    dataset: EncodedRows,
    collator: Collator,
    spec: TaskSpec,
    subnets: Sequence[SubnetConfig],
    order: Sequence[int],
    batch_size: int,
    device: torch.device,
    autocast_dtype: torch.dtype | None,
    progress: bool,
) -> list[list[Any]]:
    """What each subnet predicts for each row, rows in that order; see `_READERS`."""
    read: Reader = _READERS.get(spec.problem, _read_logits)
    collected: list[list[Any]] = [[] for _ in subnets]
    # no_grad, not inference_mode: what a model prepares here and keeps must stay usable in
    # training.
    with (
        evaluation_mode(model),
        torch.no_grad(),
        torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None),
        tqdm(total=len(order), desc="evaluate", unit="row", disable=not progress or None) as bar,
    ):
        for start in range(0, len(order), batch_size):
            rows = [dict(dataset[index]) for index in order[start : start + batch_size]]
            batch = {name: tensor.to(device) for name, tensor in collator(rows).items()}
            inputs = {name: value for name, value in batch.items() if name not in LABEL_NAMES}
            for subnet, predictions in zip(subnets, collected, strict=True):
                output = model(**inputs, subnet=subnet)
                with _named(subnet):
                    predictions.extend(read(output, batch, rows))
            bar.update(len(rows))
    return collected


def _read_logits(output: Any, batch: Batch, rows: Rows) -> list[Tensor]:
    """Logits of each row, ``[num_labels]`` float32 on the CPU."""
    return list(output.logits.float().cpu())


def _read_tags(output: Any, batch: Batch, rows: Rows) -> list[list[int]]:
    """The likeliest tag at each labelled token of each row."""
    is_labelled = batch["labels"] != IGNORED_LABEL
    logits = output.logits[is_labelled].float().cpu()
    require_finite(logits)
    counts = is_labelled.sum(dim=1).tolist()
    return [tags.tolist() for tags in logits.argmax(dim=-1).split(counts)]


def _read_spans(output: Any, batch: Batch, rows: Rows) -> list[Span]:
    """The best span in the context of each row."""
    mask = batch["attention_mask"]
    is_context = torch.zeros(mask.shape, dtype=torch.bool)
    first_tokens = mask.argmax(dim=1).tolist()  # not 0 where padding is on the left
    for row, chosen, before in zip(rows, is_context, first_tokens, strict=True):
        begin, end = row["context"]
        chosen[before + begin : before + end] = True
    spans = best_spans(output.start_logits, output.end_logits, is_context.to(mask.device))
    require_finite([span.score for span in spans])
    return [
        Span(span.score, span.start - before, span.end - before)
        for span, before in zip(spans, first_tokens, strict=True)
    ]


_DATASETS: dict[Problem, type[EncodedDataset]] = {
    "token-classification": TokenRows,
    "question-answering": QuestionRows,
}
_READERS: dict[Problem, Reader] = {
    "token-classification": _read_tags,
    "question-answering": _read_spans,
}


def _truth(dataset: EncodedRows, spec: TaskSpec) -> Sequence[Any]:
    """What each example should be, as `compute_metrics` takes it."""
    if isinstance(dataset, TokenRows):
        return dataset.right_tags(spec.label_names)
    if isinstance(dataset, QuestionRows):
        return dataset.right_answers()
    labels = []
    for index, row in enumerate(_rows(dataset)):
        if "labels" not in row:
            raise ValueError(
                f"evaluate_grid: dataset row {index} has no labels, expected one for every row. "
                "Evaluate on labelled data."
            )
        labels.append(row["labels"])
    return labels


def _predicted(dataset: EncodedRows, spec: TaskSpec, predictions: list[Any]) -> Any:
    """What each example is predicted to be, from the predictions for each row."""
    if isinstance(dataset, TokenRows):
        return dataset.predicted_tags(predictions, spec.label_names)
    if isinstance(dataset, QuestionRows):
        return dataset.predicted_answers(predictions)
    return torch.stack(predictions)


def _rows(dataset: EncodedRows) -> Iterator[Mapping[str, Any]]:
    return (dataset[index] for index in range(len(dataset)))


@contextmanager
def _named(subnet: SubnetConfig) -> Iterator[None]:
    """Name the subnet in errors about what it predicts."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"evaluate_grid: subnet {subnet.name}: {error}") from error


def _check(
    dataset: EncodedRows, spec: TaskSpec, subnets: Sequence[SubnetConfig], batch_size: int
) -> None:
    if spec.problem == "none":
        raise ValueError(
            f"evaluate_grid: spec.problem={spec.problem!r}, expected a task with labels. "
            "Evaluate the model on a labelled task."
        )
    kind = _DATASETS.get(spec.problem)
    if kind is not None and not isinstance(dataset, kind):
        raise TypeError(
            f"evaluate_grid: dataset={type(dataset).__name__}, expected {kind.__name__} for "
            f"{spec.problem}. Tokenise the examples with the function that makes these rows."
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
