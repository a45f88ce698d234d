"""A run that is killed is compared with one that is not, and the record names no folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertTokenizer

from benchmarks.kill_run import KilledRun, _without_folder, compare_runs, main
from dynabert import DynaBertModel
from tests.training.conftest import tiny_config, toy_examples


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """What ``dynabert train`` is told: a tiny encoder, a toy task, two stages."""
    model = tmp_path / "in" / "model"
    examples = toy_examples(48, seed=1)
    words = sorted({word for example in examples for word in example.text.split()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    torch.manual_seed(0)
    DynaBertModel(tiny_config(vocab_size=len(vocabulary), hidden_dropout_prob=0.1)).save_pretrained(
        model
    )
    BertTokenizer(vocab={word: index for index, word in enumerate(vocabulary)}).save_pretrained(
        model
    )
    rows = tmp_path / "in" / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"text": e.text, "label": str(e.label)}) + "\n" for e in examples)
    )
    return [
        *("--model", str(model), "--task", "file"),
        *("--train-file", str(rows), f"--validation-file={rows}"),
        *("--stages", "teacher,width", "--widths", "1,0.5", "--max-length", "24"),
        *("--batch-size", "8", "--epochs", "1", "--cpu", "--no-bf16", "--threads", "1"),
    ]


@pytest.mark.slow
def test_a_killed_run_is_compared_and_recorded(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "kills.jsonl"
    command = ["kill_run", "--work-dir", str(tmp_path / "work"), "--kills", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*command, "--", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert "every bit is equal" in capsys.readouterr().out
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert row["is_equal"] and row["differences"] == {}
    assert row["compared"] == ["model", "teacher", "width", "grid"]
    assert (row["whole_starts"], row["starts"]) == (1, len(row["kills"]) + 1)
    assert "rows.jsonl" in row["command"] and "--validation-file=rows.jsonl" in row["command"]
    assert str(tmp_path) not in out.read_text()
    with pytest.raises(SystemExit, match="finished and recorded"):
        main()


def test_a_run_that_fails_is_reported(tmp_path: Path) -> None:
    run = KilledRun(tmp_path, ["--task", "sst2"], num_kills=1, seed=1)
    with pytest.raises(RuntimeError, match=r"the run ended with \d+; its log is .*whole\.log"):
        run.execute()
    assert "--model" in (tmp_path / "whole.log").read_text()


def test_another_command_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        KilledRun(tmp_path, ["--task"], num_kills=1, seed=1).execute()
    with pytest.raises(ValueError, match="holds other arguments"):
        KilledRun(tmp_path, ["--task", "sst2"], num_kills=1, seed=1)
    with pytest.raises(ValueError, match="expected neither"):
        KilledRun(tmp_path, ["--output-dir=x"], num_kills=1, seed=1)


def test_records_name_no_folder(tmp_path: Path) -> None:
    assert _without_folder(str(tmp_path)) == tmp_path.name
    assert _without_folder(f"--model={tmp_path}") == f"--model={tmp_path.name}"
    for argument in ("--depths", "1,2/3,1/2", "--depths=1,1/2", "google/bert_uncased_L-2"):
        assert _without_folder(argument) == argument


@pytest.mark.parametrize(("within", "last"), [(None, 1000.0), (10.0, 10.0)])
def test_kills_are_spread_over_the_time_asked_for(
    within: float | None, last: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = KilledRun(tmp_path, ["--task"], num_kills=20, seed=1, within=within)
    run.state["whole"]["seconds"] = 1000.0
    instants = []

    def start(name: str, until: float | None) -> bool:
        instants.append(until)
        return False

    monkeypatch.setattr(run, "_start", start)
    run.execute()
    kills = instants[1:-1]
    assert (instants[0], instants[-1], len(kills)) == (None, None, 20)
    assert kills == sorted(kills) and 0.6 * last < kills[-1] < last


def test_every_bit_counts(tmp_path: Path) -> None:
    tensors = {"a": torch.tensor([0.0, float("nan")]), "b": torch.tensor(1.0), "c": torch.ones(2)}
    for name in ("whole", "killed"):
        (tmp_path / name / "width").mkdir(parents=True)
        (tmp_path / name / "grid.json").write_text('{"rows": []}')
        save_file(tensors, tmp_path / name / "width" / "model.safetensors")
    runs = tmp_path / "whole", tmp_path / "killed"
    assert compare_runs(*runs) == {"width": [], "grid": []}
    other = {"a": torch.tensor([-0.0, float("nan")]), "b": tensors["b"].double(), "d": tensors["c"]}
    save_file(other, tmp_path / "killed" / "width" / "model.safetensors")
    (tmp_path / "killed" / "grid.json").write_text('{"rows": [1]}')
    assert compare_runs(*runs) == {"width": ["a", "b", "c", "d"], "grid": ["rows"]}
