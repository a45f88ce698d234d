"""Batches whose sequences have different subnets: each equals the same sequence run alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynabert import SubnetConfig, SubnetShape

TOLERANCE = {"atol": 1e-5, "rtol": 0.0}

MIXES: dict[str, list[SubnetConfig | None]] = {
    "widths": [SubnetConfig(0.25), SubnetConfig(1.0), SubnetConfig(0.75), SubnetConfig(0.25)],
    "depths": [SubnetConfig(1, 0.5), None, SubnetConfig(1, 2 / 3), SubnetConfig(1, 1 / 6)],
    "both": [None, SubnetConfig(0.25, 0.5), SubnetConfig(0.5, 2 / 3), SubnetConfig(0.75, 0.5)],
    "runs": [None, None, SubnetConfig(0.5, 0.5), SubnetConfig(0.5, 0.5)],
    "no-shared-layer": [SubnetConfig(layers=(0, 2)), SubnetConfig(0.5, layers=(1, 3))] * 2,
    "per-layer": [
        SubnetConfig(layers=(0, 5), num_heads=(1, 12), intermediate_size=(84, 1)),
        None,
        SubnetConfig(num_heads=5),
        SubnetConfig(intermediate_size=17),
    ],
    "equal": [SubnetConfig(0.5, 0.5)] * 4,
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("padding", ["right", "left", "none"])
def test_mixed_batch_equals_each_sequence_alone(
    make_hf: Any, ours: Any, make_batch: Any, architecture: str, mix: str, padding: str
) -> None:
    model = ours(make_hf(architecture))
    subnets = MIXES[mix]
    if padding == "none":
        batch = make_batch(model.config, lengths=(9, 9, 9, 9), extra=0)
        del batch["attention_mask"]
    else:
        batch = make_batch(model.config, lengths=(17, 1, 6, 11), side=padding)
    with torch.no_grad():
        got = model(**batch, subnet=subnets, output_hidden_states=True)
    longest = max(len(model.subnet_shape(subnet).layers) for subnet in subnets)
    assert len(got.hidden_states) == longest + 1
    for row, subnet in enumerate(subnets):
        one = {name: values[row : row + 1] for name, values in batch.items()}
        with torch.no_grad():
            alone = model(**one, subnet=subnet, output_hidden_states=True)
        torch.testing.assert_close(got.logits[row], alone.logits[0], **TOLERANCE)
        for state, alone_state in zip(got.hidden_states, alone.hidden_states, strict=False):
            torch.testing.assert_close(state[row], alone_state[0], **TOLERANCE)
        for state in got.hidden_states[len(alone.hidden_states) :]:
            assert not state[row].any()


@pytest.mark.filterwarnings("ignore:.*mask over pairs of tokens:UserWarning")
@pytest.mark.parametrize("mix", ["both", "no-shared-layer", "runs"])
def test_mixed_batch_with_a_mask_over_pairs_equals_each_sequence_alone(
    make_hf: Any, ours: Any, make_batch: Any, mix: str
) -> None:
    model, subnets = ours(make_hf("bert")), MIXES[mix]
    batch = make_batch(model.config, lengths=(9, 9, 9, 9), extra=0)
    batch["attention_mask"] = torch.rand(4, 1, 9, 9) < 0.7
    with torch.no_grad():
        got = model(**batch, subnet=subnets).logits
        for row, subnet in enumerate(subnets):
            one = {name: values[row : row + 1] for name, values in batch.items()}
            alone = model(**one, subnet=subnet).logits[0]
            torch.testing.assert_close(got[row], alone, **TOLERANCE)


def test_one_subnet_for_all_rows_equals_the_list_of_it_bit_for_bit(
    make_hf: Any, ours: Any, make_batch: Any
) -> None:
    model = ours(make_hf("bert"))
    batch = make_batch(model.config)
    subnet = SubnetConfig(0.5, 2 / 3)
    with torch.no_grad():
        expected = model(**batch, subnet=subnet).logits
        assert torch.equal(model(**batch, subnet=[subnet] * 3).logits, expected)
        assert torch.equal(
            model(**batch, subnet=(model.subnet_shape(subnet),) * 3).logits, expected
        )


def test_gradients_of_a_mixed_batch_are_the_sum_of_those_alone(
    make_hf: Any, ours: Any, make_batch: Any
) -> None:
    model = ours(make_hf("bert"))
    subnets = MIXES["both"]
    batch = make_batch(model.config, lengths=(17, 1, 6, 11))
    weight = torch.randn(4, 3)

    def objective(output: Any, weight: torch.Tensor) -> torch.Tensor:
        # Also through hidden states, which is how distillation trains.
        states = sum(state.square().sum() for state in output.hidden_states)
        return (output.logits * weight).sum() + 0.01 * states

    objective(model(**batch, subnet=subnets, output_hidden_states=True), weight).backward()
    mixed = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    for row, subnet in enumerate(subnets):
        one = {name: values[row : row + 1] for name, values in batch.items()}
        output = model(**one, subnet=subnet, output_hidden_states=True)
        objective(output, weight[row]).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            mixed[name], parameter.grad, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_nan_beyond_a_rows_own_prefix_never_reaches_it(
    make_hf: Any, ours: Any, make_batch: Any
) -> None:
    model = ours(make_hf("bert"))
    batch = make_batch(model.config)
    subnets = [SubnetConfig(0.25, 0.5), None, SubnetConfig(0.25, 0.5)]
    with torch.no_grad():
        expected = model(**batch, subnet=subnets).logits
        for index, layer in enumerate(model.dynabert.encoder.layer):
            if index % 2 == 0:
                layer.attention.qkv_weight.fill_(torch.nan)
            layer.ffn.up_weight[21:] = torch.nan
        got = model(**batch, subnet=subnets).logits
    assert torch.equal(got[[0, 2]], expected[[0, 2]])
    assert got[1].isnan().all()


@given(data=st.data())
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_mix_of_any_lengths_equals_each_alone(
    shared_model: Any, make_batch: Any, data: Any
) -> None:
    model = shared_model
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=5))
    choice = st.sampled_from([None, *(s for mix in MIXES.values() for s in mix)])
    subnets = [data.draw(choice) for _ in lengths]
    side = data.draw(st.sampled_from(["right", "left"]))
    batch = make_batch(model.config, lengths=tuple(lengths), side=side, extra=1)
    with torch.no_grad():
        got = model(**batch, subnet=subnets).logits
        for row, subnet in enumerate(subnets):
            one = {name: values[row : row + 1] for name, values in batch.items()}
            alone = model(**one, subnet=subnet).logits
            torch.testing.assert_close(got[row], alone[0], **TOLERANCE)


@pytest.fixture
def shared_model(make_hf: Any, ours: Any) -> Any:
    return ours(make_hf("bert"))


@pytest.mark.parametrize(
    ("subnet", "error", "message"),
    [
        ([None, None], ValueError, r"subnet has 2 entries, expected one per sequence \(3\)"),
        ("half", TypeError, "subnet='half', expected a SubnetConfig"),
        (0.5, TypeError, "subnet=0.5, expected a SubnetConfig"),
        ([None, 0.5, None], TypeError, "subnet=0.5, expected a SubnetConfig"),
        (SubnetConfig(0.3), ValueError, "width_mult=0.3 is 3.6 of 12 heads"),
        ([None, SubnetConfig(1, 0.75), None], ValueError, "depth_mult=0.75 is 4.5 of 6 layers"),
    ],
)
def test_wrong_subnets_are_one_clear_error(
    make_hf: Any, ours: Any, make_batch: Any, subnet: Any, error: type[Exception], message: str
) -> None:
    model = ours(make_hf("bert"))
    with pytest.raises(error, match=message):
        model(**make_batch(model.config), subnet=subnet)


def test_a_shape_of_a_larger_model_is_refused(make_hf: Any, ours: Any, make_batch: Any) -> None:
    model = ours(make_hf("bert"))
    sizes = {"num_attention_heads": 12, "intermediate_size": 84}
    deeper = SubnetConfig(0.5).resolve(num_hidden_layers=8, **sizes)
    with pytest.raises(ValueError, match="subnet keeps layer 7, expected 0 to 5"):
        model(**make_batch(model.config), subnet=deeper)
    wider: SubnetShape = SubnetConfig().resolve(
        num_hidden_layers=6, num_attention_heads=16, intermediate_size=84
    )
    with pytest.raises(ValueError, match="num_heads=16, expected 1 to 12"):
        model(**make_batch(model.config), subnet=wider)
