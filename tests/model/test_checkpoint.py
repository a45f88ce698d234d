"""Checkpoints: every kind loads, nothing is random or executed, and what is saved comes back."""

from __future__ import annotations

import json
import logging
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

import dynabert
from dynabert import (
    DynaBertForMaskedLM,
    DynaBertForSequenceClassification,
    DynaBertForTokenClassification,
    DynaBertModel,
    RewiringRecord,
    SubnetConfig,
)
from dynabert.hf_checkpoint import from_hf_state_dict, to_hf_state_dict

HEADS = [
    "Model",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMaskedLM",
]


@pytest.fixture
def reports(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Log records of transformers, which it keeps from the root logger otherwise."""
    logger = logging.getLogger("transformers")
    logger.propagate = True
    yield caplog
    logger.propagate = False


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_equal(state: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert state.keys() == other.keys()
    for name in state:
        assert torch.equal(state[name], other[name]), name


@pytest.mark.parametrize("head", HEADS)
def test_hf_to_ours_and_back_is_the_identity(
    make_hf: Any, ours: Any, architecture: str, head: str
) -> None:
    theirs = make_hf(architecture, head)
    model, info = ours(theirs, head, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    back = to_hf_state_dict(model.state_dict(), model.config)
    assert_equal(back, dict(theirs.state_dict()))
    theirs.load_state_dict(back, strict=True)


def test_to_hf_refuses_narrowed_or_incomplete_weights(make_hf: Any, ours: Any) -> None:
    model = ours(make_hf("bert", "Model"), "Model")
    state = weights(model)
    narrow = {**state, "encoder.layer.2.ffn.up_weight": state["encoder.layer.2.ffn.up_weight"][:7]}
    with pytest.raises(ValueError, match=r"down_weight|up_bias|up_weight"):
        to_hf_state_dict(narrow, model.config)
    del state["encoder.layer.2.ffn.up_bias"]
    with pytest.raises(ValueError, match=r"\['encoder.layer.2.ffn.up_bias'\] missing"):
        to_hf_state_dict(state, model.config)


def old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weight names as checkpoints of 2019 have them."""
    return {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in state.items()
    }


@pytest.mark.parametrize("form", ["safetensors", "shards", "bin", "bin-shards", "old-bin"])
def test_every_file_form_loads_the_same_weights(
    make_hf: Any, architecture: str, tmp_path: Path, form: str
) -> None:
    theirs = make_hf(architecture)
    plain = tmp_path / "plain"
    theirs.save_pretrained(plain)
    expected = weights(DynaBertForSequenceClassification.from_pretrained(plain))
    folder = tmp_path / form
    theirs.config.save_pretrained(folder)
    state = dict(theirs.state_dict())
    if form in ("safetensors", "shards"):
        theirs.save_pretrained(folder, max_shard_size="50KB" if form == "shards" else "1GB")
    elif form == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    elif form == "old-bin":
        torch.save(
            old_names(state),
            folder / "pytorch_model.bin",
            _use_new_zipfile_serialization=False,
        )
    else:
        names = sorted(state)
        halves = {"a.bin": names[: len(names) // 2], "b.bin": names[len(names) // 2 :]}
        for file, some in halves.items():
            torch.save({name: state[name] for name in some}, folder / file)
        index = {"weight_map": {name: file for file, some in halves.items() for name in some}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    model, info = DynaBertForSequenceClassification.from_pretrained(
        folder, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_equal(weights(model), expected)
    assert model.name_or_path == str(folder)


def test_legacy_dynabert_checkpoint_loads_and_runs_like_bert(
    make_hf: Any, make_batch: Any, tmp_path: Path
) -> None:
    theirs = make_hf("bert")
    values = theirs.config.to_dict()
    for name in ("model_type", "architectures", "dtype", "transformers_version"):
        values.pop(name, None)
    values |= {
        "output_attentions": True,
        "output_hidden_states": True,
        "output_intermediate": True,
        "pruned_heads": {},
        "torchscript": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    torch.save(
        old_names(dict(theirs.state_dict())),
        tmp_path / "pytorch_model.bin",
        _use_new_zipfile_serialization=False,
    )
    model, info = DynaBertForSequenceClassification.from_pretrained(
        tmp_path, depth_rule="reference", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.depth_rule == "reference"
    batch = make_batch(theirs.config)
    with torch.no_grad():
        output = model(**batch)
        assert output.hidden_states is None
        expected = theirs(**batch).logits
    torch.testing.assert_close(output.logits, expected, atol=1e-5, rtol=0)


def test_pretraining_checkpoint_gives_body_and_lm_head(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=53,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    theirs = transformers.BertForPreTraining(config).eval()
    theirs.save_pretrained(tmp_path)
    model, info = DynaBertForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    # No counterpart: the pooler and the next-sentence head.
    assert {name.split(".")[-3] for name in info["unexpected_keys"]} == {"pooler", "cls"}
    ids = torch.arange(14).reshape(2, 7)
    with torch.no_grad():
        expected = theirs(ids).prediction_logits
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=0)


def test_weights_a_checkpoint_lacks_are_initialised_and_named(
    make_hf: Any, tmp_path: Path, reports: pytest.LogCaptureFixture
) -> None:
    make_hf("bert", "Model").save_pretrained(tmp_path)
    model, info = DynaBertForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True, num_labels=5
    )
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert "classifier.weight" in reports.text and f"from: {tmp_path}" in reports.text
    assert model.classifier.weight.shape == (5, 96)
    assert not model.classifier.bias.any()
    assert 0.01 < model.classifier.weight.std() < 0.03


def test_an_incomplete_sublayer_is_reported_and_initialised(
    make_hf: Any, tmp_path: Path, reports: pytest.LogCaptureFixture
) -> None:
    theirs = make_hf("bert", "Model")
    state = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}
    del state["encoder.layer.3.attention.self.key.bias"]
    del state["encoder.layer.4.output.LayerNorm.weight"]
    theirs.config.save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    torch.full((100_000,), torch.nan)  # so that recycled memory would show
    model, info = DynaBertModel.from_pretrained(tmp_path, output_loading_info=True)
    lost = {f"encoder.layer.3.attention.{n}" for n in ("qkv_weight", "qkv_bias", "out_weight")}
    lost |= {f"encoder.layer.3.attention.{n}" for n in ("out_bias", "norm_weight", "norm_bias")}
    lost |= {f"encoder.layer.4.ffn.{n}" for n in ("up_weight", "up_bias", "down_weight")}
    lost |= {f"encoder.layer.4.ffn.{n}" for n in ("down_bias", "norm_weight", "norm_bias")}
    assert info["missing_keys"] == lost
    assert "encoder.layer.3.attention.self.query.weight" in info["unexpected_keys"]
    assert "encoder.layer.3.attention.qkv_weight" in reports.text
    attention, ffn = model.encoder.layer[3].attention, model.encoder.layer[4].ffn
    assert 0.01 < attention.qkv_weight.std() < 0.03 and 0.01 < ffn.up_weight.std() < 0.03
    assert torch.equal(attention.norm_weight, torch.ones(96))
    assert not attention.qkv_bias.any() and not ffn.norm_bias.any()


def test_a_new_model_has_no_random_memory() -> None:
    torch.full((1_000_000,), torch.nan)
    config = dynabert.DynaBertConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        vocab_size=31,
    )
    model = DynaBertModel(config)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert 0.01 < parameter.std() < 0.03, name


def test_another_number_of_labels_needs_consent(make_hf: Any, tmp_path: Path) -> None:
    make_hf("bert").save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        DynaBertForSequenceClassification.from_pretrained(tmp_path, num_labels=7)
    model = DynaBertForSequenceClassification.from_pretrained(
        tmp_path, num_labels=7, ignore_mismatched_sizes=True
    )
    assert model.classifier.weight.shape == (7, 96) and model.classifier.weight.isfinite().all()


def test_a_checkpoint_of_another_size_than_its_config_is_one_error(
    make_hf: Any, tmp_path: Path
) -> None:
    theirs = make_hf("bert", "Model")
    theirs.save_pretrained(tmp_path)
    theirs.config.hidden_size, theirs.config.num_attention_heads = 72, 12
    theirs.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"query.weight has shape \[96, 96\], expected \[72, 72\]"):
        DynaBertModel.from_pretrained(tmp_path)


def test_heads_that_do_not_divide_the_hidden_size_are_one_error(
    make_hf: Any, tmp_path: Path
) -> None:
    make_hf("bert", "Model").save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "num_attention_heads": 7}))
    with pytest.raises(Exception, match="expected a multiple of num_attention_heads=7"):
        DynaBertModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["safetensors", "bin", "old-bin", "garbage", "dynabert"])
def test_damaged_files_are_one_error(make_hf: Any, ours: Any, tmp_path: Path, kind: str) -> None:
    theirs = make_hf("bert", "Model")
    theirs.config.save_pretrained(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    if kind in ("safetensors", "dynabert"):
        (theirs if kind == "safetensors" else ours(theirs, "Model")).save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
    else:
        is_new = kind != "old-bin"
        torch.save(theirs.state_dict(), file, _use_new_zipfile_serialization=is_new)
    content = b"\x00garbage" * 99 if kind == "garbage" else file.read_bytes()
    file.write_bytes(content if kind == "garbage" else content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"from_pretrained: .*expected"):
        DynaBertModel.from_pretrained(tmp_path)


class Malicious:
    """Unpickles by creating a directory, which is harmless and can be looked for."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("kind", ["zip", "tar", "raw"])
@pytest.mark.parametrize("place", ["value", "whole"])
def test_a_malicious_pickle_is_refused_and_not_executed(
    make_hf: Any, tmp_path: Path, kind: str, place: str
) -> None:
    theirs = make_hf("bert", "Model")
    theirs.config.save_pretrained(tmp_path)
    trap = tmp_path / "executed"
    content: Any = Malicious(trap)
    if place == "value":
        content = {**theirs.state_dict(), "evil": content}
    if kind == "raw":
        (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(content, protocol=2))
    else:
        is_zip = kind == "zip"
        torch.save(content, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(ValueError, match=r"pytorch_model.bin.*was not executed"):
        DynaBertModel.from_pretrained(tmp_path)
    assert not trap.exists()


def test_a_bin_that_is_no_state_dict_is_refused(make_hf: Any, tmp_path: Path) -> None:
    make_hf("bert", "Model").config.save_pretrained(tmp_path)
    torch.save({"epoch": 3, "model": {}}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="more than named tensors"):
        DynaBertModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../secret.safetensors"}}, "without a folder"),
        ({"weight_map": {"a": "gone.safetensors"}}, "has no gone.safetensors"),
        ({"nothing": 1}, "cannot be read"),
    ],
)
def test_a_bad_index_is_one_error(
    make_hf: Any, tmp_path: Path, index: dict[str, Any], message: str
) -> None:
    make_hf("bert", "Model").config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises((OSError, ValueError), match=message):
        DynaBertModel.from_pretrained(tmp_path)


def test_a_folder_without_weights_or_config_is_one_error(make_hf: Any, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"config\.json"):
        DynaBertModel.from_pretrained(tmp_path)
    make_hf("bert", "Model").config.save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"has no weights, expected one of model.safetensors"):
        DynaBertModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("head", HEADS)
def test_save_in_shards_and_load_is_bitwise(
    make_hf: Any, ours: Any, architecture: str, head: str, tmp_path: Path
) -> None:
    model = ours(make_hf(architecture, head), head)
    folder = tmp_path / "saved"
    model.save_pretrained(folder)  # a single file first: the shards must not be shadowed by it
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    model.save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    again, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_equal(weights(again), weights(model))
    model.save_pretrained(folder)
    assert_equal(weights(type(model).from_pretrained(folder)), weights(model))


def test_a_dynabert_body_loads_into_a_head_and_back(
    make_hf: Any, ours: Any, tmp_path: Path
) -> None:
    body = ours(make_hf("bert", "Model"), "Model")
    body.save_pretrained(tmp_path / "body")
    classifier, info = DynaBertForTokenClassification.from_pretrained(
        tmp_path / "body", output_loading_info=True
    )
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    expected = {name: t for name, t in weights(body).items() if not name.startswith("pooler")}
    assert_equal(weights(classifier.dynabert), expected)
    classifier.save_pretrained(tmp_path / "head")
    again = DynaBertModel.from_pretrained(tmp_path / "head", add_pooling_layer=False)
    assert_equal(weights(again), expected)


def test_the_model_survives_its_source_being_overwritten(make_hf: Any, tmp_path: Path) -> None:
    theirs = make_hf("bert")
    theirs.save_pretrained(tmp_path)
    model = DynaBertForSequenceClassification.from_pretrained(tmp_path)
    before = weights(model)
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    assert_equal(weights(model), before)
    model.save_pretrained(tmp_path)  # a DynaBERT directory in the place of the source
    assert_equal(weights(DynaBertForSequenceClassification.from_pretrained(tmp_path)), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_is_the_checkpoints_own_or_the_one_asked_for(
    make_hf: Any, tmp_path: Path, dtype: torch.dtype
) -> None:
    make_hf("bert").to(dtype).save_pretrained(tmp_path)
    kept = DynaBertForSequenceClassification.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in kept.parameters()} == {dtype}
    for setting in ({"dtype": torch.float32}, {"torch_dtype": torch.float32}, {"dtype": "float32"}):
        asked = DynaBertForSequenceClassification.from_pretrained(tmp_path, **setting)
        assert {parameter.dtype for parameter in asked.parameters()} == {torch.float32}
    kept.save_pretrained(tmp_path / "ours")
    again = DynaBertForSequenceClassification.from_pretrained(tmp_path / "ours")
    assert_equal(weights(again), weights(kept))


def test_a_hub_id_is_read_from_the_cache_given_without_network(
    make_hf: Any, ours: Any, tmp_path: Path
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    theirs = make_hf("bert")
    for name, model in (("bert", theirs), ("dynabert", ours(theirs))):
        repo = tmp_path / f"models--someone--{name}"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text(commit)
        model.save_pretrained(repo / "snapshots" / commit)
        arguments = {"cache_dir": tmp_path, "local_files_only": True, "revision": "main"}
        loaded = DynaBertForSequenceClassification.from_pretrained(f"someone/{name}", **arguments)
        assert loaded.name_or_path == f"someone/{name}"
        assert_equal(to_hf_state_dict(loaded.state_dict(), loaded.config), theirs.state_dict())
    with pytest.raises(OSError, match="cached files"):
        DynaBertModel.from_pretrained("someone/nothing", **arguments)


def test_variant_and_file_kind_choose_the_file(make_hf: Any, tmp_path: Path) -> None:
    theirs = make_hf("bert", "Model")
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(2)
    theirs.save_pretrained(tmp_path, variant="twice")
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    twice = to_hf_state_dict(
        DynaBertModel.from_pretrained(tmp_path, variant="twice").state_dict(),
        dynabert.DynaBertConfig.from_hf(theirs.config),
    )
    assert_equal(twice, dict(theirs.state_dict()))
    from_bin = DynaBertModel.from_pretrained(tmp_path, use_safetensors=False)
    assert_equal(to_hf_state_dict(from_bin.state_dict(), from_bin.config), twice)
    plain = DynaBertModel.from_pretrained(tmp_path)
    assert torch.equal(plain.pooler.dense.weight * 2, from_bin.pooler.dense.weight)
    with pytest.raises(OSError, match=r"model\.half\.safetensors"):
        DynaBertModel.from_pretrained(tmp_path, variant="half")


@pytest.mark.parametrize("kind", ["bert", "dynabert"])
def test_unsafe_reading_is_refused(make_hf: Any, ours: Any, tmp_path: Path, kind: str) -> None:
    theirs = make_hf("bert", "Model")
    (theirs if kind == "bert" else ours(theirs, "Model")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="weights_only=False, expected True"):
        DynaBertModel.from_pretrained(tmp_path, weights_only=False)


def test_a_config_of_either_kind_may_be_passed(make_hf: Any, tmp_path: Path) -> None:
    theirs = make_hf("bert")
    theirs.save_pretrained(tmp_path)
    theirs.config.hidden_dropout_prob = 0.0
    for config in (theirs.config, dynabert.DynaBertConfig.from_hf(theirs.config)):
        model = DynaBertForSequenceClassification.from_pretrained(tmp_path, config=config)
        assert model.config.hidden_dropout_prob == 0.0
        assert isinstance(model.config, dynabert.DynaBertConfig)


def test_settings_passed_along_reach_the_config(make_hf: Any, tmp_path: Path) -> None:
    make_hf("roberta").save_pretrained(tmp_path)
    model = DynaBertForSequenceClassification.from_pretrained(
        str(tmp_path), hidden_dropout_prob=0.25, depth_rule="reference", local_files_only=True
    )
    assert model.config.hidden_dropout_prob == 0.25
    assert model.dynabert.encoder.layer[0].ffn.dropout_p == 0.25
    assert model.subnet_shape(SubnetConfig(1.0, 0.5)).layers[0].index == 0


def record(layers: int = 6) -> RewiringRecord:
    return RewiringRecord(
        head_order=tuple(torch.randperm(12) for _ in range(layers)),
        neuron_order=tuple(torch.randperm(84) for _ in range(layers)),
        head_scores=tuple(torch.rand(12) for _ in range(layers)),
        neuron_scores=tuple(torch.rand(84) for _ in range(layers)),
        provenance={"task": "sst2", "num_batches": 3, "loss": 0.5},
    )


def test_the_rewiring_record_travels_with_the_model(
    make_hf: Any, ours: Any, tmp_path: Path
) -> None:
    model = ours(make_hf("bert"))
    assert model.rewiring is None
    model.rewiring = record()
    assert model.dynabert.rewiring is model.rewiring
    model.save_pretrained(tmp_path)
    read = DynaBertForSequenceClassification.from_pretrained(tmp_path).rewiring
    assert read is not None
    for name in ("head_order", "neuron_order", "head_scores", "neuron_scores"):
        pairs = zip(getattr(read, name), getattr(model.rewiring, name), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert read.provenance == {"task": "sst2", "num_batches": 3, "loss": 0.5}
    model.rewiring = None
    model.save_pretrained(tmp_path)  # a record of another model must not stay behind
    assert DynaBertForSequenceClassification.from_pretrained(tmp_path).rewiring is None


def test_a_damaged_or_impossible_record_is_one_error(tmp_path: Path) -> None:
    good = record(2)
    path = good.save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["rewiring.safetensors"]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"RewiringRecord.load: .*rewiring.safetensors cannot be"):
        RewiringRecord.load(path)
    with pytest.raises(ValueError, match="head_order of layer 1 is not a permutation"):
        RewiringRecord(
            (good.head_order[0], torch.zeros(12, dtype=torch.int64)),
            good.neuron_order,
            good.head_scores,
            good.neuron_scores,
        )
    with pytest.raises(ValueError, match="neuron_scores has 1 layers, expected 2"):
        RewiringRecord(good.head_order, good.neuron_order, good.head_scores, good.neuron_scores[:1])


def test_conversion_leaves_its_input_alone(make_hf: Any) -> None:
    theirs = make_hf("bert", "Model")
    state = dict(theirs.state_dict())
    before = weights(theirs)
    config = dynabert.DynaBertConfig.from_hf(theirs.config)
    converted = from_hf_state_dict(state, config, prefix="")
    assert "encoder.layer.0.attention.qkv_weight" in converted
    assert_equal(state, before)
