"""The configuration: what it refuses, and how those of other models become one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, BertConfig, DistilBertConfig, RobertaConfig

from dynabert import DynaBertConfig


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_size": 100}, "hidden_size=100, expected a multiple of num_attention_heads=12"),
        ({"hidden_size": "768"}, "hidden_size.*expected int, got str"),
        ({"architecture": "gpt"}, r"architecture='gpt', expected one of \['bert', 'roberta'\]"),
        ({"depth_rule": "last"}, "depth_rule='last', expected one of"),
        ({"hidden_act": "silu"}, "hidden_act='silu', expected one of"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0, expected at least 1"),
        ({"hidden_dropout_prob": "0.1"}, "hidden_dropout_prob"),
        (
            {"architecture": "roberta", "max_position_embeddings": 2},
            "max_position_embeddings=2, expected more than 2",
        ),
    ],
)
def test_bad_fields_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(StrictDataclassError, match=message):
        DynaBertConfig(**arguments)


def test_a_bad_field_set_later_is_refused_when_set_or_saved(tmp_path: Path) -> None:
    config = DynaBertConfig()
    with pytest.raises(StrictDataclassError, match="expected int, got str"):
        config.num_attention_heads = "12"
    config.num_attention_heads = 13
    with pytest.raises(StrictDataclassError, match="num_attention_heads=13"):
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("source", "architecture", "pad", "offset", "longest"),
    [
        (BertConfig(num_labels=3, hidden_act="gelu_new"), "bert", 0, 0, 512),
        (RobertaConfig(num_labels=3, max_position_embeddings=514), "roberta", 1, 2, 512),
    ],
    ids=["bert", "roberta"],
)
def test_from_hf_takes_everything_over(
    source: Any, architecture: str, pad: int, offset: int, longest: int
) -> None:
    source.id2label = {0: "no", 1: "yes", 2: "maybe"}
    source.problem_type = "single_label_classification"
    config = DynaBertConfig.from_hf(source, depth_rule="reference")
    assert (config.architecture, config.depth_rule) == (architecture, "reference")
    assert (config.pad_token_id, config.position_offset, config.max_seq_len) == (
        pad,
        offset,
        longest,
    )
    assert config.num_labels == 3
    assert config.id2label == source.id2label
    assert config.problem_type == "single_label_classification"
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "layer_norm_eps", "hidden_act"):
        assert getattr(config, name) == getattr(source, name)
    assert config.activation == ("gelu_tanh" if architecture == "bert" else "gelu")


def test_pad_token_follows_the_architecture() -> None:
    assert DynaBertConfig().pad_token_id == 0
    assert DynaBertConfig(architecture="roberta").pad_token_id == 1
    assert DynaBertConfig(architecture="roberta", pad_token_id=5).position_offset == 6


def fields_of(config: DynaBertConfig) -> dict[str, Any]:
    """All fields except where and by which version the file was written."""
    values = config.to_dict()
    return {k: v for k, v in values.items() if k not in ("_name_or_path", "transformers_version")}


def test_json_round_trip_and_auto_config(tmp_path: Path) -> None:
    config = DynaBertConfig(
        architecture="roberta", depth_rule="reference", num_labels=5, classifier_dropout=0.2
    )
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "dynabert"
    for reader in (DynaBertConfig, AutoConfig):
        read = reader.from_pretrained(tmp_path)
        assert isinstance(read, DynaBertConfig)
        assert fields_of(read) == fields_of(config)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (BertConfig(is_decoder=True), "is_decoder=True"),
        (DistilBertConfig(), "model_type='distilbert', expected 'bert', 'roberta' or 'dynabert'"),
    ],
    ids=["decoder", "distilbert"],
)
def test_other_models_are_refused(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DynaBertConfig.from_hf(source)


LEGACY = {
    "attention_probs_dropout_prob": 0.1,
    "finetuning_task": "mnli",
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 64,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "num_labels": 3,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_intermediate": True,
    "output_past": True,
    "pruned_heads": {},
    "torchscript": False,
    "type_vocab_size": 2,
    "use_bfloat16": False,
    "vocab_size": 30522,
}


def write_config(folder: Path, **changes: Any) -> Path:
    values = {**LEGACY, **changes}
    kept = {name: value for name, value in values.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


def test_legacy_config_loses_what_would_slow_every_call_down(tmp_path: Path) -> None:
    config = DynaBertConfig.from_pretrained(write_config(tmp_path))
    assert (config.architecture, config.num_labels) == ("bert", 3)
    assert config.output_hidden_states is False
    stored = config.to_dict()
    assert not stored.get("output_attentions")
    assert not {"pruned_heads", "torchscript", "use_bfloat16", "output_intermediate"} & set(stored)


def test_legacy_roberta_is_told_by_its_vocabulary(tmp_path: Path) -> None:
    folder = write_config(tmp_path, vocab_size=50265, max_position_embeddings=514)
    assert DynaBertConfig.from_pretrained(folder).architecture == "roberta"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pruned_heads": {"0": [1]}}, "pruned_heads="),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ({"vocab_size": None}, r"neither model_type nor \['vocab_size'\]"),
        ({"model_type": "llama"}, "model_type='llama'"),
    ],
)
def test_configs_that_cannot_be_converted_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        DynaBertConfig.from_pretrained(write_config(tmp_path, **changes))


def test_a_config_that_is_no_json_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": ')
    with pytest.raises(OSError, match="not a valid JSON file"):
        DynaBertConfig.from_pretrained(tmp_path)
