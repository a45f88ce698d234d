"""The application the verbs register with: one-line errors, logs on stderr, results on stdout."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import transformers
import typer
from huggingface_hub.errors import StrictDataclassError
from typer.core import TyperGroup

from dynabert.json_file import write_json

# What bad input raises in the floors below; each carries a sentence for the user.
_USER_ERRORS = (
    ValueError,
    TypeError,
    OSError,
    ImportError,
    NotImplementedError,
    FloatingPointError,
    StrictDataclassError,
)

_VERBS = (
    *("demo", "augment", "train", "evaluate", "latency", "search", "pick"),
    *("export", "report", "doctor"),
)


class _Group(TyperGroup):
    """Turns the library's errors into one line on stderr and exit code 2."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=_VERBS.index)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("dynabert: interrupted. The same command goes on from here.", err=True)
            raise typer.Exit(130) from None
        except _USER_ERRORS as error:
            if ctx.params.get("traceback") or isinstance(error, BrokenPipeError):
                raise
            # A checked configuration wraps its sentence in two lines about the validator.
            told = error.__cause__ if isinstance(error, StrictDataclassError) else error
            typer.echo(f"dynabert: error: {told or error}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    name="dynabert",
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Train, evaluate and time BERT-family encoders whose width and depth are chosen per call.",
)


@app.callback()
def main(
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show the Python traceback of an error.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Log warnings only.")] = False,
) -> None:
    """Results go to stdout, logs and progress bars to stderr."""
    # Bars for every file read and written would bury those of training.
    transformers.utils.logging.disable_progress_bar()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("dynabert: %(message)s"))
    logger = logging.getLogger("dynabert")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.WARNING if quiet else logging.INFO)


def _writable(path: Path | None) -> Path | None:
    """Refuse a path no file can be written to now, rather than when hours have been spent."""
    if path is not None:
        parent = next(folder for folder in path.absolute().parents if folder.exists())
        if path.is_dir() or not parent.is_dir():
            raise ValueError(f"--json: {path}, expected the name of a file in a folder.")
    return path


JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        help="Also write the result to FILE, as JSON.",
        callback=_writable,
    ),
]


def finish(text: str, document: dict[str, Any], json_file: Path | None) -> None:
    """Print a verb's result and, where asked for, write it as JSON, whole or not at all."""
    if json_file is not None:
        write_json(json_file, document)
    typer.echo(text)
