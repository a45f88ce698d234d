"""Stage losses against numbers computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from dynabert.training.losses import (
    embedding_loss,
    hidden_state_loss,
    logit_loss,
    prediction_loss,
    soft_cross_entropy,
)

LOG2, LOG3 = math.log(2), math.log(3)


def test_soft_cross_entropy_is_the_mean_over_sequences() -> None:
    teacher = torch.tensor([[LOG3, 0.0], [0.0, 0.0]])  # 3/4 and 1/4; 1/2 and 1/2
    student = torch.tensor([[0.0, 0.0], [0.0, LOG3]])
    first = LOG2
    second = 0.5 * (math.log(4) + math.log(4) - LOG3)
    assert soft_cross_entropy(student, teacher).item() == pytest.approx((first + second) / 2)


def test_soft_cross_entropy_of_token_logits_skips_padding() -> None:
    teacher = torch.tensor([[[LOG3, 0.0], [5.0, -5.0]]])
    student = torch.tensor([[[0.0, 0.0], [-9.0, 9.0]]])
    mask = torch.tensor([[1, 0]])
    assert soft_cross_entropy(student, teacher, mask).item() == pytest.approx(LOG2)


def test_regression_logits_pay_the_squared_difference() -> None:
    student, teacher = torch.tensor([[1.0], [4.0]]), torch.tensor([[3.0], [5.0]])
    assert logit_loss(student, teacher, "regression").item() == pytest.approx((4 + 1) / 2)
    assert logit_loss(student, teacher, "classification").item() == pytest.approx(0.0)


def test_answers_pay_the_mean_over_starts_and_ends() -> None:
    flat, three = torch.zeros(1, 2), torch.tensor([[LOG3, 0.0]])
    teacher = {"start_logits": three, "end_logits": flat}
    student = {"start_logits": flat, "end_logits": three}
    end = 0.5 * (math.log(4) + math.log(4) - LOG3)
    loss = prediction_loss(student, teacher, "question-answering")
    assert loss.item() == pytest.approx((LOG2 + end) / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_padding_adds_nothing_to_the_loss_of_answers(dtype: torch.dtype) -> None:
    lowest = torch.finfo(dtype).min
    names = ("start_logits", "end_logits")
    short = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, lowest]], dtype=dtype)
    padded = torch.nn.functional.pad(short, (0, 4), value=lowest)
    losses, gradients = [], []
    for logits in (short, padded):
        student = logits.clone().requires_grad_()
        teacher = logits.flip(0) if logits is short else padded.flip(0)
        teacher = teacher.clone().requires_grad_()
        loss = prediction_loss(
            dict.fromkeys(names, student), dict.fromkeys(names, teacher), "question-answering"
        )
        loss.backward()
        assert student.grad is not None and teacher.grad is None
        losses.append(loss)
        gradients.append(student.grad)
    assert losses[0].dtype == torch.float32 and losses[0].isfinite()
    assert torch.equal(*losses)
    assert torch.equal(gradients[0], gradients[1][:, :3])
    assert not gradients[1][:, 3:].any()


def test_prediction_loss_takes_the_mask_for_tokens_only() -> None:
    teacher = {"logits": torch.tensor([[[LOG3, 0.0], [5.0, -5.0]]])}
    student = {"logits": torch.tensor([[[0.0, 0.0], [-9.0, 9.0]]])}
    mask = torch.tensor([[1, 0]])
    loss = prediction_loss(student, teacher, "token-classification", mask)
    assert loss.item() == pytest.approx(LOG2)
    rows = {"logits": torch.tensor([[1.0], [4.0]])}, {"logits": torch.tensor([[3.0], [5.0]])}
    assert prediction_loss(*rows, "regression", mask).item() == pytest.approx(5 / 2)
    first = {"logits": student["logits"][:, 0]}, {"logits": teacher["logits"][:, 0]}
    assert prediction_loss(*first, "classification", mask).item() == pytest.approx(LOG2)


def test_hidden_states_are_averaged_over_real_tokens_and_summed_over_layers() -> None:
    # Two sequences of 2 and 1 tokens, hidden size 2; the padded position is zero in every state.
    teacher = [torch.full((2, 2, 2), value) for value in (1.0, 7.0, 3.0)]
    for state in teacher:
        state[1, 1] = 0
    student = [torch.zeros(2, 2, 2), torch.zeros(2, 2, 2)]
    student[0][0, 0] = torch.tensor([2.0, 1.0])
    # Differences to state 0: token (0,0): 1 and 0; two further tokens: 1 and 1 each.
    embeddings = (1 + 0 + 4 * 1) / (3 * 2)
    last = (6 * 9) / (3 * 2)
    loss = hidden_state_loss(student, teacher, (0, 2), torch.tensor(3))
    assert loss.item() == pytest.approx(embeddings + last)


def test_hidden_states_need_one_target_each() -> None:
    states = [torch.zeros(1, 1, 2)] * 3
    with pytest.raises(ValueError, match=r"targets=\(0, 2\), expected 3"):
        hidden_state_loss(states, states, (0, 2), 1)


def test_embeddings_pay_the_cosine_distance() -> None:
    student = torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    teacher = torch.tensor([[5.0, 0.0], [0.0, 3.0]])
    expected = (0 + 1 - math.sqrt(0.5)) / 2
    assert embedding_loss(student, teacher).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_losses_are_float32_and_give_the_teacher_no_gradient(dtype: torch.dtype) -> None:
    student = torch.randn(3, 5, dtype=dtype, requires_grad=True)
    teacher = torch.randn(3, 5, dtype=dtype, requires_grad=True)
    states = torch.randn(3, 2, 4, dtype=dtype, requires_grad=True)
    taught = torch.randn(3, 2, 4, dtype=dtype, requires_grad=True)
    total = (
        logit_loss(student, teacher)
        + logit_loss(student, teacher, "regression")
        + embedding_loss(student, teacher)
        + hidden_state_loss([states], [taught], (0,), 6)
    )
    total.backward()
    assert total.dtype == torch.float32
    assert student.grad is not None and states.grad is not None
    assert teacher.grad is None and taught.grad is None
