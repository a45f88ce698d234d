"""Rewiring only permutes: the full network keeps its function, and prefixes are the best."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dynabert import DynaBertForSequenceClassification, RewiringRecord, SubnetConfig
from dynabert.importance import Importance, packed_layers
from dynabert.rewiring import rewire

MakeModel = Callable[..., DynaBertForSequenceClassification]
Batches = Callable[..., list[dict[str, Tensor]]]
ELASTIC = ("qkv_weight", "qkv_bias", "out_weight", "up_weight", "up_bias", "down_weight")


def random_importance(seed: int, *, heads: int = 4, neurons: int = 48) -> Importance:
    generator = torch.Generator().manual_seed(seed)
    return Importance(
        head=[torch.rand(heads, generator=generator, dtype=torch.float64) for _ in range(2)],
        neuron=[torch.rand(neurons, generator=generator, dtype=torch.float64) for _ in range(2)],
        num_batches=3,
        num_rows=11,
        rule="paper",
    )


def logits(model: Any, batch: dict[str, Tensor], subnet: SubnetConfig | None = None) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(
            **{k: v for k, v in batch.items() if k != "labels"}, subnet=subnet
        ).logits
    return result


def test_full_width_outputs_are_unchanged(make_model: MakeModel, make_batches: Batches) -> None:
    model, (batch,) = make_model(), make_batches((7,))
    expected = logits(model, batch)
    rewire(model, random_importance(1))
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [0.25, 0.5, 0.75])
def test_a_prefix_holds_the_most_important_heads_and_neurons(
    width: float, make_model: MakeModel, make_batches: Batches
) -> None:
    model, (batch,) = make_model(), make_batches((7,))
    scores = random_importance(2)
    # The same subnet without rewiring: what is not among the best contributes nothing.
    silenced = make_model()
    with torch.no_grad():
        for layer, (attention, ffn) in enumerate(packed_layers(silenced)):
            for weight, score in (
                (attention.out_weight, scores.head[layer]),
                (ffn.down_weight, scores.neuron[layer]),
            ):
                worst = score.argsort()[: round((1 - width) * len(score))]
                weight[worst] = 0
    rewire(model, scores)
    torch.testing.assert_close(
        logits(model, batch, SubnetConfig(width)), logits(silenced, batch), rtol=1e-5, atol=1e-6
    )


def test_equal_scores_keep_their_order(make_model: MakeModel) -> None:
    scores = random_importance(0)
    scores.head[0][:] = torch.tensor([1.0, 2.0, 1.0, 2.0], dtype=torch.float64)
    record = rewire(make_model(), scores)
    assert record.head_order[0].tolist() == [1, 3, 0, 2]


def test_the_record_says_where_everything_came_from(make_model: MakeModel) -> None:
    model, original = make_model(), make_model()
    scores = random_importance(3)
    record = rewire(model, scores, {"data": "toy"})
    assert model.rewiring is record
    assert dict(record.provenance) == {
        "data": "toy",
        "rule": "paper",
        "num_batches": 3,
        "num_rows": 11,
    }
    pairs = zip(packed_layers(model), packed_layers(original), strict=True)
    for layer, ((attention, ffn), (old_attention, old_ffn)) in enumerate(pairs):
        heads, neurons = record.head_order[layer], record.neuron_order[layer]
        for name in ELASTIC[:3]:
            assert torch.equal(getattr(attention, name), getattr(old_attention, name)[heads]), name
        for name in ELASTIC[3:]:
            assert torch.equal(getattr(ffn, name), getattr(old_ffn, name)[neurons]), name
        assert torch.equal(record.head_scores[layer], scores.head[layer])
        assert bool((record.head_scores[layer][heads].diff() <= 0).all())


def test_rewiring_again_composes(make_model: MakeModel) -> None:
    model, original = make_model(), make_model()
    rewire(model, random_importance(4))
    second = random_importance(5)
    between = [attention.out_weight.clone() for attention, _ in packed_layers(model)]
    record = rewire(model, second)
    for layer, (attention, _) in enumerate(packed_layers(model)):
        before = packed_layers(original)[layer][0].out_weight
        assert torch.equal(attention.out_weight, before[record.head_order[layer]])
        # Scores are given by place and recorded by original head.
        for place in range(4):
            (origin,) = (h for h in range(4) if torch.equal(before[h], between[layer][place]))
            assert record.head_scores[layer][origin] == second.head[layer][place]


def test_parameters_gradients_and_optimiser_state_move_together(
    make_model: MakeModel, make_batches: Batches
) -> None:
    def trained_step(rewired_after_first: bool) -> DynaBertForSequenceClassification:
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        parameters = list(model.parameters())
        for step, batch in enumerate(make_batches((6, 6))):
            model(**batch).loss.backward()
            if step == 0 and rewired_after_first:
                # Gradients are there and the optimiser has none of its state yet.
                rewire(model, random_importance(6), optimizer=optimizer)
            optimizer.step()
            optimizer.zero_grad()
            if step == 0 and rewired_after_first:
                rewire(model, random_importance(7), optimizer=optimizer)
        assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
        return model

    moved, plain = trained_step(True), trained_step(False)
    record = moved.rewiring
    assert record is not None
    for layer, ((attention, ffn), (old_attention, old_ffn)) in enumerate(
        zip(packed_layers(moved), packed_layers(plain), strict=True)
    ):
        heads, neurons = record.head_order[layer], record.neuron_order[layer]
        torch.testing.assert_close(attention.qkv_weight, old_attention.qkv_weight[heads])
        torch.testing.assert_close(attention.out_weight, old_attention.out_weight[heads])
        torch.testing.assert_close(ffn.up_weight, old_ffn.up_weight[neurons])
        torch.testing.assert_close(ffn.down_weight, old_ffn.down_weight[neurons])


def test_the_record_is_saved_with_the_model(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    record = rewire(model, random_importance(8), {"data": "toy"})
    model.save_pretrained(tmp_path)
    loaded = DynaBertForSequenceClassification.from_pretrained(tmp_path).rewiring
    assert isinstance(loaded, RewiringRecord)
    assert dict(loaded.provenance) == dict(record.provenance)
    for name in ("head_order", "neuron_order", "head_scores", "neuron_scores"):
        for a, b in zip(getattr(loaded, name), getattr(record, name), strict=True):
            assert torch.equal(a, b), name


def test_scores_of_another_model_are_refused(make_model: MakeModel) -> None:
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"\(3, 48\).*expected \[\(4, 48\), \(4, 48\)\]"):
        rewire(model, random_importance(0, heads=3))
    scores = random_importance(0)
    scores.neuron[1][5] = float("inf")
    with pytest.raises(ValueError, match="neuron scores of layer 1 are not finite"):
        rewire(model, scores)
    assert model.rewiring is None
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
