"""Sort heads and neurons by importance, so that every narrower subnet is a prefix of the full
network.

Stands above `importance`; the record of what was done is a `RewiringRecord`, saved with the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dynabert.importance import Importance, packed_layers
from dynabert.rewiring_record import RewiringRecord


def rewire(
    model: nn.Module,
    importance: Importance,
    provenance: Mapping[str, str | int | float] | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> RewiringRecord:
    """Permute each layer's heads and neurons to descending importance, in place (DynaBERT, section
    3.1).

    Equal scores keep their order. The full network computes what it did, up to the order of
    floating-point sums. Parameters stay the same objects and their ``.grad`` is permuted with them.
    Rewiring again composes: the record always leads back to the original order.

    Args:
        model: DynaBERT model; its attribute ``rewiring`` is set to the record.
        importance: Scores of this model as it is now.
        provenance: Where the scores come from, for instance the data; rule and counts are added.
        optimizer: Optimiser in the middle of training; its state (moments and the like) is permuted
            too.

    Returns:
        The record.

    Raises:
        ValueError: The scores do not fit the model, or are not finite.

    Example:
        >>> importance = compute_importance(model, batches)  # doctest: +SKIP
        >>> record = rewire(model, importance, {"data": "dev"})  # doctest: +SKIP
        >>> record.head_order[0]  # doctest: +SKIP
        tensor([ 3,  0, 11, ...])
    """
    layers = packed_layers(model)
    _check(importance, [(a.num_heads, f.intermediate_size) for a, f in layers])
    head_order = [_descending(scores) for scores in importance.head]
    neuron_order = [_descending(scores) for scores in importance.neuron]
    former = getattr(model, "rewiring", None)
    record = RewiringRecord(
        head_order=_composed(head_order, former and former.head_order),
        neuron_order=_composed(neuron_order, former and former.neuron_order),
        head_scores=_original(importance.head, former and former.head_order),
        neuron_scores=_original(importance.neuron, former and former.neuron_order),
        provenance={
            **(provenance or {}),
            "rule": importance.rule,
            "num_batches": importance.num_batches,
            "num_rows": importance.num_rows,
        },
    )
    with torch.no_grad():
        for (attention, ffn), heads, neurons in zip(layers, head_order, neuron_order, strict=True):
            for weight in (attention.qkv_weight, attention.qkv_bias, attention.out_weight):
                _permute(weight, heads, optimizer)
            for weight in (ffn.up_weight, ffn.up_bias, ffn.down_weight):
                _permute(weight, neurons, optimizer)
    model.rewiring = record  # type: ignore[assignment]
    return record


def _permute(weight: Tensor, order: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
    tensors = [weight]
    if weight.grad is not None:
        tensors.append(weight.grad)
    if optimizer is not None:
        state = optimizer.state.get(weight, {}).values()
        # What an optimiser keeps for each element has the weight's shape; step counts do not.
        tensors += [t for t in state if isinstance(t, Tensor) and t.shape == weight.shape]
    for tensor in tensors:
        tensor.copy_(tensor[order.to(tensor.device)])


def _descending(scores: Tensor) -> Tensor:
    return scores.argsort(descending=True, stable=True).cpu()


def _composed(orders: Sequence[Tensor], former: Sequence[Tensor] | None) -> tuple[Tensor, ...]:
    """Original index of what now stands at each place."""
    if former is None:
        return tuple(orders)
    return tuple(old[new] for old, new in zip(former, orders, strict=True))


def _original(scores: Sequence[Tensor], former: Sequence[Tensor] | None) -> tuple[Tensor, ...]:
    """Scores in the original order of heads or neurons."""
    if former is None:
        return tuple(score.cpu() for score in scores)
    return tuple(
        torch.empty_like(score, device="cpu").index_copy_(0, order, score.cpu())
        for score, order in zip(scores, former, strict=True)
    )


def _check(importance: Importance, sizes: list[tuple[int, int]]) -> None:
    given = [
        (len(head), len(neuron))
        for head, neuron in zip(importance.head, importance.neuron, strict=True)
    ]
    if given != sizes:
        raise ValueError(
            f"rewire: importance has (heads, neurons) {given} by layer, expected {sizes}. "
            "Compute it on this model."
        )
    for what in ("head", "neuron"):
        for index, scores in enumerate(getattr(importance, what)):
            if not bool(scores.isfinite().all()):
                raise ValueError(
                    f"rewire: {what} scores of layer {index} are not finite, expected finite "
                    "numbers. Compute the importance again."
                )
