"""Importance scores against explicit head gates and weight gradients of Hugging Face's own BERT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from dynabert import DynaBertForSequenceClassification, DynaBertModel
from dynabert.importance import Importance, compute_importance
from dynabert.training.task_agnostic import contrastive_loss

HEADS, HEAD_DIM = 4, 8
Batches = Callable[..., list[dict[str, Tensor]]]
MakeModel = Callable[..., DynaBertForSequenceClassification]


@pytest.fixture
def hf_pair(tmp_path: Any) -> tuple[BertForSequenceClassification, Any]:
    """The same random weights as Hugging Face's model and as ours."""
    torch.manual_seed(5)
    hf = BertForSequenceClassification(
        BertConfig(
            vocab_size=21,
            hidden_size=HEADS * HEAD_DIM,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            intermediate_size=48,
            max_position_embeddings=24,
            initializer_range=0.2,
        )
    ).eval()
    hf.save_pretrained(tmp_path)
    return hf, DynaBertForSequenceClassification.from_pretrained(tmp_path)


class HeadGates:
    """One gate of value 1 for each head, multiplied onto its output before the projection."""

    def __init__(self, hf: BertForSequenceClassification) -> None:
        layers = hf.bert.encoder.layer
        self.gates = [torch.ones(HEADS, requires_grad=True) for _ in layers]
        for layer, gate in zip(layers, self.gates, strict=True):
            layer.attention.output.dense.register_forward_pre_hook(
                lambda module, inputs, gate=gate: (inputs[0] * gate.repeat_interleave(HEAD_DIM),)
            )


def gradients_of_ffn(hf: BertForSequenceClassification) -> list[tuple[Tensor, Tensor, Tensor]]:
    """First-order change of the loss by layer and neuron: row of W1, b1, column of W2."""
    found = []
    for layer in hf.bert.encoder.layer:
        up, down = layer.intermediate.dense, layer.output.dense
        found.append(
            (
                (up.weight * up.weight.grad).sum(1),
                up.bias * up.bias.grad,
                (down.weight * down.weight.grad).sum(0),
            )
        )
    return found


def explicit_scores(
    hf: BertForSequenceClassification, batches: list[dict[str, Tensor]], rule: str
) -> tuple[list[Tensor], list[Tensor]]:
    gates = HeadGates(hf).gates
    heads = [torch.zeros(HEADS) for _ in gates]
    neurons = [torch.zeros(48) for _ in gates]
    for batch in batches:
        if rule == "paper":
            hf.zero_grad()
            for gate in gates:
                gate.grad = None
        hf(**batch).loss.backward()
        for layer, (up, bias, down) in enumerate(gradients_of_ffn(hf)):
            gate_gradient = gates[layer].grad
            assert gate_gradient is not None
            heads[layer] += gate_gradient.abs()
            if rule == "paper":
                neurons[layer] += (up + down).detach().abs()
            else:
                neurons[layer] += (up + bias).detach().abs() + down.detach().abs()
    return heads, neurons


@pytest.mark.parametrize("rule", ["paper", "reference"])
def test_scores_equal_explicit_gates_and_gradients(
    rule: Any, hf_pair: Any, make_batches: Batches
) -> None:
    hf, model = hf_pair
    batches = make_batches((5, 7, 3))
    scores = compute_importance(model, batches, rule=rule, progress=False)
    heads, neurons = explicit_scores(hf, batches, rule)
    for layer in range(2):
        torch.testing.assert_close(scores.head[layer].float(), heads[layer], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            scores.neuron[layer].float(), neurons[layer], rtol=1e-4, atol=1e-6
        )
    assert (scores.num_batches, scores.num_rows, scores.rule) == (3, 15, rule)


def total(scores: Importance) -> Tensor:
    return torch.cat([*scores.head, *scores.neuron])


def test_batches_are_independent_with_the_paper_rule(
    make_model: MakeModel, make_batches: Batches
) -> None:
    model, batches = make_model(), make_batches((4, 6))
    together = compute_importance(model, batches, progress=False)
    apart = [compute_importance(model, [batch], progress=False) for batch in batches]
    torch.testing.assert_close(total(together), total(apart[0]) + total(apart[1]))
    first = compute_importance(model, batches, num_batches=1, progress=False)
    torch.testing.assert_close(total(first), total(apart[0]))


def test_the_model_is_left_as_it_was(make_model: MakeModel, make_batches: Batches) -> None:
    model = make_model(hidden_dropout_prob=0.5)
    model.train()
    model.classifier.eval()
    frozen = model.dynabert.encoder.layer[0].ffn.up_weight
    frozen.requires_grad_(False)
    kept = model.classifier.weight
    kept.grad = torch.full_like(kept, 7.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        scores = compute_importance(model, make_batches((4,)), progress=False)
    assert (total(scores) > 0).any()
    assert model.training and not model.classifier.training
    assert not frozen.requires_grad
    assert sum(p.grad is not None for p in model.parameters()) == 1
    assert bool((kept.grad == 7).all())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_loss_that_fails_leaves_modes_and_flags(
    make_model: MakeModel, make_batches: Batches
) -> None:
    model = make_model().train()
    model.requires_grad_(False)

    def failing(model: Any, batch: Any) -> Tensor:
        raise KeyError("no such loss")

    with pytest.raises(KeyError, match="no such loss"):
        compute_importance(model, make_batches((4,)), loss=failing, progress=False)
    assert model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_no_batch_is_an_error(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match="yielded 0 batches"):
        compute_importance(make_model(), [], progress=False)


def test_missing_labels_are_an_error(make_model: MakeModel, make_batches: Batches) -> None:
    batches = [{k: v for k, v in batch.items() if k != "labels"} for batch in make_batches((4,))]
    with pytest.raises(ValueError, match="no labels"):
        compute_importance(make_model(), batches, progress=False)


def test_unknown_rule_is_an_error(make_model: MakeModel, make_batches: Batches) -> None:
    with pytest.raises(ValueError, match="rule='magnitude', expected one of paper, reference"):
        compute_importance(make_model(), make_batches((4,)), rule="magnitude", progress=False)  # type: ignore[arg-type]


def test_a_loss_without_gradient_is_an_error(make_model: MakeModel, make_batches: Batches) -> None:
    def constant(model: Any, batch: Any) -> Tensor:
        return torch.tensor(1.0)

    with pytest.raises(ValueError, match="requires_grad=False"):
        compute_importance(make_model(), make_batches((4,)), loss=constant, progress=False)


def test_other_models_are_an_error(make_batches: Batches) -> None:
    with pytest.raises(TypeError, match="model=Linear, expected a DynaBERT model"):
        compute_importance(torch.nn.Linear(2, 2), make_batches((4,)), progress=False)


def test_scores_that_are_not_finite_name_the_layer(
    make_model: MakeModel, make_batches: Batches
) -> None:
    model = make_model()
    with torch.no_grad():
        model.dynabert.encoder.layer[1].ffn.down_weight[3] = float("nan")
    with pytest.raises(ValueError, match=r"4 of 4 head scores of layer 0 are not finite"):
        compute_importance(model, make_batches((4,)), progress=False)


def test_contrastive_loss_needs_no_labels_and_is_reproducible(
    make_encoder: Callable[..., DynaBertModel], make_batches: Batches
) -> None:
    encoder = make_encoder(hidden_dropout_prob=0.2)
    batches = make_batches((6, 5), "none")
    state = torch.get_rng_state()
    first, second = (
        compute_importance(encoder, batches, loss=contrastive_loss(), progress=False)
        for _ in range(2)
    )
    assert torch.equal(total(first), total(second))
    assert (total(first) > 0).float().mean() > 0.9
    assert torch.equal(torch.get_rng_state(), state)
    assert not encoder.training


def test_contrastive_loss_needs_two_sentences(
    make_encoder: Callable[..., DynaBertModel], make_batches: Batches
) -> None:
    with pytest.raises(ValueError, match="batch of 1, expected at least 2"):
        compute_importance(
            make_encoder(), make_batches((1,), "none"), loss=contrastive_loss(), progress=False
        )
