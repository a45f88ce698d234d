"""`ForEach`: one call at several subnets is as many calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dynabert import (
    DynaBertConfig,
    DynaBertForMaskedLM,
    DynaBertForQuestionAnswering,
    DynaBertForSequenceClassification,
    DynaBertForTokenClassification,
    DynaBertModel,
    ForEach,
    SubnetConfig,
    subnet_grid,
)

UNEVEN = SubnetConfig(num_heads=(1, 3, 2), intermediate_size=(5, 48, 17), layers=(0, 2, 5))
SUBNETS = (*subnet_grid((0.5, 1.0, 0.25), (0.5, 1.0, 2 / 3)), UNEVEN, SubnetConfig())
BATCH, SEQ_LEN = 5, 9
MASKS = {
    "none": None,
    "right": torch.tensor([9, 4, 1, 7, 3])[:, None] > torch.arange(SEQ_LEN),
    "left": torch.tensor([0, 5, 8, 2, 6])[:, None] <= torch.arange(SEQ_LEN),
    "holes": torch.rand(BATCH, SEQ_LEN, generator=torch.Generator().manual_seed(3)) < 0.6,
    "pairs": torch.ones(BATCH, 1, SEQ_LEN, SEQ_LEN, dtype=torch.bool).tril(),
}
HEADS: dict[Any, dict[str, Tensor]] = {
    DynaBertModel: {},
    DynaBertForSequenceClassification: {"labels": torch.tensor([0, 1, 1, 0, 1])},
    DynaBertForTokenClassification: {"labels": torch.arange(BATCH * SEQ_LEN).view(BATCH, -1) % 2},
    DynaBertForMaskedLM: {"labels": torch.arange(BATCH * SEQ_LEN).view(BATCH, -1) % 40},
    DynaBertForQuestionAnswering: {
        "start_positions": torch.tensor([0, 2, 0, 3, 1]),
        "end_positions": torch.tensor([4, 3, 9, 5, 2]),
    },
}


def make(kind: Any, architecture: str = "bert") -> Any:
    torch.manual_seed(0)
    config = DynaBertConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=24,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
        architecture=architecture,
    )
    return kind(config).train()


def inputs(mask: Tensor | None) -> dict[str, Tensor]:
    ids = torch.randint(2, 40, (BATCH, SEQ_LEN), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, **({} if mask is None else {"attention_mask": mask})}


@pytest.mark.filterwarnings("ignore:.*a mask over pairs of tokens")
@pytest.mark.parametrize("architecture", ["bert", "roberta"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", HEADS, ids=lambda kind: kind.__name__)
def test_it_is_one_call_for_each_subnet(kind: Any, mask: str, architecture: str) -> None:
    model = make(kind, architecture)
    batch = {**inputs(MASKS[mask]), **HEADS[kind]}
    together = model(**batch, subnet=ForEach(SUBNETS), output_hidden_states=True)
    packed = model(**batch, subnet=ForEach(SUBNETS), output_hidden_states="packed")
    assert len(together.hidden_states) == len(SUBNETS)
    if "loss" in together:
        assert together.loss.shape == (len(SUBNETS),)
        together.loss.sum().backward()
    else:
        together.last_hidden_state.square().mean().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for number, subnet in enumerate(SUBNETS):
        alone = model(**batch, subnet=subnet, output_hidden_states=True)
        for name, value in alone.items():
            if name == "hidden_states":
                pairs = zip(value, together.hidden_states[number], strict=True)
                for expected, found in pairs:
                    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            else:
                part = together[name].chunk(len(SUBNETS))[number].view_as(value)
                torch.testing.assert_close(part, value, rtol=1e-4, atol=1e-5)
        alone_packed = model(**batch, subnet=subnet, output_hidden_states="packed").hidden_states
        pairs = zip(alone_packed, packed.hidden_states[number], strict=True)
        for expected, found in pairs:
            assert found.dim() == 2
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        loss = alone.loss if "loss" in alone else alone.last_hidden_state.square().mean()
        (loss if "loss" in alone else loss / len(SUBNETS)).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(
                gradients[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name
            )


def test_packed_states_hold_the_real_tokens_only() -> None:
    mask = MASKS["right"]
    assert mask is not None
    model = make(DynaBertModel)
    padded = model(**inputs(mask), output_hidden_states=True).hidden_states
    packed = model(**inputs(mask), output_hidden_states="packed").hidden_states
    for states, tokens in zip(padded, packed, strict=True):
        assert torch.equal(states[mask], tokens)


def test_sequences_of_different_depths_have_no_packed_states() -> None:
    rows = [SubnetConfig(), SubnetConfig(depth_mult=0.5), *[SubnetConfig()] * 3]
    with pytest.raises(ValueError, match="different depths"):
        make(DynaBertModel)(**inputs(None), subnet=rows, output_hidden_states="packed")


def test_narrow_subnets_read_nothing_beyond_their_prefix() -> None:
    model = make(DynaBertModel)
    narrow = ForEach(tuple(subnet_grid((0.5, 0.25), (1.0, 0.5))))
    expected = model(**inputs(MASKS["right"]), subnet=narrow).last_hidden_state
    with torch.no_grad():
        for layer in model.encoder.layer:
            for weight in (*layer.attention.packed().elastic(), *layer.ffn.packed().elastic()):
                weight[len(weight) // 2 :] = float("nan")
    found = model(**inputs(MASKS["right"]), subnet=narrow).last_hidden_state
    assert torch.equal(found, expected)
    found.sum().backward()
    for layer in model.encoder.layer:
        for weight in (*layer.attention.packed().elastic(), *layer.ffn.packed().elastic()):
            assert weight.grad[: len(weight) // 2].isfinite().all()
            assert not weight.grad[len(weight) // 2 :].any()


def test_an_empty_batch_stays_empty() -> None:
    model = make(DynaBertForSequenceClassification)
    empty = {"input_ids": torch.zeros(0, 4, dtype=torch.long)}
    assert model(**empty, subnet=ForEach(SUBNETS)).logits.shape == (0, 2)


def test_there_has_to_be_a_subnet() -> None:
    with pytest.raises(ValueError, match="expected at least one"):
        ForEach(())
