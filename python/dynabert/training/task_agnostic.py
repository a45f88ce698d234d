"""Training and judging a sentence encoder without labels: pooling, a label-free loss, and scores by
cosine.

An elastic sentence encoder learns the hidden states and the pooled output of its teacher on plain
text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from dynabert.data.examples import TaskSpec
from dynabert.data.metrics import compute_metrics
from dynabert.evaluation import Collator, EncodedRows, GridRow, evaluation_mode
from dynabert.importance import Batch, LossFunction
from dynabert.subnet import SubnetConfig
from dynabert.training.arguments import Pooling

FIDELITY = "cosine"
"""Name of the metric of `evaluate_fidelity`."""


def pool(last_hidden_state: Tensor, attention_mask: Tensor, pooling: Pooling = "mean") -> Tensor:
    """Sentence embeddings from the last hidden states, ``[batch_size, hidden_size]``.

    Args:
        last_hidden_state: ``[batch_size, seq_len, hidden_size]``.
        attention_mask: ``[batch_size, seq_len]``, 1 at real tokens.
        pooling: ``mean`` over real tokens, or ``cls`` for the first real token. A sequence without
            any is zero.

    Raises:
        ValueError: Unknown pooling.
    """
    if pooling not in get_args(Pooling):
        raise ValueError(f"pool: pooling={pooling!r}, expected mean or cls. mean is the default.")
    chosen = attention_mask != 0
    if pooling == "cls":
        chosen = chosen & (chosen.cumsum(dim=1) == 1)
    weights = chosen.to(last_hidden_state.dtype).unsqueeze(-1)  # [B, S, 1]
    return (last_hidden_state * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def contrastive_loss(
    temperature: float = 0.05, pooling: Pooling = "mean", seed: int = 0
) -> LossFunction:
    """A loss for `compute_importance` that needs no labels: find a sentence's other dropout view in
    the batch.

    Every sentence is embedded twice with dropout on; the loss is the cross entropy of picking, by
    cosine over `temperature`, the second view of the same sentence among all second views. The
    dropout masks depend on `seed` and the batch's position only, and torch's random state is left
    as it was.

    Args:
        temperature: Divides the cosines.
        pooling: How sentences are embedded.
        seed: Chooses the dropout masks.

    Returns:
        ``loss(model, batch) -> scalar``; batches need at least 2 sentences.

    Example:
        >>> compute_importance(encoder, batches, loss=contrastive_loss())  # doctest: +SKIP
    """
    num_calls = 0

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal num_calls
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        mask = inputs["attention_mask"]
        if len(mask) < 2:
            raise ValueError(
                f"contrastive_loss: batch of {len(mask)}, expected at least 2 sentences. "
                "Use a larger batch size, or drop a last batch of one."
            )
        devices = [mask.device] if mask.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed * 1_000_003 + num_calls)
            num_calls += 1
            model.train()
            try:
                first, second = (
                    F.normalize(
                        pool(model(**inputs).last_hidden_state, mask, pooling).float(), dim=-1
                    )
                    for _ in range(2)
                )
            finally:
                model.eval()
        target = torch.arange(len(mask), device=mask.device)
        return F.cross_entropy(first @ second.T / temperature, target)

    return loss


def embed(
    model: nn.Module,
    dataset: EncodedRows,
    collator: Collator,
    subnets: Sequence[SubnetConfig],
    *,
    pooling: Pooling = "mean",
    batch_size: int = 64,
    autocast_dtype: torch.dtype | None = None,
    progress: bool = True,
) -> list[Tensor]:
    """Embeddings of every row by every subnet.

    Args:
        model: A `DynaBertModel`, run where it is, in eval mode.
        dataset: Tokenised rows; labels are not used.
        collator: Makes a batch of rows.
        subnets: What to embed with.
        pooling: See `pool`.
        batch_size: Sequences per forward pass.
        autocast_dtype: Run under ``torch.autocast`` with this dtype.
        progress: Show a progress bar, on stderr, where that is a terminal.

    Returns:
        For each subnet ``[num_rows, hidden_size]``, float32 on the CPU, rows in the order of the
        dataset.
    """
    device = next(model.parameters()).device
    rows: list[dict[str, Any]] = [dict(dataset[index]) for index in range(len(dataset))]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]), reverse=True)
    embedded: list[list[Tensor]] = [[] for _ in subnets]
    with (
        evaluation_mode(model),
        torch.no_grad(),
        torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None),
        tqdm(
            total=len(rows) * len(subnets),
            desc="embed",
            unit="row",
            disable=not progress or None,
        ) as bar,
    ):
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            batch = collator([rows[index] for index in indices])
            inputs = {k: value.to(device) for k, value in batch.items() if k != "labels"}
            for subnet, outputs in zip(subnets, embedded, strict=True):
                states = model(**inputs, subnet=subnet).last_hidden_state
                outputs.append(pool(states.float(), inputs["attention_mask"], pooling).cpu())
                bar.update(len(indices))
    back = torch.tensor(order).argsort()
    return [torch.cat(outputs)[back] for outputs in embedded]


def evaluate_fidelity(
    model: nn.Module,
    target: Tensor,
    dataset: EncodedRows,
    collator: Collator,
    subnets: Sequence[SubnetConfig],
    **options: Any,
) -> list[GridRow]:
    """How near each subnet's embeddings are to given ones: mean cosine, in -1 to 1.

    Args:
        model: A `DynaBertModel`.
        target: Embeddings to compare with, usually the teacher's, ``[num_rows, hidden_size]``.
        dataset: Tokenised rows.
        collator: Makes a batch of rows.
        subnets: What to score.
        **options: As for `embed`.

    Returns:
        One row per subnet with the metric ``cosine``.
    """
    return [
        _row(subnet, {FIDELITY: float(F.cosine_similarity(vectors, target).mean())}, len(target))
        for subnet, vectors in zip(
            subnets, embed(model, dataset, collator, subnets, **options), strict=True
        )
    ]


def evaluate_similarity(
    model: nn.Module,
    first: EncodedRows,
    second: EncodedRows,
    scores: Sequence[float],
    collator: Collator,
    subnets: Sequence[SubnetConfig],
    **options: Any,
) -> list[GridRow]:
    """Semantic similarity without training on it: correlation of cosines with human scores, as for
    STS-B.

    Args:
        model: A `DynaBertModel`.
        first: The first sentence of each pair, tokenised alone.
        second: The second sentence of each pair.
        scores: How alike the sentences of each pair are; any scale.
        collator: Makes a batch of rows.
        subnets: What to score.
        **options: As for `embed`.

    Returns:
        One row per subnet with the metrics ``spearman`` (primary) and ``pearson``.

    Raises:
        ValueError: The three do not have the same length.
    """
    if not len(first) == len(second) == len(scores):
        raise ValueError(
            f"evaluate_similarity: {len(first)} first sentences, {len(second)} second, "
            f"{len(scores)} scores, expected as many of each. Pass whole pairs."
        )
    spec = TaskSpec(
        name="similarity",
        problem="regression",
        text_fields=("text", "text_pair"),
        metrics=("spearman", "pearson"),
        primary_metric="spearman",
    )
    pairs = zip(
        embed(model, first, collator, subnets, **options),
        embed(model, second, collator, subnets, **options),
        strict=True,
    )
    return [
        _row(subnet, compute_metrics(spec, F.cosine_similarity(a, b), scores), len(scores))
        for subnet, (a, b) in zip(subnets, pairs, strict=True)
    ]


def _row(subnet: SubnetConfig, metrics: dict[str, float], num_rows: int) -> GridRow:
    return GridRow(subnet, metrics, next(iter(metrics.values())), num_rows)
