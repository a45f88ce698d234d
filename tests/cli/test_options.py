"""How values on the command line are read; the verbs themselves are in tests/test_cli.py."""

from pathlib import Path

import pytest
import torch

from dynabert.cli._options import (
    check_seq_len,
    parse_by_stage,
    parse_device,
    parse_dtype,
    parse_fractions,
)
from dynabert.cli.train import rows_to_load
from dynabert.data.examples import holdout_split
from dynabert.training.arguments import RunArguments


@pytest.mark.parametrize("train_rows", [1, 7, 8, 9, 17, 100, 1400, 20_000])
@pytest.mark.parametrize("importance_rows", [1, 10, 1000])
def test_rows_for_importance_come_on_top(
    tmp_path: Path, train_rows: int, importance_rows: int
) -> None:
    run_arguments = RunArguments(tmp_path, importance_rows=importance_rows)
    total = rows_to_load(train_rows, run_arguments)
    held_out = min(importance_rows, max(1, total // 10))  # what run_stages holds out
    assert len(holdout_split(range(total), held_out, seed=0)[0]) == train_rows
    from_dev = RunArguments(tmp_path, importance_source="dev")
    assert rows_to_load(train_rows, from_dev) == train_rows


def test_fractions_may_be_written_either_way() -> None:
    assert parse_fractions("--depths", "1, 2/3,0.667,.5") == (1.0, 2 / 3, 2 / 3, 0.5)
    assert parse_fractions("--depths", None) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, {}),
        ("3", {"a": 3.0, "b": 3.0}),
        ("a=1", {"a": 1.0}),
        ("b=0.5, a=2", {"a": 2.0, "b": 0.5}),
    ],
)
def test_numbers_by_stage(text: str | None, expected: dict[str, float]) -> None:
    assert parse_by_stage("--epochs", text, ("a", "b")) == expected


@pytest.mark.parametrize("text", ["", "x", "c=1", "a=1,b", "a=", "a=1=2", "1,2"])
def test_numbers_by_stage_refuse_other_forms(text: str) -> None:
    with pytest.raises(ValueError, match=r"--epochs: .*, expected one number or pairs such as a=2"):
        parse_by_stage("--epochs", text, ("a", "b"))


def test_device_and_dtype_are_those_of_this_machine() -> None:
    assert parse_device("cpu") == "cpu"
    assert parse_device(None) == ("cuda" if torch.cuda.is_available() else "cpu")
    assert parse_dtype("bfloat16") is torch.bfloat16
    with pytest.raises(ValueError, match="--device: 'cuda:99', expected one of cpu"):
        parse_device("cuda:99")
    with pytest.raises(ValueError, match="--dtype: 'int4', expected one of float32"):
        parse_dtype("int4")


def test_sequence_may_be_as_long_as_the_model_has_positions() -> None:
    check_seq_len(512, 512)
    with pytest.raises(ValueError, match="--seq-len: 513, expected at most 512"):
        check_seq_len(513, 512)
