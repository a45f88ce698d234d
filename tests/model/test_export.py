"""Exports: what is written loads without us and computes what the subnet computes, and nothing is
written that does not."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dynabert import (
    DynaBertConfig,
    DynaBertForSequenceClassification,
    SubnetConfig,
    export_graph,
)
from dynabert import export as export_module
from dynabert.evaluation import GridRow
from dynabert.export import export_subnet, load_for_export
from dynabert.export_card import public
from dynabert.export_check import check_export, example_batch
from dynabert.json_file import write_json
from dynabert.report import GridReport, SubnetRecord

HEADS = {
    "Model": "AutoModel",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForMaskedLM": "AutoModelForMaskedLM",
}
SHAPES = ((8,), (17, 1, 6), (3, 3, 2, 1))  # of the batches: one without padding, one token, four


def outputs(model: Any, batch: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        output = model(**batch, **options)
    return {name: value for name, value in output.items() if isinstance(value, Tensor)}


def batches(make_batch: Any, config: Any, names: tuple[str, ...]) -> list[dict[str, Tensor]]:
    made = [make_batch(config, lengths, extra=0) for lengths in SHAPES]
    return [{name: batch[name] for name in names} for batch in made]


def assert_near(
    found: dict[str, Tensor], expected: dict[str, Tensor], mask: Tensor, atol: float
) -> None:
    """Equal at every real token."""
    for name, value in expected.items():
        real = mask != 0 if value.shape[:2] == mask.shape else slice(None)
        torch.testing.assert_close(found[name][real], value[real], atol=atol, rtol=0, msg=name)


def tiny(**changes: Any) -> DynaBertForSequenceClassification:
    sizes = {
        "vocab_size": 59,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 12,
        "max_position_embeddings": 24,
        "initializer_range": 0.3,
    }
    return DynaBertForSequenceClassification(DynaBertConfig(**{**sizes, **changes})).eval()


@pytest.mark.parametrize(
    ("architecture", "subnet"),
    [
        ("bert", SubnetConfig(0.25, 0.5)),
        ("roberta", SubnetConfig(num_heads=(8, 2), intermediate_size=(7, 84), layers=(1, 5))),
    ],
    ids=["bert-narrow", "roberta-uneven"],
)
def test_our_own_format_has_the_same_bits(
    make_hf: Any, ours: Any, make_batch: Any, architecture: str, tmp_path: Path, subnet: Any
) -> None:
    model = ours(make_hf(architecture))
    record = export_subnet(model, subnet, tmp_path / "out")
    assert record.check.max_error == 0
    auto = transformers.AutoModelForSequenceClassification
    loaded = auto.from_pretrained(tmp_path / "out").eval()
    assert loaded.config.num_hidden_layers == len(record.layers)
    for batch in batches(make_batch, model.config, ("input_ids", "attention_mask")):
        expected = outputs(model, batch, subnet=subnet)
        for name, value in outputs(loaded, batch).items():
            assert torch.equal(value, expected[name])


@pytest.mark.parametrize(
    ("architecture", "head"), [*(("bert", head) for head in HEADS), ("roberta", "ForMaskedLM")]
)
def test_plain_models_load_without_us(
    make_hf: Any, ours: Any, make_batch: Any, architecture: str, head: str, tmp_path: Path
) -> None:
    model = ours(make_hf(architecture, head), head)
    subnet = SubnetConfig(intermediate_size=41, layers=(0, 2, 5))
    record = export_subnet(model, subnet, tmp_path / "out", format="transformers")
    assert record.check.max_error < 1e-5
    auto = getattr(transformers, HEADS[head])
    plain, info = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(plain).__module__.startswith("transformers.")
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert plain.config.intermediate_size == 41
    if head == "ForMaskedLM":
        assert plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    for batch in batches(make_batch, model.config, ("input_ids", "attention_mask")):
        expected = outputs(model, batch, subnet=subnet)
        assert_near(outputs(plain.eval(), batch), expected, batch["attention_mask"], 1e-5)


def test_a_plain_encoder_without_pooler_and_its_labels(
    make_hf: Any, ours: Any, make_batch: Any, tmp_path: Path
) -> None:
    hf = make_hf("bert", "Model")
    model = ours(hf, "Model", add_pooling_layer=False)
    model.config.id2label = {0: "no", 1: "yes", 2: "maybe"}
    export_subnet(model, SubnetConfig(depth_mult=0.5), tmp_path / "out", format="transformers")
    plain, info = transformers.BertModel.from_pretrained(
        tmp_path / "out", add_pooling_layer=False, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert plain.config.id2label == model.config.id2label
    assert load_for_export(tmp_path / "out").pooler is None


@pytest.mark.parametrize(
    ("subnet", "message"),
    [
        (SubnetConfig(0.5), r"6 heads of 8 in a layer, expected heads that fill hidden_size=96"),
        (SubnetConfig(num_heads=(12,) * 5 + (3,)), r"3 heads of 8 in a layer"),
        (
            SubnetConfig(intermediate_size=(84,) * 5 + (7,)),
            r"intermediate_size=\[7, 84\], expected the same in every layer",
        ),
    ],
    ids=["narrow", "narrow-layer", "uneven-neurons"],
)
def test_what_plain_bert_cannot_express_is_one_clear_error(
    make_hf: Any, ours: Any, tmp_path: Path, subnet: SubnetConfig, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        export_subnet(ours(make_hf("bert")), subnet, tmp_path / "out", format="transformers")
    assert not (tmp_path / "out").exists()


def test_onnx_runs_at_shapes_it_was_not_recorded_at(make_batch: Any, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, subnet = tiny(), SubnetConfig(0.5, 0.5)
    record = export_subnet(model, subnet, tmp_path / "out", format="onnx")
    assert record.check.max_error < 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    names = tuple(entry.name for entry in session.get_inputs())
    assert names == ("input_ids", "attention_mask", "token_type_ids")
    for batch in [
        *batches(make_batch, model.config, names),
        {name: torch.ones(1, 1, dtype=torch.long) for name in names},
    ]:
        found = session.run(["logits"], {name: ids.numpy() for name, ids in batch.items()})
        expected = outputs(model, batch, subnet=subnet)["logits"]
        torch.testing.assert_close(torch.from_numpy(found[0]), expected, atol=1e-4, rtol=0)


def test_missing_packages_are_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_graph, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'onnxscript.*pip install "dynabert-kernels\[onnx\]"'):
        export_subnet(tiny(), None, tmp_path / "out", format="onnx")
    assert not (tmp_path / "out").exists()


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format='gguf', expected one of hf, transformers, onnx"):
        export_subnet(tiny(), None, tmp_path / "out", format="gguf")


def test_a_place_with_other_files_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    export_subnet(tiny(), None, out)  # empty, so nothing is lost
    with pytest.raises(ValueError, match="holds an export, expected a new or empty folder"):
        export_subnet(tiny(), None, out)
    (out / "README.md").write_text("mine")
    export_subnet(tiny(), SubnetConfig(0.5), out, overwrite=True)
    assert "mine" not in (out / "README.md").read_text()
    (out / "export.json").unlink()
    before = sorted(out.iterdir())
    with pytest.raises(ValueError, match="exists, expected a new or empty folder"):
        export_subnet(tiny(), None, out, overwrite=True)
    assert sorted(out.iterdir()) == before
    with pytest.raises(ValueError, match="exists, expected a new or empty folder"):
        export_subnet(tiny(), None, out / "config.json", overwrite=True)


def test_a_failure_leaves_nothing_and_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    export_subnet(tiny(), None, out)
    before = (out / "model.safetensors").read_bytes()

    def fail(*arguments: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(export_module, "render_card", fail)
    for place in (out, tmp_path / "new"):
        with pytest.raises(OSError, match="disk full"):
            export_subnet(tiny(), None, place, overwrite=True)
    assert list(tmp_path.iterdir()) == [out]
    assert (out / "model.safetensors").read_bytes() == before


def test_a_difference_beyond_the_limit_is_an_error() -> None:
    config = tiny().config

    def run(factor: float) -> Any:
        return lambda batch: {"logits": factor * batch["input_ids"].double()[:, :3]}

    check = check_export("x", config, run(1), run(1 + 1e-6), 2e-6, "y")
    assert check.shapes == ((1, 9), (3, 23), (2, 5))
    largest = max(
        int(example_batch(config, lengths, seed)["input_ids"][:, :3].max())
        for seed, lengths in enumerate(((9,), (23, 1, 12), (5, 5)))
    )
    assert check.max_error == pytest.approx(1e-6 * largest)
    with pytest.raises(RuntimeError, match=r"x: logits differs by .* from y, expected at most"):
        check_export("x", config, run(1), run(1 + 1e-6), 1e-7, "y")
    with pytest.raises(RuntimeError, match="differs by nan"):
        check_export("x", config, run(1), run(float("nan")), 1.0, "y")


def test_dtype_is_kept_and_quantisation_left_out(make_batch: Any, tmp_path: Path) -> None:
    model, subnet = tiny().bfloat16().quantize("int8"), SubnetConfig(0.5)
    record = export_subnet(model, subnet, tmp_path / "out")
    assert record.check.compared_with == "the extracted subnet"
    assert model.quantization == "int8"
    loaded = load_for_export(tmp_path / "out")
    assert (loaded.dtype, loaded.quantization) == (torch.bfloat16, None)
    batch = make_batch(model.config, (5, 2))
    expected = outputs(model.quantize(None), batch, subnet=subnet)["logits"]
    assert torch.equal(outputs(loaded, batch)["logits"], expected)


def make_run(folder: Path, model: Any, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A run as `dynabert train` leaves it, with one evaluated subnet."""
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    document = {
        "schema": 1,
        "model": str(folder.parent / "teacher" / "model"),
        "task": "sst2",
        "data": {"source": str(folder.parent / "SST-2"), "fingerprint": "f00d"},
        "arguments": {"stages": ["width", "final"], "seed": 7, "output_dir": str(folder)},
        "versions": {"torch": "2.11.0"},
    }
    write_json(folder / "run.json", document)
    half = SubnetConfig(0.5, 0.5)
    row = GridRow(half, {"accuracy": 0.8125}, 0.8125, 16)
    shape = model.subnet_shape(half)
    record = SubnetRecord(
        row.subnet, row.metrics, row.primary, row.num_rows, len(shape.layers), (1,), (6,), 10, 20
    )
    GridReport("sst2", "accuracy", 128, (record,)).save(folder / "grid.json")
    return folder


def test_the_folder_tells_where_its_model_came_from(
    tmp_path: Path, byte_level_tokenizer: PreTrainedTokenizerBase
) -> None:
    run = make_run(tmp_path / "my-run", tiny(), byte_level_tokenizer)
    model = load_for_export(run / "model")
    half = SubnetConfig(0.5, 0.5)
    record = export_subnet(model, half, tmp_path / "out")
    out = tmp_path / "out"
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / file).read_bytes() == (run / "model" / file).read_bytes()
    document = json.loads((out / "export.json").read_text())
    assert document == json.loads(json.dumps(record.to_dict()))
    digest = hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest()
    assert document["source"]["weights_sha256"] == {"model.safetensors": digest}
    assert document["subnet"] == half.to_dict()
    assert document["layers"] == [{"index": 1, "num_heads": 1, "intermediate_size": 6}]
    assert document["source"]["stage"] == "final"
    assert document["source"]["run"]["arguments"] == {"stages": ["width", "final"], "seed": 7}

    card = ModelCard.load(out / "README.md")
    data = card.data.to_dict()
    assert data == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["dynabert", "bert"],
    }
    for text in ("0.8125", digest, "teacher/model", "SST-2", "f00d", "| seed | 7 |", "81.2"):
        assert text in card.text, text
    for written in (card.text, (out / "export.json").read_text()):
        assert str(tmp_path) not in written


def test_a_hub_id_becomes_the_base_model(tmp_path: Path) -> None:
    model = tiny()
    model.name_or_path = "some-lab/their-bert"
    export_subnet(model, None, tmp_path / "out")
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert data.base_model == "some-lab/their-bert"


def test_absolute_paths_are_cut() -> None:
    values = {"a": "/home/me/data", "b": ["/x/run/model", "x/y", 3], "c": None}
    assert public(values) == {"a": "data", "b": ["run/model", "x/y", 3], "c": None}


def test_a_loaded_model_does_not_depend_on_where_its_file_puts_the_weights(tmp_path: Path) -> None:
    model = tiny()
    for length in (0, 8, 24):  # of the header, which decides where the first weight starts
        folder = tmp_path / str(length)
        model.config.save_pretrained(folder)
        metadata = {"format": "pt", "padding": "x" * length}
        save_file(dict(model.state_dict()), folder / "model.safetensors", metadata=metadata)
        loaded = DynaBertForSequenceClassification.from_pretrained(folder)
        assert {parameter.data_ptr() % 64 for parameter in loaded.parameters()} == {0}
        for name, weight in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], weight)
