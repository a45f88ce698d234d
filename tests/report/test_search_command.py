"""``dynabert search`` on a tiny model: what it adds to the grid, and how it goes on."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import BertTokenizer
from typer.testing import CliRunner

from dynabert import DynaBertConfig, DynaBertForSequenceClassification, latency_predictor
from dynabert.cli import app
from dynabert.cli._place import ModelPlace
from dynabert.cli._scoring import rows_like, rows_not_learned
from dynabert.data.collators import DynamicPadCollator, encode
from dynabert.data.examples import Example
from dynabert.data.tasks import load_task
from dynabert.evaluation import evaluate_grid
from dynabert.latency import LatencyRow, LatencySetting, LatencyTable, load_latency
from dynabert.latency_predictor import LatencyPredictor, OpTable, PredictorError
from dynabert.latency_table import describe_model, hardware_name, package_versions
from dynabert.report import GridReport
from dynabert.search import JOURNAL
from dynabert.subnet import SubnetConfig
from dynabert.training.arguments import RunArguments
from dynabert.training.problems import PreparedTask

pytest.importorskip("optuna", reason="the extra `search` is not installed")

ADJECTIVES = {"good": "positive", "great": "positive", "bad": "negative", "awful": "negative"}
NOUNS = ("film", "plane", "food", "book", "room", "song", "play", "pen", "tree")


class Tiny(NamedTuple):
    model: Path
    train: Path
    validation: Path


@pytest.fixture(autouse=True)
def no_leftover_handlers() -> Iterator[None]:
    yield
    logging.getLogger("dynabert").handlers.clear()


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A classifier of four layers of four heads, its tokeniser, 36 training and 9 other rows."""
    folder = tmp_path_factory.mktemp("search")
    model = folder / "model"
    model.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", "was", *ADJECTIVES, *NOUNS]
    (model / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizer.from_pretrained(model).save_pretrained(model)
    torch.manual_seed(1)
    config = DynaBertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=12,
        initializer_range=0.5,
        id2label={0: "negative", 1: "positive"},
        label2id={"negative": 0, "positive": 1},
    )
    DynaBertForSequenceClassification(config).save_pretrained(model)
    rows = [f"{{}} {n} was {a},{label}\n" for n in NOUNS for a, label in ADJECTIVES.items()]
    train, validation = folder / "train.csv", folder / "validation.csv"
    train.write_text("text,label\n" + "".join(rows).format(*["the"] * len(rows)))
    validation.write_text("text,label\n" + "".join(rows[::4]).format(*["a"] * 9))
    return Tiny(model, train, validation)


@pytest.fixture
def tiny(originals: Tiny, tmp_path: Path) -> Tiny:
    """The same with a model of one's own, to change at will."""
    shutil.copytree(originals.model, tmp_path / "model")
    return originals._replace(model=tmp_path / "model")


def true_ms(model: Any, subnet: SubnetConfig) -> float:
    layers = model.subnet_shape(subnet).layers
    return 1.0 + sum(layer.num_heads + layer.intermediate_size / 16 for layer in layers)


@pytest.fixture
def stopwatch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Latency from sizes in the place of a clock; how many subnets were measured each time."""
    measured: list[int] = []

    def setting(model: Any, asked: dict[str, Any]) -> LatencySetting:
        return LatencySetting(
            hardware=hardware_name("cpu"),
            device="cpu",
            threads=asked["threads"],
            backend="auto (cpu)",
            dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
            batch_size=asked["batch_size"],
            seq_len=asked["seq_len"],
            model=describe_model(model),
            versions=package_versions(),
        )

    def measure(model: Any, subnets: Sequence[SubnetConfig], **asked: Any) -> LatencyTable:
        measured.append(len(subnets))
        times = [(subnet, true_ms(model, subnet)) for subnet in subnets]
        rows = [LatencyRow(s, ms, ms, ms + 0.25, ms, 20, 1.0, "2026-01-01") for s, ms in times]
        return LatencyTable(setting(model, asked), tuple(rows))

    def build(model: Any, *, seconds: float, **asked: Any) -> tuple[LatencyPredictor, None]:
        measured.append(0)
        counts = tuple(range(16, 65, 16))
        tables = (
            OpTable((1, 2, 3, 4), (1.0, 2.0, 3.0, 4.0)),
            OpTable(counts, tuple(count / 16 for count in counts), 16),
        )
        constants = (1.0, 0.0, 1.0, 1.0)
        error = PredictorError(7, 0.01, 0.02)
        return LatencyPredictor(setting(model, asked), *tables, *constants, error), None

    monkeypatch.setattr("dynabert.report.plot_pareto", lambda *_: None)  # takes a second
    monkeypatch.setattr("dynabert.latency.measure_latency", measure)
    monkeypatch.setattr(latency_predictor, "build_predictor", build)
    return measured


def command(tiny: Tiny, *more: str | Path, trials: int = 40) -> list[str]:
    options: list[str | Path] = ["search", tiny.model, "--task", "file"]
    options += ["--train-file", tiny.train, "--validation-file", tiny.validation]
    options += ["--seq-len", "7", "--threads", "1", "--trials", str(trials)]
    return [*map(str, options), *map(str, more)]


def run(arguments: Sequence[str]) -> tuple[str, str]:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.stderr
    return result.stdout, result.stderr


def refused(arguments: Sequence[str]) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert (result.exit_code, result.stdout) == (2, "")
    return str(result.stderr.strip().splitlines()[-1])


def evaluate(tiny: Tiny, examples: Sequence[Any], subnets: Sequence[SubnetConfig]) -> list[float]:
    """Scores as a user would get them in Python."""
    model = DynaBertForSequenceClassification.from_pretrained(tiny.model)
    tokenizer = BertTokenizer.from_pretrained(tiny.model)
    spec = load_task("file", train_file=tiny.train, validation_file=tiny.validation).spec
    rows = encode(examples, tokenizer, 12)
    grid = evaluate_grid(model, rows, DynamicPadCollator(tokenizer), spec, subnets)
    return [row.primary for row in grid]


def test_what_is_found_joins_the_grid_and_can_be_picked(
    tiny: Tiny, stopwatch: list[int], tmp_path: Path
) -> None:
    out, err = run(command(tiny, "--search-rows", "40", "--keep", "4", "--json", tmp_path / "s"))
    document = json.loads((tmp_path / "s").read_text())
    assert "searching on 36 training rows, from which the model may have learned" in err
    assert "the same rows chose among the best" in out
    assert document["trials"] == 40
    assert document["report_rows"] == 9
    assert document["predictor_error_on_these"]["worst"] < 1e-9
    report = GridReport.load(tiny.model / "grid.json")
    uneven = [row for row in report.rows if not row.is_uniform]
    assert 1 <= len(uneven) <= 4
    assert len(report.rows) == len(uneven) + 9 + 3  # widths 1, 3/4, 1/2, 1/4 x depths 1, 3/4, 1/2
    data = load_task("file", train_file=tiny.train, validation_file=tiny.validation)
    subnets = [row.subnet for row in report.rows]
    assert [row.primary for row in report.rows] == evaluate(tiny, data.validation, subnets)
    table = load_latency(tiny.model / "latency.json")
    assert {row.subnet.name for row in table.rows} == {subnet.name for subnet in subnets}
    # Chosen on other rows than reported on.
    rows = {SubnetConfig.from_dict(row["subnet"]).name: row for row in document["subnets"]}
    assert sorted(rows) == sorted(subnet.name for subnet in subnets)
    on_train = evaluate(tiny, data.train, subnets)
    assert [rows[subnet.name]["choice_score"] for subnet in subnets] == on_train
    assert [rows[row.subnet.name]["score"] for row in report.rows] == [
        row.primary for row in report.rows
    ]
    assert f"all between  {document['gain']['uniform_mean']:.4f}" in out
    chosen = max(uneven, key=lambda row: row.primary)
    budget = str((chosen.p80_ms or 0) * 1.05 + 1e-6)
    picked = tmp_path / "picked.json"
    pick = ["pick", str(tiny.model), "--budget-ms", budget, "--json", str(picked)]
    run([*pick, "--seq-len", "7", "--threads", "1"])
    assert json.loads(picked.read_text())["primary"] >= chosen.primary
    assert stopwatch == [0, len(subnets)]  # pick measured nothing


def test_the_same_command_goes_on_with_what_is_there(tiny: Tiny, stopwatch: list[int]) -> None:
    run(command(tiny, trials=9))
    journal = tiny.model / "search" / JOURNAL
    before = journal.read_text().splitlines()
    run(command(tiny, trials=17))
    after = journal.read_text().splitlines()
    assert after[: len(before)] == before
    assert sum('"values":[' in line for line in before) == 9
    assert sum('"values":[' in line for line in after) == 17
    assert stopwatch.count(0) == 1  # the predictor is measured once
    out, _ = run(command(tiny, "--join", trials=20))
    assert out == "20 trials are done.\n"
    run(command(tiny, "--overwrite", trials=2))
    assert sum('"values":[' in line for line in journal.read_text().splitlines()) == 2


def test_another_search_is_refused_and_costs_nothing(tiny: Tiny, stopwatch: list[int]) -> None:
    run(command(tiny, trials=2))
    before = (tiny.model / "search" / JOURNAL).read_text()
    assert "holds a search with another seed" in refused(command(tiny, "--seed", "1"))
    line = refused(command(tiny, "--batch-size", "2"))
    assert "measured with batch_size=1 and not 2" in line
    assert "Use --overwrite, or --folder" in line
    (tiny.model / "search" / "notes.txt").write_text("mine")
    assert "holds notes.txt, expected a search alone" in refused(command(tiny, "--overwrite"))
    assert (tiny.model / "search" / JOURNAL).read_text().startswith(before)
    assert (tiny.model / "search" / "notes.txt").read_text() == "mine"
    apart = ["--batch-size", "2", "--folder", tiny.model / "other", "--search-rows", "12"]
    out, _ = run(command(tiny, *apart, trials=2))
    assert "on 12 training rows, from which the model may have learned" in out
    assert "24 others of these chose among the best" in out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--trials", "0"), "--trials: 0, expected 1 or more"),
        (("--workers", "0"), "--workers: 0, expected 1 or more"),
        (("--threads", "0"), "--threads: 0, expected 1 or more"),
        (("--seq-len", "13"), "--seq-len: 13, expected at most 12"),
        (("--dtype", "int3"), "--dtype: 'int3', expected one of float32"),
        (("--join",), "predictor.json is missing, expected a search that has begun"),
        (("--train-file", "nowhere.csv"), "nowhere.csv, expected an existing file"),
        (("--task", "stdlib"), "task='stdlib' with train_file, validation_file"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_refused_in_a_line(tiny: Tiny, more: tuple[str, ...], message: str) -> None:
    assert message in refused(command(tiny, *more))
    assert not (tiny.model / "search").exists()
    assert not (tiny.model / "grid.json").exists()


def test_own_files_need_the_training_file(tiny: Tiny) -> None:
    arguments = ["search", str(tiny.model), "--task", "file"]
    arguments += ["--validation-file", str(tiny.validation)]
    assert "--train-file is missing" in refused(arguments)


@pytest.mark.parametrize("max_train_rows", [None, 25])
def test_rows_not_learned_are_those_the_run_left_out(
    tiny: Tiny, tmp_path: Path, max_train_rows: int | None
) -> None:
    def load(**choice: Any) -> Any:
        files = {"train_file": tiny.train, "validation_file": tiny.validation}
        return load_task("file", **files, **choice)

    arguments = RunArguments(tmp_path / "run", seed=5, importance_rows=2)
    data = load(max_train_rows=max_train_rows, seed=5)
    document = {
        "arguments": {"seed": 5, "importance_source": "holdout", "importance_rows": 2},
        "data": {"train_rows": len(data.train), "fingerprint": data.fingerprint},
    }
    where = ModelPlace(tmp_path, tiny.model, document)
    train = load(seed=5).train
    rows = rows_not_learned(where, train, load)
    assert rows is not None
    tokenizer = BertTokenizer.from_pretrained(tiny.model)
    prepared = PreparedTask(str(tiny.model), data, tokenizer, arguments)
    learned = {tuple(row["input_ids"]) for row in prepared.train_rows}
    unseen = {tuple(row["input_ids"]) for row in encode(rows, tokenizer, 12)}
    every = {tuple(row["input_ids"]) for row in encode(train, tokenizer, 12)}
    assert learned | unseen == every
    assert not learned & unseen
    assert len(unseen) == (2 if max_train_rows is None else 36 - 25 + 2)


def test_rows_of_an_unknown_run_are_not_told(tiny: Tiny, tmp_path: Path) -> None:
    train = [Example(f"row {index}", None, index % 2) for index in range(9)]

    def load(**choice: Any) -> Any:
        return load_task("file", train_file=tiny.train, validation_file=tiny.validation, **choice)

    assert rows_not_learned(ModelPlace(tmp_path, tiny.model, None), train, load) is None
    document = {
        "arguments": {"seed": 5, "importance_source": "holdout", "importance_rows": 2},
        "data": {"train_rows": 7, "fingerprint": "of other files"},
    }
    assert rows_not_learned(ModelPlace(tmp_path, tiny.model, document), train, load) is None


def test_rows_are_chosen_to_be_as_long_as_others() -> None:
    pool = [Example("x" * (1 + index % 40), None, index) for index in range(800)]
    others = [Example("y" * length, None, 0) for length in (5, 5, 20, 33, 39)]
    rows = rows_like(pool, others, 100, seed=1)
    lengths = [len(row.text) for row in rows if isinstance(row, Example)]
    # Of each length there are 20, so the fifth of the rows that a length is for are all so long.
    assert [lengths.count(length) for length in (5, 6, 20, 33, 39)] == [20, 20, 20, 20, 20]
    assert len(set(rows)) == 100
    assert sorted(lengths[:50]) != sorted(lengths)[:50]  # shuffled
    assert rows == rows_like(pool, others, 100, seed=1) != rows_like(pool, others, 100, seed=2)
    long = [Example("z" * 99, None, 0)]
    longest = rows_like(pool, long, 30, seed=1)
    assert sorted(len(row.text) for row in longest if isinstance(row, Example))[0] == 39
    assert sorted(map(id, rows_like(pool, others, 900, seed=1))) == sorted(map(id, pool))


def trials_of(folder: Path) -> int:
    journal = folder / JOURNAL
    return journal.read_bytes().count(b'"values":[') if journal.exists() else 0


def wait_for_trials(folder: Path, goal: int, process: subprocess.Popen[Any]) -> None:
    while trials_of(folder) < goal:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.02)
        assert process.poll() is None, "it ended too early"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_search_goes_on(tiny: Tiny, tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "dynabert", *command(tiny, "--seconds", "0.02", trials=64)]
    folder = tiny.model / "search"
    for goal in (1, 24):
        with subprocess.Popen(arguments, stderr=subprocess.DEVNULL) as process:
            wait_for_trials(folder, goal, process)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    assert trials_of(folder) < 64
    predictor = (folder / "predictor.json").read_bytes()
    report = tmp_path / "report.json"
    done = subprocess.run([*arguments, "--json", report], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert trials_of(folder) == 64
    assert (folder / "predictor.json").read_bytes() == predictor
    document = json.loads(report.read_text())
    assert document["trials"] == 64


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_several_workers_and_one_that_is_killed(tiny: Tiny) -> None:
    folder = tiny.model / "search"
    base = [sys.executable, "-m", "dynabert", *command(tiny, "--seconds", "0.02", trials=96)]
    with subprocess.Popen([*base, "--workers", "2"], stderr=subprocess.PIPE, text=True) as leader:
        wait_for_trials(folder, 1, leader)
        with subprocess.Popen([*base, "--join"], stderr=subprocess.DEVNULL) as joined:
            wait_for_trials(folder, 40, leader)
            joined.kill()
        assert leader.stderr is not None
        log = leader.stderr.read()
        assert leader.wait() == 0, log
    assert 96 <= trials_of(folder) <= 96 + 2 * 8
    names = [row.subnet.name for row in GridReport.load(tiny.model / "grid.json").rows]
    assert len(names) == len(set(names)) > 12
