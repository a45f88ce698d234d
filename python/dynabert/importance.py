"""How much the loss depends on each attention head and each FFN neuron, measured on data.

Stands above the model and below `rewiring`, which sorts heads and neurons by these scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from dynabert_kernels import PackedAttention, PackedFFN

ImportanceRule = Literal["paper", "reference"]
Batch = Mapping[str, Any]
LossFunction = Callable[[nn.Module, Batch], Tensor]

RULES: tuple[ImportanceRule, ...] = ("paper", "reference")


@dataclass(frozen=True, eq=False)
class Importance:
    """Scores of one model, one tensor per layer; larger is more important.

    Only the order within a layer has a meaning.

    Attributes:
        head: Score of each head, ``[num_heads]`` float64 on the CPU, one tensor per layer.
        neuron: Score of each FFN neuron, ``[intermediate_size]`` float64 on the CPU, one tensor per
            layer.
        num_batches: How many batches the scores were summed over.
        num_rows: How many sequences those batches held.
        rule: The formula used.
    """

    head: list[Tensor]
    neuron: list[Tensor]
    num_batches: int
    num_rows: int
    rule: ImportanceRule


def packed_layers(model: nn.Module) -> list[tuple[PackedAttention, PackedFFN]]:
    """The packed parameters of every encoder layer of a DynaBERT model, first layer first.

    Raises:
        TypeError: `model` is no DynaBERT model.
    """
    base: Any = getattr(model, "base_model", model)
    try:
        layers = base.encoder.layer
        return [(layer.attention.packed(), layer.ffn.packed()) for layer in layers]
    except AttributeError:
        raise TypeError(
            f"packed_layers: model={type(model).__name__}, expected a DynaBERT model. "
            "Load it with DynaBertModel.from_pretrained or a class with a head."
        ) from None


def compute_importance(
    model: nn.Module,
    dataloader: Iterable[Batch],
    *,
    loss: LossFunction | None = None,
    rule: ImportanceRule = "paper",
    num_batches: int | None = None,
    progress: bool = True,
) -> Importance:
    """Score every head and neuron of a fine-tuned model by the first-order change of its loss.

    ``paper`` (DynaBERT, section 3.1): a head scores ``sum_batches |dL/dg|``, g a gate of value 1 on
    the head's output; in packed form that gradient is ``sum(out_weight[h] * out_weight.grad[h])``.
    A neuron scores ``sum_batches |sum(w * w.grad)|`` over the weights attached to it: its row of
    the up projection and its column of the down projection together, in one absolute value,
    without bias.

    ``reference`` reproduces the original code: gradients are not zeroed, so batch n adds the
    absolute value of the sum over batches 1 to n; and a neuron has two absolute values, the row
    with its bias, and the column.

    L is the mean loss of a batch. Every batch counts the same, a last smaller one included, and a
    sum of absolute values depends on the batch size: compare scores of equal batch sizes only. The
    model is in eval mode meanwhile; its modes, gradients and `requires_grad` flags are left as they
    were.

    Args:
        model: DynaBERT model, at full width and depth.
        dataloader: Batches as the model takes them; moved to the model's device.
        loss: Maps the model and a batch to a scalar loss; default: the model's own, from the
            batch's labels. Without labels see `dynabert.training.task_agnostic.contrastive_loss`. A
            distance to the model's own output does not work: its gradient is zero.
        rule: ``paper`` or ``reference``.
        num_batches: Stop after this many batches; None: use them all.
        progress: Show a progress bar, on stderr, where that is a terminal.

    Returns:
        The scores.

    Raises:
        ValueError: An unknown rule, no batch, a loss that is no scalar or has no gradient, or
            scores that are not finite (the message names the layer).

    Example:
        >>> importance = compute_importance(model, held_out_batches)  # doctest: +SKIP
        >>> record = rewire(model, importance, {"data": "1000 held-out rows"})  # doctest: +SKIP
    """
    if rule not in RULES:
        raise ValueError(
            f"compute_importance: rule={rule!r}, expected one of {', '.join(RULES)}. "
            "paper is the default."
        )
    layers = packed_layers(model)
    weights = [
        weight
        for attention, ffn in layers
        for weight in (attention.out_weight, ffn.up_weight, ffn.down_weight, ffn.up_bias)
    ]
    device = weights[0].device
    head_scores: list[Tensor] = []
    neuron_scores: list[Tensor] = []
    gradients: list[Tensor] = []
    num_done = num_rows = 0
    total = num_batches if num_batches is not None else _length(dataloader)
    with (
        _prepared(model, weights),
        tqdm(total=total, desc="importance", unit="batch", disable=not progress or None) as bar,
    ):
        for batch in islice(dataloader, num_batches):
            inputs = {
                name: value.to(device) if isinstance(value, Tensor) else value
                for name, value in batch.items()
            }
            new = list(torch.autograd.grad(_scalar_loss(model, inputs, loss), weights))
            if rule == "reference" and gradients:
                new = [old + fresh for old, fresh in zip(gradients, new, strict=True)]
            gradients = new
            heads, neurons = _batch_scores(weights, gradients, rule)
            if num_done == 0:
                head_scores, neuron_scores = heads, neurons
            else:
                head_scores = [a + b for a, b in zip(head_scores, heads, strict=True)]
                neuron_scores = [a + b for a, b in zip(neuron_scores, neurons, strict=True)]
            num_done += 1
            num_rows += len(next(iter(inputs.values())))
            bar.update()
    if num_done == 0:
        raise ValueError(
            "compute_importance: dataloader yielded 0 batches, expected at least 1. "
            "Check the data and num_batches."
        )
    head_scores = [score.cpu() for score in head_scores]
    neuron_scores = [score.cpu() for score in neuron_scores]
    for index, pair in enumerate(zip(head_scores, neuron_scores, strict=True)):
        _check_finite(index, *pair)
    return Importance(head_scores, neuron_scores, num_done, num_rows, rule)


def _batch_scores(
    weights: list[Tensor], gradients: list[Tensor], rule: ImportanceRule
) -> tuple[list[Tensor], list[Tensor]]:
    """Scores of one batch for every layer: heads ``[num_heads]``, neurons ``[intermediate_size]``,
    float64."""
    # First-order change of the loss when a row of a weight becomes zero, bias included for the up
    # projection.
    changes = [
        (weight.detach() * gradient).flatten(1).sum(dim=1, dtype=torch.float64)
        if weight.dim() > 1
        else (weight.detach() * gradient).double()
        for weight, gradient in zip(weights, gradients, strict=True)
    ]
    heads, neurons = [], []
    for out, up, down, bias in zip(*(changes[i::4] for i in range(4)), strict=True):
        heads.append(out.abs())
        neurons.append((up + bias).abs() + down.abs() if rule == "reference" else (up + down).abs())
    return heads, neurons


def _scalar_loss(model: nn.Module, inputs: Batch, loss: LossFunction | None) -> Tensor:
    value = model(**inputs).loss if loss is None else loss(model, inputs)
    if value is None:
        raise ValueError(
            "compute_importance: the batch has no labels, so the model has no loss. "
            "Add labels or pass loss=."
        )
    if value.dim() != 0 or not value.requires_grad:
        raise ValueError(
            f"compute_importance: loss of shape {tuple(value.shape)}, "
            f"requires_grad={value.requires_grad}, expected a scalar with a gradient. Return the "
            "mean over the batch, not detached."
        )
    return value


def _check_finite(index: int, head: Tensor, neuron: Tensor) -> None:
    for what, scores in (("head", head), ("neuron", neuron)):
        num_bad = int((~scores.isfinite()).sum())
        if num_bad:
            raise ValueError(
                f"compute_importance: {num_bad} of {len(scores)} {what} scores of layer {index} "
                "are not finite, expected finite numbers. Check the model's weights and the loss "
                "on this data."
            )


def _length(dataloader: Iterable[Batch]) -> int | None:
    return len(dataloader) if isinstance(dataloader, Sized) else None


@contextmanager
def _prepared(model: nn.Module, weights: list[Tensor]) -> Iterator[None]:
    """Eval mode, with gradients for `weights`; modes and flags are put back afterwards.

    Gradients are taken with `torch.autograd.grad`, which leaves every ``.grad`` alone.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [(weight, weight.requires_grad) for weight in weights]
    model.eval()
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for weight, flag in flags:
            weight.requires_grad_(flag)
