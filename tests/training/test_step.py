"""The parts of a step: what it keeps for the backward pass, how it is cut, and padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dynabert import DynaBertForSequenceClassification, SubnetConfig, subnet_grid
from dynabert.training import Stage
from dynabert.training.losses import hidden_state_loss, logit_loss
from dynabert.training.step import Batch, Share, StepLosses, activation_bytes, micro_groups
from dynabert.training.subnet_plan import SubnetPlan
from dynabert_kernels import use_backend

MakeModel = Callable[..., DynaBertForSequenceClassification]
FULL = SubnetConfig()
GRID = tuple(subnet_grid((1, 0.5, 0.25), (1, 0.5)))


def test_groups_fill_up_from_the_full_network(make_model: MakeModel) -> None:
    planned = SubnetPlan(Stage("s", GRID), make_model().subnet_shape, 0).at(0)

    def cut(sizes: list[int], budget: int) -> list[list[int]]:
        groups = micro_groups(planned[: len(sizes)], sizes, budget)
        assert [item for group in groups for item in group] == planned[: len(sizes)]
        return [[sizes[planned.index(item)] for item in group] for group in groups]

    assert cut([1, 2, 3, 4, 5], 100) == [[1, 2, 3, 4, 5]]
    assert cut([1, 2, 3, 4, 5], 9) == [[1, 2, 3], [4, 5]]
    assert cut([1, 2, 3, 4, 5], 5) == [[1], [2, 3], [4], [5]]
    assert cut([1, 2, 3, 4, 5], 0) == [[1], [2], [3], [4], [5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seq_len", [8, 24])
def test_the_estimate_of_the_activations_is_near_what_autograd_keeps(
    dtype: torch.dtype, seq_len: int, make_model: MakeModel
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4}
    model = make_model(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, **sizes).train()
    ids = torch.randint(0, 21, (16, seq_len))
    storages: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    for subnet in (FULL, SubnetConfig(0.25, 0.5)):
        storages.clear()
        with (
            use_backend("reference"),  # the C++ kernels keep less, so its bound holds for them too
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16),
        ):
            logits = model(input_ids=ids, subnet=subnet).logits  # noqa: F841  keeps the graph
        estimate = activation_bytes(
            model.subnet_shape(subnet), model.config, ids.numel(), seq_len, dtype.itemsize
        )
        assert 0.5 * sum(storages.values()) < estimate < 1.7 * sum(storages.values())


@pytest.mark.filterwarnings("ignore:.*a mask over pairs of tokens")
def test_padding_counts_where_the_stage_says_so(make_model: MakeModel, make_batches: Any) -> None:
    """As in the original code: padded positions run, attend to real ones, and enter the mean."""
    student, teacher = make_model(seed=1), make_model(seed=2)
    inputs = make_batches((5,))[0]
    assert not inputs["attention_mask"].bool().all()
    stage = Stage("width", GRID[:3], "full", 1.0, 0.5, hidden_padding=True)
    planned = SubnetPlan(stage, student.subnet_shape, 0).at(0)
    losses = StepLosses(stage, "classification", "mean")
    batch = Batch(inputs, Share(), with_padding=True)
    found = losses(student, batch, planned, losses.lessons(teacher, batch, [FULL]))

    mask = inputs["attention_mask"][:, None, None, :].bool()
    tokens = {"input_ids": inputs["input_ids"], "attention_mask": mask}
    taught = teacher(**tokens, output_hidden_states=True)
    for item, loss in zip(planned, found, strict=True):
        output = student(**tokens, subnet=item.subnet, output_hidden_states=True)
        assert output.hidden_states[0][~inputs["attention_mask"].bool()].abs().min() > 0
        hidden = hidden_state_loss(
            output.hidden_states,
            taught.hidden_states,
            item.shape.hidden_targets,
            mask.numel(),
        )
        expected = logit_loss(output.logits, taught.logits) + 0.5 * hidden
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    without = Batch(inputs, Share())
    real = losses(student, without, planned, losses.lessons(teacher, without, [FULL]))
    assert not torch.allclose(real, found, rtol=1e-2)


@pytest.mark.parametrize("learned", [True, False])
def test_regression_logits_may_be_left_out(
    learned: bool, make_model: MakeModel, make_batches: Any
) -> None:
    student, teacher = (make_model(seed=seed, num_labels=1) for seed in (1, 2))
    stage = Stage("width", GRID[:3], "full", 1.0, 0.5, regression_logits=learned)
    planned = SubnetPlan(stage, student.subnet_shape, 0).at(0)
    losses = StepLosses(stage, "regression", "mean")
    batch = Batch(make_batches((5,), "regression")[0], Share())
    losses(student, batch, planned, losses.lessons(teacher, batch, [FULL])).sum().backward()
    reached = [p.grad is not None and bool(p.grad.any()) for p in student.classifier.parameters()]
    assert reached == [learned] * 2
    assert student.dynabert.encoder.layer[0].ffn.up_weight.grad.any()
