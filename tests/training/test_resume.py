"""A run killed at any instant goes on to the bits of one that was never stopped."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dynabert import DynaBertModel
from dynabert.data.examples import TaskData
from dynabert.training import RunArguments
from tests.training.killed_runs import Kill, attempt, progress, result

STAGES = ("teacher", "width", "width-depth", "final")


@pytest.fixture
def model_dir(make_encoder: Callable[..., DynaBertModel], tokenizer: Any, tmp_path: Path) -> Path:
    """An encoder with dropout and its tokeniser."""
    folder = tmp_path / "bert"
    make_encoder(seed=4, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return folder


def arguments(output_dir: Path) -> RunArguments:
    """Five steps to an epoch; the teacher stops in the middle of its second, the last stage in the
    middle of its first."""
    return RunArguments(
        output_dir,
        stages=STAGES,
        widths=(1.0, 0.5),
        learning_rate=5e-3,
        warmup_ratio=0.2,
        batch_size=8,
        max_length=24,
        importance_rows=4,
        teacher_epochs=1.4,
        width_epochs=2,
        width_depth_epochs=1,
        final_epochs=0.6,
        subnet_sampling="sampled",
        num_sampled=1,
        bf16=False,
        use_cpu=True,
        logging_steps=3,
        save_steps=2,
        progress=False,
    )


def kills(count: int, seconds: float, num_changes: int, seed: int) -> Iterator[Kill]:
    """Without end, in rounds of `count`: half of each at random times, half at changes to the disk
    that are spread over a whole run; in random order."""
    generator = random.Random(seed)
    while True:
        half = count // 2
        drawn = [Kill(seconds=generator.uniform(0, seconds)) for _ in range(count - half)]
        for place in range(half):
            change = int((place + generator.random()) / half * num_changes)
            drawn.append(Kill(change=change))
        generator.shuffle(drawn)
        yield from drawn


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("num_kills", [6, 200])
def test_killed_runs_give_the_bits_of_the_uninterrupted_one(
    num_kills: int, model_dir: Path, make_data: Callable[..., TaskData], tmp_path: Path
) -> None:
    data = make_data(num_train=40, num_val=12)
    attempt(model_dir, data, arguments(tmp_path / "first"), Kill())
    whole = attempt(model_dir, data, arguments(tmp_path / "whole"), Kill())
    expected = result(tmp_path / "whole")
    assert len([name for name in expected if name.startswith("weights")]) == len(STAGES) + 1
    assert result(tmp_path / "first") == expected

    planned = kills(num_kills, whole.seconds, whole.num_changes, seed=num_kills)
    done, run_dir, reached = 0, tmp_path / "killed-0", (0, 0)
    while done < num_kills or run_dir.exists():
        kill = next(planned) if done < num_kills else Kill()
        if attempt(model_dir, data, arguments(run_dir), kill).was_killed:
            done += 1
            assert progress(run_dir, STAGES) >= reached, kill
            reached = progress(run_dir, STAGES)
        else:
            assert result(run_dir) == expected, run_dir
            assert not [path.name for path in run_dir.iterdir() if path.name.startswith(".")]
            run_dir, reached = tmp_path / f"killed-{done}", (0, 0)
