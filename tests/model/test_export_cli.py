"""``dynabert export``: which subnet the options name, and what the command says."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from dynabert import DynaBertConfig, DynaBertForSequenceClassification, DynaBertModel, SubnetConfig
from dynabert.cli import app
from dynabert.export import load_for_export
from dynabert.json_file import write_json
from dynabert.latency import measure_latency
from dynabert.latency_file import save_latency
from dynabert.report import GridReport, SubnetRecord

HALF = SubnetConfig(0.5, 0.5)
SIZES = {
    "vocab_size": 59,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 24,
    "initializer_range": 0.3,
}


@pytest.fixture(autouse=True)
def no_leftover_handlers() -> Iterator[None]:
    yield
    logging.getLogger("dynabert").handlers.clear()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run, in whose grid the half subnet is the best."""
    folder = tmp_path / "run"
    DynaBertForSequenceClassification(DynaBertConfig(**SIZES)).save_pretrained(folder / "model")
    document = {"schema": 1, "model": "m", "task": "sst2", "arguments": {"stages": ["width"]}}
    write_json(folder / "run.json", document)
    rows = tuple(
        SubnetRecord(subnet, {"accuracy": score}, score, 9, 1, (1,), (6,), 10, 20)
        for subnet, score in ((SubnetConfig(), 0.5), (HALF, 0.75))
    )
    GridReport("sst2", "accuracy", 128, rows).save(folder / "grid.json")
    return folder


def export(*arguments: str | Path) -> Any:
    result = CliRunner().invoke(app, ["export", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def logits(model: Any, **options: Any) -> Tensor:
    ids = torch.arange(2, 16).reshape(2, 7)
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=ids, **options).logits
    return found


@pytest.mark.parametrize(
    ("options", "subnet"),
    [
        (("--width", "1/2", "--depth", "0.5"), HALF),
        (("--subnet", "h2.1-i5.12-l0.1"), SubnetConfig(1, 1, (2, 1), (5, 12), (0, 1))),
        ((), SubnetConfig()),
    ],
    ids=["fractions", "name", "full"],
)
def test_options_name_the_subnet(
    run: Path, tmp_path: Path, options: tuple[str, ...], subnet: SubnetConfig
) -> None:
    out = tmp_path / "out"
    result = export(run, *options, "--out", out, "--json", tmp_path / "said.json")
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"{subnet.name} as hf, equals the subnet in its model" in result.stdout
    assert "model.safetensors" in result.stdout
    said = json.loads((tmp_path / "said.json").read_text())
    assert said == json.loads((out / "export.json").read_text())
    whole = load_for_export(run / "model")
    assert torch.equal(logits(load_for_export(out)), logits(whole, subnet=subnet))


def test_a_budget_picks_the_subnet(run: Path, tmp_path: Path) -> None:
    model = DynaBertForSequenceClassification.from_pretrained(run / "model").eval()
    table = measure_latency(
        model, [SubnetConfig(), HALF], batch_size=2, seq_len=7, seconds_per_subnet=0.01
    )
    save_latency(table, run / "latency.json")
    out = tmp_path / "out"
    wide = ("--budget-ms", "1e6", "--batch-size", "2", "--seq-len", "7")
    assert HALF.name in export(run, *wide, "--out", out).stdout
    card = (out / "README.md").read_text()
    assert f"`{HALF.name}`: accuracy 0.7500." in card
    assert table.setting.describe() in card
    refused = export(run, *wide[2:], "--budget-ms", "1e-6", "--out", tmp_path / "no")
    assert refused.exit_code == 2
    assert "budget_ms=1e-06, expected at least" in refused.stderr
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--width", "1", "--subnet", "1"), "expected one of these. Name one subnet."),
        (("--subnet", "1", "--budget-ms", "3"), "expected one of these. Name one subnet."),
        (("--width", "0.3"), "width_mult=0.3 is 0.6 of 2 heads"),
        (("--subnet", "wide"), "text='wide', expected WIDTH or WIDTHxDEPTH"),
        (("--format", "gguf"), "format='gguf', expected one of hf, transformers, onnx"),
        (("--width", "0.5", "--format", "transformers"), "1 heads of 8 in a layer, expected"),
    ],
    ids=["width-and-name", "name-and-budget", "not-whole", "no-name", "format", "narrow-plain"],
)
def test_bad_options_are_one_line(
    run: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    result = export(run, *options, "--out", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("dynabert: error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pooled", [True, False], ids=["pooler", "no-pooler"])
def test_an_encoder_keeps_its_pooler(tmp_path: Path, pooled: bool) -> None:
    model = DynaBertModel(DynaBertConfig(**SIZES), add_pooling_layer=pooled)
    model.save_pretrained(tmp_path / "model")
    assert export(tmp_path / "model", "--out", tmp_path / "out").exit_code == 0
    exported = load_for_export(tmp_path / "out")
    assert (exported.pooler is not None) == pooled
    if pooled:
        assert torch.equal(exported.pooler.dense.weight, model.pooler.dense.weight)
