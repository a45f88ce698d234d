"""Extraction: a subnet as a model of its own computes, bit for bit, what the subnet computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from dynabert import (
    DynaBertConfig,
    DynaBertForSequenceClassification,
    ForEach,
    Importance,
    RewiringRecord,
    SubnetConfig,
    rewire,
    subnet_grid,
)
from dynabert.extraction import extract, restricted
from dynabert.flops import count_parameters, encoder_flops
from dynabert_kernels import use_backend
from dynabert_kernels.ops import _cpu

GRID = subnet_grid((1, 0.75, 0.5, 0.25), (1, 2 / 3, 1 / 2))
UNEVEN = SubnetConfig(num_heads=(8, 12, 2), intermediate_size=(7, 84, 41), layers=(0, 2, 5))
HEADS = [
    "Model",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMaskedLM",
]
needs_kernels = pytest.mark.skipif(
    _cpu.kernels_missing() is not None, reason=str(_cpu.kernels_missing())
)
NUMBERS = [
    pytest.param("reference", torch.float32, id="reference-float32"),
    pytest.param("cpu", torch.float32, marks=needs_kernels, id="cpu-float32"),
    pytest.param("cpu", torch.bfloat16, marks=needs_kernels, id="cpu-bfloat16"),
]


def outputs(model: Any, batch: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        output = model(**batch, **options)
    return {name: value for name, value in output.items() if isinstance(value, Tensor)}


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def tiny(**changes: Any) -> DynaBertForSequenceClassification:
    """Three layers of four heads of 8, with weights far enough apart that errors show."""
    sizes = {
        "vocab_size": 59,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 20,
        "max_position_embeddings": 24,
        "initializer_range": 0.3,
    }
    return DynaBertForSequenceClassification(DynaBertConfig(**{**sizes, **changes})).eval()


@pytest.mark.parametrize(("backend", "dtype"), NUMBERS)
def test_every_grid_subnet_has_the_same_bits(
    make_hf: Any, ours: Any, make_batch: Any, architecture: str, backend: str, dtype: torch.dtype
) -> None:
    model = ours(make_hf(architecture)).to(dtype)
    batch = make_batch(model.config)
    with use_backend(backend):
        for subnet in [*GRID, UNEVEN]:
            extracted = extract(model, subnet)
            assert extracted.dtype == dtype
            assert_same_bits(outputs(extracted, batch), outputs(model, batch, subnet=subnet))


@pytest.mark.parametrize(
    ("architecture", "head"), [*(("bert", head) for head in HEADS), ("roberta", "ForMaskedLM")]
)
def test_every_head_and_the_states_between_have_the_same_bits(
    make_hf: Any, ours: Any, make_batch: Any, architecture: str, head: str
) -> None:
    model = ours(make_hf(architecture, head), head)
    batch = make_batch(model.config)
    for subnet in (SubnetConfig(0.5, 0.5), UNEVEN):
        extracted = extract(model, subnet)
        assert type(extracted) is type(model)
        wants = {"output_hidden_states": True}
        expected = model(**batch, subnet=subnet, **wants)
        found = extracted(**batch, **wants)
        assert_same_bits(outputs(extracted, batch), outputs(model, batch, subnet=subnet))
        for state, other in zip(found.hidden_states, expected.hidden_states, strict=True):
            assert torch.equal(state, other)


@needs_kernels
def test_int8_has_the_same_bits_at_full_width_and_is_quantised_anew_below(
    make_hf: Any, ours: Any, make_batch: Any
) -> None:
    model = ours(make_hf("bert"))
    batch = make_batch(model.config)
    exact = outputs(model, batch, subnet=SubnetConfig(0.5))["logits"]
    model.quantize("int8")
    for subnet in (SubnetConfig(), SubnetConfig(depth_mult=0.5)):
        extracted = extract(model, subnet)
        assert extracted.quantization == "int8"
        assert_same_bits(outputs(extracted, batch), outputs(model, batch, subnet=subnet))
    narrow = outputs(extract(model, SubnetConfig(0.5)), batch)["logits"]
    assert 0 < (narrow - exact).norm() / exact.norm() < 0.05


def test_the_copy_shares_nothing_and_leaves_the_model_alone() -> None:
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    extracted = extract(model, SubnetConfig(0.5))
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert own.isdisjoint(parameter.data_ptr() for parameter in extracted.parameters())
    with torch.no_grad():
        for parameter in extracted.parameters():
            parameter.zero_()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert model.config.num_attention_heads == 4
    assert sum(p.untyped_storage().nbytes() for p in extracted.parameters()) == sum(
        4 * p.numel() for p in extracted.parameters()
    )


def test_mode_and_gradients_are_those_of_the_model() -> None:
    model = tiny().train()
    extracted = extract(model, SubnetConfig(0.5))
    assert extracted.training
    assert all(parameter.requires_grad for parameter in extracted.parameters())
    frozen = extract(model.eval().requires_grad_(False), SubnetConfig(0.5))
    assert not frozen.training
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_the_decoder_of_the_copy_is_tied(make_hf: Any, ours: Any) -> None:
    extracted = extract(ours(make_hf("bert", "ForMaskedLM"), "ForMaskedLM"), UNEVEN)
    words = extracted.get_input_embeddings().weight
    assert extracted.get_output_embeddings().weight is words


def test_an_encoder_without_pooler_stays_without(make_hf: Any, ours: Any) -> None:
    hf = make_hf("bert", "Model")
    assert extract(ours(hf, "Model", add_pooling_layer=False), UNEVEN).pooler is None
    assert extract(ours(hf, "Model"), UNEVEN).pooler is not None


def test_a_view_is_extracted_as_what_it_runs(make_batch: Any) -> None:
    model, half = tiny(), SubnetConfig(0.5, 1 / 3)
    batch = make_batch(model.config, lengths=(5, 2))
    extracted = extract(model.with_subnet(half), None)
    assert_same_bits(outputs(extracted, batch), outputs(model, batch, subnet=half))
    assert extract(model, None).config.num_hidden_layers == 3


def test_a_uniform_copy_is_elastic_over_its_own_size(
    make_hf: Any, ours: Any, make_batch: Any
) -> None:
    model = ours(make_hf("roberta"))
    batch = make_batch(model.config)
    half = extract(model, SubnetConfig(0.5))
    config = half.config
    assert (config.num_attention_heads, config.head_dim, config.intermediate_size) == (6, 8, 42)
    assert config.num_heads_per_layer is config.intermediate_size_per_layer is None
    for depth in (1, 0.5):
        expected = outputs(model, batch, subnet=SubnetConfig(0.25, depth))
        assert_same_bits(outputs(half, batch, subnet=SubnetConfig(0.5, depth)), expected)
        assert_same_bits(outputs(extract(half, SubnetConfig(0.5, depth)), batch), expected)
    with pytest.raises(ValueError, match=r"width_mult=0\.25 is 1\.5 of 6 heads"):
        half(**batch, subnet=SubnetConfig(0.25))


def test_fractions_of_an_uneven_copy_are_whole_in_each_layer_or_refused(
    make_hf: Any, ours: Any, make_batch: Any
) -> None:
    model = ours(make_hf("bert"))
    batch = make_batch(model.config)
    even = SubnetConfig(num_heads=(8, 12, 2), intermediate_size=(6, 84, 40), layers=(0, 2, 5))
    uneven = extract(model, even)
    expected = outputs(
        model,
        batch,
        subnet=SubnetConfig(num_heads=(4, 6, 1), intermediate_size=(3, 42, 20), layers=(0, 2, 5)),
    )
    assert_same_bits(outputs(uneven, batch, subnet=SubnetConfig(0.5)), expected)
    inner = SubnetConfig(num_heads=(3, 1), intermediate_size=(6, 40), layers=(0, 2))
    outer = SubnetConfig(num_heads=(3, 1), intermediate_size=(6, 40), layers=(0, 5))
    assert_same_bits(outputs(uneven, batch, subnet=inner), outputs(model, batch, subnet=outer))
    with pytest.raises(ValueError, match=r"common divisor of the layers' 8\.12\.2,.*1/2, 1\."):
        uneven(**batch, subnet=SubnetConfig(0.25))
    with pytest.raises(ValueError, match=r"num_heads=4, expected 1 to 2 in kept layer 2"):
        uneven(**batch, subnet=SubnetConfig(num_heads=4))
    odd = extract(model, UNEVEN)
    with pytest.raises(ValueError, match=r"3\.5 of 7 neurons.*Use one of 1, or set"):
        odd(**batch, subnet=SubnetConfig(0.5))


def test_an_uneven_copy_trains_and_is_rewired(make_batch: Any) -> None:
    model = tiny()
    wide = SubnetConfig(num_heads=(1, 4, 2), intermediate_size=(20, 3, 8))
    uneven = extract(model, wide)
    batch = make_batch(model.config, lengths=(5, 2))
    labels = torch.tensor([0, 1])
    for each in (uneven, model):
        subnets = ForEach((SubnetConfig(),)) if each is uneven else wide
        loss = each(**batch, labels=labels, subnet=subnets).loss
        loss.sum().backward()
    theirs = model.dynabert.encoder.layer[2].ffn.up_weight.grad[:8]
    torch.testing.assert_close(uneven.dynabert.encoder.layer[2].ffn.up_weight.grad, theirs)
    before = outputs(uneven, batch)["logits"]
    scores = [torch.arange(n, dtype=torch.float64) for n in (1, 4, 2)]
    neurons = [torch.arange(n, dtype=torch.float64) for n in (20, 3, 8)]
    rewire(uneven, Importance(scores, neurons, 1, 1, "paper"))
    assert uneven.rewiring.head_order[1].tolist() == [3, 2, 1, 0]
    torch.testing.assert_close(outputs(uneven, batch)["logits"], before)


def test_the_record_of_a_rewiring_is_that_of_the_kept_units() -> None:
    record = RewiringRecord(
        head_order=(torch.tensor([0, 1, 2, 3]), torch.tensor([3, 0, 2, 1])),
        neuron_order=(torch.tensor([1, 0]), torch.tensor([2, 0, 1])),
        head_scores=(torch.tensor([4.0, 3, 2, 1]), torch.tensor([30.0, 10, 20, 40])),
        neuron_scores=(torch.tensor([1.0, 2]), torch.tensor([5.0, 4, 6])),
        provenance={"data": "dev"},
    )
    model = tiny(num_hidden_layers=2)
    shape = model.subnet_shape(SubnetConfig(num_heads=3, intermediate_size=2, layers=(1,)))
    kept = restricted(record, shape)
    assert [order.tolist() for order in kept.head_order] == [[2, 0, 1]]  # of the heads 0, 2, 3
    assert [scores.tolist() for scores in kept.head_scores] == [[30, 20, 40]]
    assert [order.tolist() for order in kept.neuron_order] == [[1, 0]]  # of the neurons 0, 2
    assert [scores.tolist() for scores in kept.neuron_scores] == [[5, 6]]
    assert kept.provenance == {"data": "dev", "extracted_layers": "1"}


def test_a_copy_is_saved_and_loaded_with_its_record(make_batch: Any, tmp_path: Path) -> None:
    model = tiny()
    scores = [torch.arange(4, dtype=torch.float64)] * 3
    neurons = [torch.arange(20, dtype=torch.float64)] * 3
    rewire(model, Importance(scores, neurons, 1, 1, "paper"))
    extracted = extract(model, SubnetConfig(num_heads=(1, 4, 2), intermediate_size=5))
    extracted.save_pretrained(tmp_path)
    loaded = DynaBertForSequenceClassification.from_pretrained(tmp_path)
    batch = make_batch(model.config, lengths=(5, 2))
    assert_same_bits(outputs(loaded, batch), outputs(extracted, batch))
    assert [order.tolist() for order in loaded.rewiring.head_order] == [[0], [3, 2, 1, 0], [1, 0]]
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["num_heads_per_layer"], config["num_attention_heads"]) == ([1, 4, 2], 4)
    assert (config["intermediate_size_per_layer"], config["intermediate_size"]) == (None, 5)
    assert config["head_dim"] == 8


@pytest.mark.parametrize("subnet", [SubnetConfig(0.5, 2 / 3), UNEVEN], ids=["half", "uneven"])
def test_sizes_of_a_copy_are_those_counted_in_the_model(
    make_hf: Any, ours: Any, subnet: SubnetConfig
) -> None:
    model = ours(make_hf("bert"))
    shape, extracted = model.subnet_shape(subnet), extract(model, subnet)
    full = extracted.subnet_shape(None)
    own = sum(parameter.numel() for parameter in extracted.parameters())
    assert own == count_parameters(model, shape) == count_parameters(extracted, full)
    assert encoder_flops(extracted.config, full, 7) == encoder_flops(model.config, shape, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head_dim": 0}, "num_attention_heads=12 with head_dim=0, expected 1 or more of size"),
        ({"head_dim": 65}, "num_attention_heads=12 with head_dim=65.*fit into hidden_size=768"),
        ({"num_heads_per_layer": [12] * 11}, "num_heads_per_layer=.*expected num_hidden_layers=12"),
        ({"num_heads_per_layer": [11] * 12}, "the largest of them num_attention_heads=12"),
        ({"num_heads_per_layer": [12] * 11 + [0]}, "numbers of at least 1"),
        ({"num_heads_per_layer": "12"}, "num_heads_per_layer"),
        (
            {"intermediate_size_per_layer": [3073] + [3072] * 11},
            "intermediate_size_per_layer=.*the largest of them intermediate_size=3072",
        ),
    ],
)
def test_a_configuration_that_does_not_fit_itself_is_refused(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(StrictDataclassError, match=message):
        DynaBertConfig(**arguments)


def test_a_configuration_says_the_sizes_of_its_layers(tmp_path: Path) -> None:
    uniform = DynaBertConfig(num_hidden_layers=2)
    assert uniform.head_dim == 64
    assert [(s.num_heads, s.intermediate_size) for s in uniform.layer_shapes] == [(12, 3072)] * 2
    uneven = DynaBertConfig(
        num_hidden_layers=2,
        num_attention_heads=6,
        head_dim=64,
        intermediate_size=5,
        intermediate_size_per_layer=[5, 3],
    )
    uneven.save_pretrained(tmp_path)
    read = DynaBertConfig.from_pretrained(tmp_path)
    assert [(s.index, s.num_heads, s.intermediate_size) for s in read.layer_shapes] == [
        (0, 6, 5),
        (1, 6, 3),
    ]
    assert (read.head_dim, read.head_counts, read.neuron_counts) == (64, 6, (5, 3))
