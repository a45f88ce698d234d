"""Options that several verbs share, and how their values are written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynabert.data.tasks import TASK_NAMES
from dynabert.subnet import SubnetConfig

if TYPE_CHECKING:
    import torch

# Sections in the help of ``dynabert train``; the other verbs have one list.
DATA, METHOD = "Data", "Method"


def _data(help_text: str, *names: str, **details: Any) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel=DATA, **details)


Place = Annotated[
    Path, typer.Argument(metavar="RUN", help="Folder of a training run, or of a model.")
]
Task = Annotated[str, _data(f"One of {', '.join(TASK_NAMES)}.", metavar="NAME")]
DataDir = Annotated[
    Path | None,
    _data("Folder of GLUE's or SQuAD's official files, or the one own files are relative to."),
]
TrainFile = Annotated[
    Path | None, _data("Own files: a CSV, TSV, JSONL, CoNLL or SQuAD file to train on.")
]
ValidationFile = Annotated[
    Path | None, _data("Own files: one to validate on; default: held-out rows.")
]
TextColumn = Annotated[str, _data("Own files: column of the text; of words, a number or a key.")]
PairColumn = Annotated[str | None, _data("Own files: column of a second text.")]
LabelColumn = Annotated[
    str, _data("Own files: column of the label or tag; '' where there is none.")
]
FromHub = Annotated[bool, _data("Fetch GLUE through `datasets` if no --data-dir.", "--from-hub")]
Widths = Annotated[
    str | None,
    typer.Option(
        metavar="LIST", help="Widths of the grid, for instance 1,0.75,1/2.", rich_help_panel=METHOD
    ),
]
Depths = Annotated[
    str | None,
    typer.Option(
        metavar="LIST", help="Depths of the grid, for instance 1,2/3,1/2.", rich_help_panel=METHOD
    ),
]
BatchSize = Annotated[int, typer.Option(help="Sequences per forward pass.")]
SeqLen = Annotated[int, typer.Option(help="Tokens per sequence.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default: PyTorch's choice.")]
Device = Annotated[str, typer.Option(metavar="NAME", help="cpu or cuda.")]
Dtype = Annotated[str, typer.Option(metavar="NAME", help="float32, bfloat16, float16 or int8.")]
Backend = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Backend of every operator; default: chosen per call."),
]
Protocol = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="paper-gpu (100 batches of 128 x 128 on a GPU) or paper-cpu (1 x 128): values for the "
        "options that are not given.",
    ),
]
LengthsFrom = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Batches of sequences as long as the texts of a CSV, TSV or JSONL file, cut to "
        "--seq-len; --text-column and --pair-column name its columns.",
    ),
]
Subnets = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        help="These alone: WIDTHxDEPTH such as 0.5x1,1/4x1/2, or names such as h6.4-i512-l0.2.",
        rich_help_panel=METHOD,
    ),
]
Seconds = Annotated[float, typer.Option(help="Time to spend on each subnet, in seconds.")]


def parse_fractions(option: str, text: str | None) -> tuple[float, ...] | None:
    """``1,0.75,2/3`` as numbers; None for None.

    Raises:
        ValueError: A part is not a number in (0, 1].
    """
    if text is None:
        return None
    try:
        subnets = [SubnetConfig.parse(part) for part in text.split(",")]
        if any(subnet != SubnetConfig(subnet.width_mult) for subnet in subnets):
            raise ValueError("These are whole subnets.")
    except ValueError as error:
        raise ValueError(
            f"{option}: {text!r}, expected numbers in (0, 1] such as 1,0.75,1/2. ({error})"
        ) from error
    return tuple(subnet.width_mult for subnet in subnets)


def parse_subnets(text: str) -> list[SubnetConfig]:
    """Subnets by fractions or by name, between commas.

    Raises:
        ValueError: A part is neither.
    """
    try:
        return [SubnetConfig.parse(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--subnets: {text!r}, expected a list of subnets. ({error})") from error


def parse_device(name: str | None) -> str:
    """A device that is there; for None the GPU where there is one, else the CPU.

    Raises:
        ValueError: There is no such device.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    allowed = ["cpu", *(["cuda", *gpus] if gpus else [])]
    if name not in allowed:
        raise ValueError(f"--device: {name!r}, expected one of {', '.join(allowed)} here.")
    return name


def parse_dtype(name: str) -> torch.dtype:
    """The type a model is timed in by its name, as `measure_latency` takes it.

    Raises:
        ValueError: There is no such type.
    """
    import torch

    names = ("float32", "bfloat16", "float16", "int8")
    allowed: dict[str, torch.dtype] = {name: getattr(torch, name) for name in names}
    if name not in allowed:
        raise ValueError(f"--dtype: {name!r}, expected one of {', '.join(allowed)}.")
    return allowed[name]


def check_seq_len(seq_len: int, longest: int) -> None:
    """Refuse more tokens than a model has positions.

    Raises:
        ValueError: There are too many.
    """
    if seq_len > longest:
        raise ValueError(
            f"--seq-len: {seq_len}, expected at most {longest}. The model has no more positions."
        )


def parse_by_stage(option: str, text: str | None, names: Sequence[str]) -> dict[str, float]:
    """A number for every stage (``3``), or for some of them (``teacher=2,width=1``), by stage.

    Raises:
        ValueError: Not of that form, or not a stage.
    """
    if text is None:
        return {}
    try:
        if "=" not in text:
            return dict.fromkeys(names, float(text))
        pairs = [part.split("=") for part in text.split(",")]
        values = {name.strip(): float(value) for name, value in pairs}
    except ValueError:
        values = {"": 0.0}
    if not set(values) <= set(names):
        raise ValueError(
            f"{option}: {text!r}, expected one number or pairs such as {names[0]}=2. "
            f"The stages are {', '.join(names)}."
        )
    return values
