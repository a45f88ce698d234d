"""The ablation: what runs, in which order, what a line holds, and that stopping loses nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertTokenizer

from benchmarks import ablation
from benchmarks.ablation import ELASTIC, TEACHER, Ablation, TaskSettings, full_passes, main
from benchmarks.records import read_rows
from dynabert import DynaBertModel, SubnetConfig
from dynabert.training import DynaBertTrainer, RunArguments
from tests.training.conftest import tiny_config, toy_examples

ALONE = ("alone w0.5-d1", "alone w1-d0.5", "alone w0.5-d0.5")
Command = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def one_thread(seeds_and_threads: None) -> None:
    """Tiny tensors: more threads only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``encoder``, a tiny pretrained network with its tokeniser, and ``SST-2``, a learnable task in
    that task's files."""
    folder = tmp_path_factory.mktemp("toy")
    torch.manual_seed(4)
    DynaBertModel(tiny_config(hidden_dropout_prob=0.1), add_pooling_layer=False).save_pretrained(
        folder / "encoder"
    )
    train, validation = toy_examples(80, seed=1), toy_examples(24, seed=2)
    words = sorted({word for row in (*train, *validation) for word in row.text.split()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    BertTokenizer(vocab={word: index for index, word in enumerate(vocabulary)}).save_pretrained(
        folder / "encoder"
    )
    (folder / "SST-2").mkdir()
    for name, rows in (("train", train), ("dev", validation)):
        lines = ["sentence\tlabel", *(f"{row.text} \t{row.label}" for row in rows)]
        (folder / "SST-2" / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def command(toy: Path, tmp_path: Path) -> Command:
    """``command(folder, more arguments)``: a run of every variant on the toy task."""

    def words(folder: str = "first", *more: str) -> list[str]:
        text = (
            f"run --data-dir {toy} --model {toy / 'encoder'} --out-dir {tmp_path / folder}/runs "
            f"--results {tmp_path / folder}/ablation.jsonl --tasks sst2 --seeds 1 --rows 48 "
            "--validation-rows sst2=16 --teacher-epochs 2 --epochs width=1,width-depth=2,final=1 "
            "--widths 1,1/2 --depths 1,1/2 --batch-size 8 --importance-rows 8 --num-sampled 1 "
            "--learning-rate 5e-3 --no-bf16 --threads 1"
        )
        return [*text.split(), *more]

    return words


def scores(path: Path) -> dict[str, dict[str, float]]:
    return {row["variant"]: row["scores"] for row in read_rows(path)}


@pytest.mark.slow
def test_every_variant_becomes_a_line(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(command()) == 0
    results = tmp_path / "first" / "ablation.jsonl"
    rows = {row["variant"]: row for row in read_rows(results)}
    assert list(rows) == ["teacher", *(variant.name for variant in ELASTIC), *ALONE]
    for name, row in rows.items():
        sizes = {"teacher": ["w1-d1"]}.get(name, [name.removeprefix("alone ")])
        if name in {variant.name for variant in ELASTIC}:
            sizes = ["w1-d1", "w0.5-d1", "w1-d0.5", "w0.5-d0.5"]
        assert list(row["scores"]) == sizes
        assert row["mean"] == pytest.approx(sum(row["scores"].values()) / len(sizes))
        assert (row["metric"], row["validation_rows"], row["seed"]) == ("accuracy", 16, 1)
        assert row["machine"]["threads"] == 1 and row["seconds"] > 0
    # 48 rows in batches of 8: 6 steps an epoch, and single sizes get as many as all stages.
    assert rows["rewiring+distillation"]["steps"] == 18
    assert rows["rewiring+distillation+final"]["steps"] == 24
    assert {rows[name]["steps"] for name in ALONE} == {18}
    assert str(tmp_path) not in results.read_text()
    assert not list((tmp_path / "first" / "runs").iterdir())
    assert "rewiring+labels" in results.with_suffix(".md").read_text()

    def refuse(*args: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(ablation, "run_stages", refuse)
    assert main(command()) == 0
    assert len(read_rows(results)) == len(rows)


class Interruption(Exception):
    """Stands for whatever ends a process in the middle of a variant."""


@pytest.mark.slow
def test_an_interrupted_variant_goes_on_to_the_same_scores(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = ("--variants", "rewiring+distillation", "rewiring+distillation+final")
    assert main(command("whole", *only)) == 0

    training_step = DynaBertTrainer.training_step

    def interrupted(self: DynaBertTrainer, *args: Any, **kwargs: Any) -> Any:
        if self._stage.name == "final" and self.state.global_step == 4:
            raise Interruption
        return training_step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(DynaBertTrainer, "training_step", interrupted)
        with pytest.raises(Interruption):
            main(command("parts", *only))
    runs = tmp_path / "parts" / "runs" / "sst2-1"
    assert sorted(path.name for path in runs.iterdir()) == ["rewiring+distillation", "teacher"]
    parts, whole = (tmp_path / name / "ablation.jsonl" for name in ("parts", "whole"))
    with parts.open("a") as stream:
        stream.write('{"task": "sst2", "var')  # torn by the crash
    assert main(command("parts", *only)) == 0
    assert scores(parts) == scores(whole)
    # Variants of this seed are still to do, so the teacher stays for them.
    assert [path.name for path in runs.iterdir()] == ["teacher"]


def test_nothing_is_begun_after_time_is_up(command: Command, tmp_path: Path) -> None:
    assert main(command("late", "--max-seconds", "0")) == 1
    assert not (tmp_path / "late" / "ablation.jsonl").exists()


def task_settings(**changes: Any) -> TaskSettings:
    values: dict[str, Any] = {
        "rows": 48,
        "teacher_rows": 64,
        "validation_rows": None,
        "teacher_epochs": 3.0,
        "width_epochs": 1.0,
        "width_depth_epochs": 2.0,
        "final_epochs": 1.0,
        "widths": (1.0, 0.5),
        "depths": (1.0, 0.5),
        "batch_size": 8,
        "learning_rate": 5e-5,
        "teacher_learning_rate": 3e-5,
        "importance_rows": 8,
        "num_sampled": 1,
        "bf16": None,
    }
    return TaskSettings(**{**values, **changes})


def make_ablation(toy: Path, results: Path, settings: Mapping[str, TaskSettings]) -> Ablation:
    return Ablation(toy / "encoder", toy, results.with_name("runs"), results, settings)


def test_a_stopped_run_has_all_tasks_of_the_first_seeds(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[tuple[str, int, list[str]]] = []

    def note(self: Ablation, task: str, seed: int, pending: list[Any], deadline: Any) -> bool:
        order.append((task, seed, [variant.name for variant in pending]))
        return len(order) < 3

    monkeypatch.setattr(Ablation, "_run_group", note)
    runs = make_ablation(
        toy, tmp_path / "a.jsonl", {"sst2": task_settings(), "cola": task_settings()}
    )
    assert not runs.run([7, 8], ["rewiring+labels", "alone"])
    names = ["rewiring+labels", *ALONE]
    assert order == [("sst2", 7, names), ("cola", 7, names), ("sst2", 8, names)]


def test_lines_of_other_settings_are_refused(toy: Path, tmp_path: Path) -> None:
    results = tmp_path / "a.jsonl"
    settings = json.loads(json.dumps(vars(task_settings())))
    row = {"task": "sst2", "variant": "teacher", "seed": 1, "settings": settings}
    results.write_text(json.dumps(row) + "\n")
    make_ablation(toy, results, {"sst2": task_settings(), "cola": task_settings(rows=9)})
    with pytest.raises(
        ValueError, match=r"holds sst2 with another rows, widths, expected the same"
    ):
        make_ablation(toy, results, {"sst2": task_settings(rows=9, widths=(1.0,))})


def test_variants_differ_in_what_their_name_says_only(tmp_path: Path) -> None:
    settings = task_settings()
    runs = {v.name: settings.arguments(tmp_path, 1, v) for v in settings.variants()}
    base = runs["rewiring+distillation"].to_dict()
    changed = {
        name: {key for key, value in run.to_dict().items() if value != base[key]}
        for name, run in runs.items()
    }
    assert changed == {
        "rewiring+distillation": set(),
        "rewiring+distillation+final": {"stages"},
        "rewiring+labels": {"distillation"},
        "no-rewiring+distillation": {"rewire"},
        "no-rewiring+labels": {"rewire", "distillation"},
        "rewiring+distillation+sandwich": {"subnet_sampling"},
        "alone w0.5-d1": {"stages", "widths", "depths", "final_epochs"},
        "alone w1-d0.5": {"stages", "widths", "depths", "final_epochs"},
        "alone w0.5-d0.5": {"stages", "widths", "depths", "final_epochs"},
    }
    assert {runs[name].final_epochs for name in ALONE} == {3.0}
    assert settings.arguments(tmp_path, 1, TEACHER).learning_rate == 3e-5


@pytest.mark.parametrize(
    ("sampling", "teacher", "passes"),
    [
        # Trained: 1, 1/2, 1/2, 1/4 of the network, three times each.
        ("all", None, 6.75),
        ("all", "full", 7.75),
        ("all", "same-width", 8.25),
        # 1, 1/4 and one of the two halves; its width is the full one or the small one's.
        ("sandwich", "same-width", 3 * 1.75 + 1.5),
        # 1 and one of 1/2, 1/2, 1/4; only the depth-half of full width adds no teacher of its own.
        ("sampled", "same-width", 3 * (1 + 1.25 / 3) + 1 + 0.5 * 2 / 3),
    ],
)
def test_passes_count_teacher_and_drawn_subnets(
    sampling: Any, teacher: str | None, passes: float
) -> None:
    run = RunArguments(Path("run"), subnet_sampling=sampling, num_sampled=1)
    subnets = [subnet.to_dict() for subnet in task_settings().grid]
    stage = {"subnets": subnets, "teacher": teacher, "steps": 10}
    assert full_passes(stage, run) == pytest.approx(10 * passes)


def test_passes_of_a_single_size_do_not_depend_on_sampling() -> None:
    run = RunArguments(Path("run"), subnet_sampling="sandwich")
    stage = {"subnets": [SubnetConfig(0.5, 0.5).to_dict()], "teacher": None, "steps": 4}
    assert full_passes(stage, run) == pytest.approx(4 * 3 * 0.25)


@pytest.mark.parametrize("rows", [["many"], ["sst2=5", "cola"], ["cola=5"]], ids=" ".join)
def test_numbers_by_task_must_name_every_task(command: Command, rows: list[str]) -> None:
    with pytest.raises(ValueError, match=r"--rows: '.*', expected one number, or TASK=NUMBER"):
        main(command("first", "--rows", *rows))
