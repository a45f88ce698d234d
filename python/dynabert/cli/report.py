"""``dynabert report``: one HTML page with everything that is known about a trained model."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynabert.cli import _options as options
from dynabert.cli._app import JsonFile, app, finish
from dynabert.cli._place import ModelPlace

if TYPE_CHECKING:
    from dynabert.report_page import PeakFile

_log = logging.getLogger(__name__)


@app.command()
def report(
    place: options.Place,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The page to write; default: report.html in RUN."),
    ] = None,
    measure_peak: Annotated[
        bool,
        typer.Option(
            "--measure-peak",
            help="First measure what this machine can do at most, and the kernels alone, for the "
            "tables that were measured on it; kept in peak.json in RUN.",
        ),
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Write one HTML page: score against latency, the grid, shares of peak, how to repeat it.

    The page needs no network and no other file. It shows what RUN holds: grid.json, every table of
    latency.json, peak.json and run.json, none of which it needs.
    """
    from dynabert.cli._reproduce import latency_command, pick_command, run_commands
    from dynabert.json_file import read_json, write_bytes
    from dynabert.latency_file import check_latency_file
    from dynabert.report import GridReport, render_grid
    from dynabert.report_page import PeakFile, Sources, build_document, render_page

    where = ModelPlace.find(place)
    page = out or where.path / "report.html"
    if page.is_dir():
        raise ValueError(f"--out: {page} is a folder, expected the name of a file.")
    grid = GridReport.load(where.grid_json) if where.grid_json.exists() else None
    tables = check_latency_file(where.latency_json)
    model = where.load_model()
    peak_json = where.path / "peak.json"
    peaks = PeakFile.load(peak_json)
    if measure_peak:
        peaks = _measured(model, tables, peaks)
        peaks.save(peak_json)
    names = where.run["arguments"]["stages"] if where.run else []
    stages = [where.path / name / "stage.json" for name in names]
    sources = Sources(
        name=where.path.resolve().name,
        model=model,
        grid=grid,
        tables=tables,
        peaks=peaks,
        run=where.run,
        stages=[read_json(path, schema=1) for path in stages if path.exists()],
        commands=run_commands(where.run, place) if where.run else (),
        latency_command=partial(latency_command, place),
        pick_command=partial(pick_command, place),
    )
    document = build_document(sources)
    if measure_peak and _is_over(document):
        _log.warning(
            "the machine was busy: kernels outran the peak that was measured. Close other programs "
            "and measure again"
        )
    text = render_grid(grid, "text") if grid else "Nothing has been evaluated."
    # A name no encoding knows (an odd file name) is shown with a question mark.
    write_bytes(page, render_page(document, text).encode("utf-8", "replace"))
    shown = f"{len(document['subnets'])} subnets, {len(document['tables'])} latency tables"
    finish(f"{page}: {shown}", document, json_file)


def _is_over(document: dict[str, Any]) -> bool:
    """Whether something took less time than the peak allows."""
    rows = [row for table in document["tables"] for row in (*table["rows"], *table["kernels"])]
    return any(row["share"] is not None and row["share"] > 1.02 for row in rows)


def _measured(model: Any, tables: Any, former: PeakFile) -> PeakFile:
    """What was known of peaks and kernels, and what can be measured here and now."""
    from dynabert.latency_table import describe_model
    from dynabert.report_page import measure_peaks

    own = [table for table in tables if table.setting.model == describe_model(model)]
    if not own:
        _log.warning("no peak to measure: there is no latency yet. Run `dynabert latency` first")
    newer, missing = measure_peaks(model, own)
    for sentence in missing:
        _log.warning("%s", sentence)
    return former.merged(newer)
