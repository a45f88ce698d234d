"""``dynabert export``: a subnet as files that stand on their own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dynabert.cli import _options as options
from dynabert.cli._app import JsonFile, app, finish
from dynabert.cli._place import ModelPlace
from dynabert.subnet import SubnetConfig

if TYPE_CHECKING:
    from dynabert.export import ExportRecord


@app.command()
def export(
    place: options.Place,
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    format: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="hf: for AutoModel after `import dynabert`, any width; transformers: plain BERT "
            "or RoBERTa, all heads; onnx; torch-export: a .pt2 file.",
        ),
    ] = "hf",
    width: Annotated[
        str | None, typer.Option(metavar="SHARE", help="Width of the subnet, such as 0.5 or 2/3.")
    ] = None,
    depth: Annotated[
        str | None, typer.Option(metavar="SHARE", help="Depth of the subnet, such as 0.75 or 2/3.")
    ] = None,
    subnet: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The subnet by name, such as 0.5x0.75 or h6.4-i1024.512-l0.2."
        ),
    ] = None,
    budget_ms: Annotated[
        float | None,
        typer.Option(help="The best subnet within this latency, as `dynabert pick` chooses it."),
    ] = None,
    batch_size: options.BatchSize = 1,
    seq_len: options.SeqLen = 128,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what an earlier export made at --out.")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Extract a subnet, write it into a folder of its own, and check it against the model.

    The folder also holds the tokenizer, a model card and export.json. Which subnet: --width and
    --depth, or --subnet, or --budget-ms for the batch of --batch-size and --seq-len; by default the
    full network.
    """
    from dynabert.export import export_subnet, load_for_export

    ways = [width is not None or depth is not None, subnet is not None, budget_ms is not None]
    if sum(ways) > 1:
        raise ValueError(
            "--width and --depth, --subnet, --budget-ms: expected one of these. Name one subnet."
        )
    if subnet is not None:
        wanted = SubnetConfig.parse(subnet)
    else:
        wanted = SubnetConfig(_share("--width", width), _share("--depth", depth))
    where = ModelPlace.find(place)
    if budget_ms is not None:
        timed = where.load_model()  # as `dynabert latency` times it
        options.check_seq_len(seq_len, timed.config.max_seq_len)
        wanted = timed.pick(
            budget_ms=budget_ms, batch_size=batch_size, seq_len=seq_len, folder=where.path
        ).subnet
    model = load_for_export(where.model_dir)
    record = export_subnet(
        model, wanted, out, format=format, source=where.model_dir, overwrite=overwrite
    )
    finish(render_export(record, out), record.to_dict(), json_file)


def render_export(record: ExportRecord, out: Path) -> str:
    """What was written, where, and how well it agrees."""
    files = sorted(file.name for file in out.iterdir())
    error = f"differs by {record.check.max_error:.2g}" if record.check.max_error else "equals"
    return (
        f"{out}: {record.subnet.name} as {record.format}, {error} "
        f"{'from ' if record.check.max_error else ''}{record.check.compared_with}\n"
        f"  {', '.join(files)}"
    )


def _share(option: str, text: str | None) -> float:
    (share,) = options.parse_fractions(option, text) or (1.0,)
    return share
