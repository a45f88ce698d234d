"""`quantize`: the model in integers, its views, copies and files, and its latency."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from dynabert import DynaBertForSequenceClassification, SubnetConfig
from dynabert.cli._options import parse_dtype
from dynabert.latency import measure_latency
from dynabert.modeling_sublayers import DynaBertAttention, DynaBertFFN
from dynabert_kernels import use_backend

HALF = SubnetConfig(0.5, 0.5)


@pytest.fixture(autouse=True)
def reference() -> Any:
    with use_backend("reference"):
        yield


@pytest.fixture
def model(make_hf: Any, ours: Any) -> DynaBertForSequenceClassification:
    loaded: DynaBertForSequenceClassification = ours(make_hf("bert", num_hidden_layers=2))
    return loaded.eval()


def sublayers(model: Any) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, (DynaBertAttention, DynaBertFFN))]


def logits(model: Any, batch: Any, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(**batch, **more).logits
    return result


@pytest.mark.parametrize("subnet", [None, HALF], ids=["full", "half"])
def test_int8_is_near_and_none_is_exact_again(model: Any, make_batch: Any, subnet: Any) -> None:
    batch = make_batch(model.config)
    exact = logits(model, batch, subnet=subnet)
    assert model.quantization is None
    assert model.quantize("int8") is model
    assert model.quantization == "int8"
    quantized = logits(model, batch, subnet=subnet)
    assert 0 < (quantized - exact).norm() / exact.norm() < 0.05
    assert model.quantize(None).quantization is None
    assert torch.equal(logits(model, batch, subnet=subnet), exact)


def test_every_sublayer_is_quantised(model: Any) -> None:
    model.quantize("int8")
    assert len(sublayers(model)) == 4
    for sublayer in sublayers(model):
        assert sublayer.packed().quantization == "int8"


def test_head_and_base_model_agree(model: Any) -> None:
    model.base_model.quantize("int8")
    assert model.quantization == "int8"


def test_views_and_copies(model: Any, make_batch: Any) -> None:
    batch = make_batch(model.config)
    view = model.with_subnet(HALF)
    exact = logits(view, batch)
    logits(model, batch)  # so that there are bundles for a copy to take along
    model.quantize("int8")
    assert view.quantization == "int8"
    assert not torch.equal(logits(view, batch), exact)
    copied = copy.deepcopy(model)
    model.quantize(None)
    assert copied.quantization == "int8"
    assert torch.equal(logits(view, batch), exact)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert logits(copied, batch).count_nonzero() == 0
    assert torch.equal(logits(view, batch), exact)


def test_nothing_of_it_is_saved(model: Any, tmp_path: Any) -> None:
    names = list(model.state_dict())
    model.quantize("int8").save_pretrained(tmp_path)
    assert list(model.state_dict()) == names
    loaded = DynaBertForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.quantization is None
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


@pytest.mark.parametrize("wrong", ["int4", "", 8, torch.int8], ids=str)
def test_other_forms_are_refused(model: Any, wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"^DynaBert\w+\.quantize: quantization=.*, expected None"):
        model.quantize(wrong)
    assert model.quantization is None


def test_weights_that_are_not_finite_are_refused_by_name(model: Any) -> None:
    with torch.no_grad():
        sublayers(model)[1].down_weight[3, 2] = torch.nan
    name = r"encoder\.layer\.0\.ffn\.down_weight"
    with pytest.raises(ValueError, match=rf"^quantization: {name} holds NaN or infinity, expected"):
        model.quantize("int8")
    assert model.quantization is None
    assert model.quantize(None) is model


def test_gradients_are_refused(model: Any, make_batch: Any) -> None:
    model.quantize("int8")
    with pytest.raises(NotImplementedError, match=r"gradients are needed.*model\.quantize\(None\)"):
        model(**make_batch(model.config))


def test_autocast_and_bfloat16_models(model: Any, make_batch: Any) -> None:
    batch = make_batch(model.config)
    quantized = logits(model.quantize("int8"), batch)
    for other in (model, copy.deepcopy(model).to(torch.bfloat16)):
        with torch.autocast("cpu", torch.bfloat16, enabled=other is model):
            got = logits(other, batch)
        assert (got - quantized).norm() / quantized.norm() < 0.05


def test_bundles_follow_the_parameters(model: Any) -> None:
    sublayer = sublayers(model)[1]
    with torch.no_grad():
        kept = sublayer.packed()
        assert sublayer.packed() is kept
        sublayer.norm_eps = 1e-3
        assert sublayer.packed().norm_eps == 1e-3
        sublayer.activation = "relu"
        assert sublayer.packed().activation == "relu"
        new = torch.nn.Parameter(torch.zeros_like(sublayer.up_weight))
        sublayer.up_weight = new
        assert sublayer.packed().up_weight is new
        torch.nn.utils.parametrize.register_parametrization(
            sublayer, "norm_bias", torch.nn.Identity()
        )
        sublayer.parametrizations.norm_bias.original.fill_(7)
        assert sublayer.packed().norm_bias.eq(7).all()
        sublayer.parametrizations.norm_bias.original = torch.nn.Parameter(torch.zeros(96))
        assert sublayer.packed().norm_bias.eq(0).all()
    assert sublayer.packed() is not sublayer.packed()  # with gradients nothing is kept alive


def test_latency_of_int8_is_that_of_a_float32_copy(model: Any) -> None:
    quick = {"seq_len": 5, "seconds_per_subnet": 1e-3, "progress": False}
    half_precision = copy.deepcopy(model).to(torch.bfloat16)
    table = measure_latency(half_precision, [HALF], dtype=parse_dtype("int8"), **quick)
    assert table.setting.dtype == "int8"
    assert half_precision.quantization is None
    model.quantize("int8")
    assert measure_latency(model, [HALF], **quick).setting.dtype == "int8"
    assert measure_latency(model, [HALF], dtype=torch.float32, **quick).setting.dtype == "float32"
    assert model.quantization == "int8"
