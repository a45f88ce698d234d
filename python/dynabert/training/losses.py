"""The losses of the training stages, as plain functions of tensors.

Every loss is a mean (over sequences, or over real tokens), so a caller that sums over several
batches weighs each by its share of the sequences or tokens.

Letters: B sequences, S padded length, T real tokens, C hidden size, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor

from dynabert.data.examples import Problem


def soft_cross_entropy(
    student_logits: Tensor, teacher_logits: Tensor, token_mask: Tensor | None = None
) -> Tensor:
    """Cross entropy of the student's distribution under the teacher's, at temperature 1.

    ``-mean_b sum_k softmax(teacher)_bk log softmax(student)_bk`` (DynaBERT, section 3.2, the term
    for the logits).

    Args:
        student_logits: ``[B, K]``, or ``[B, S, K]`` where every token has its own.
        teacher_logits: Same shape; no gradient flows into it.
        token_mask: ``[B, S]``, true at the tokens to average over; only with logits for every
            token.

    Returns:
        Scalar, float32.
    """
    target = teacher_logits.detach().float().softmax(dim=-1)
    per_row = -(target * student_logits.float().log_softmax(dim=-1)).sum(dim=-1)  # [B] or [B, S]
    if token_mask is None:
        return per_row.mean()
    mask = token_mask.to(per_row.dtype)
    return (per_row * mask).sum() / mask.sum()


def logit_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    problem: Problem = "classification",
    token_mask: Tensor | None = None,
) -> Tensor:
    """What the student's logits pay for differing from the teacher's.

    Soft cross entropy for classification. For regression the mean squared difference, so that
    pooler and head learn in every stage; the original code leaves them without a gradient there.

    Args:
        student_logits: ``[B, K]`` or ``[B, S, K]``.
        teacher_logits: Same shape; no gradient flows into it.
        problem: ``classification`` or ``regression``.
        token_mask: See `soft_cross_entropy`.

    Returns:
        Scalar, float32.
    """
    if problem == "regression":
        return F.mse_loss(student_logits.float(), teacher_logits.detach().float())
    return soft_cross_entropy(student_logits, teacher_logits, token_mask)


def prediction_loss(
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    problem: Problem,
    token_mask: Tensor | None = None,
) -> Tensor:
    """What a student's predictions pay for differing from the teacher's, for any problem with a
    head.

    Classification and token classification: soft cross entropy. Regression: `logit_loss`. Question
    answering: soft cross entropy over the positions of a sequence, of start and end, averaged;
    padding, whose scores are the lowest there are, adds nothing.

    Args:
        student: ``logits`` ``[B, K]``, or ``[B, S, K]`` for token classification; for question
            answering ``start_logits`` and ``end_logits``, ``[B, S]``.
        teacher: The same of the teacher; no gradient flows into it.
        problem: The kind of problem; not ``none``.
        token_mask: ``[B, S]``, true at the tokens to average over; token classification only.

    Returns:
        Scalar, float32: a mean over sequences, or over the tokens of `token_mask`.
    """
    if problem == "question-answering":
        start, end = (
            soft_cross_entropy(student[name], teacher[name])
            for name in ("start_logits", "end_logits")
        )
        return (start + end) / 2
    mask = token_mask if problem == "token-classification" else None
    return logit_loss(student["logits"], teacher["logits"], problem, mask)


def hidden_state_loss(
    student_states: Sequence[Tensor],
    teacher_states: Sequence[Tensor],
    targets: Sequence[int],
    num_tokens: Tensor | int,
) -> Tensor:
    """Sum over the student's hidden states of the mean squared difference to the teacher's.

    Each mean is over real tokens and the hidden size; the means are summed, embedding output
    included (DynaBERT, section 3.2, the terms for embedding and hidden states). Padded positions
    must be zero in both, as the model returns them, and then cost nothing.

    Args:
        student_states: One tensor ``[B, S, C]`` for the embeddings and one for each kept layer.
        teacher_states: ``[B, S, C]`` for the embeddings and every layer; no gradient flows into
            them.
        targets: For each student state the index of its teacher state
            (`SubnetShape.hidden_targets`).
        num_tokens: Real tokens T in the batch, an int or a scalar tensor.

    Returns:
        Scalar, float32.

    Raises:
        ValueError: `targets` does not name one teacher state for each student state.
    """
    if len(targets) != len(student_states):
        raise ValueError(
            f"hidden_state_loss: targets={tuple(targets)}, expected {len(student_states)} of them, "
            "one for each hidden state of the student. Take them from the subnet that produced the "
            "states."
        )
    hidden_size = student_states[0].shape[-1]
    total = sum(
        F.mse_loss(state.float(), teacher_states[target].detach().float(), reduction="sum")
        for state, target in zip(student_states, targets, strict=True)
    )
    assert isinstance(total, Tensor)
    return total / (num_tokens * hidden_size)


def embedding_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean cosine distance between sentence embeddings, in 0 to 2: the logit loss of a model
    without labels.

    Args:
        student: Pooled output, ``[B, C]``.
        teacher: Pooled output, ``[B, C]``; no gradient flows into it.

    Returns:
        Scalar, float32.
    """
    return (1 - F.cosine_similarity(student.float(), teacher.detach().float(), dim=-1)).mean()
