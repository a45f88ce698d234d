"""Turns a finished training run into JSON lines: what was asked for, and what came out.

    python -m benchmarks.record_run RUN --name sst2-minilm --out benchmarks/results/sst2.jsonl

One row for the run, one per stage (with what rewiring alone did), one per subnet of the final grid,
with its latency where `dynabert latency RUN` has measured it.
Folders are left out, so a record says nothing of the machine but its hardware and versions.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.records import commit_of_checkout, describe_machine
from dynabert.json_file import read_json, write_bytes
from dynabert.latency_table import hardware_name
from dynabert.report import GridReport

_SCHEMA = 1
_FOLDERS = ("output_dir",)
_LATENCIES = ("median_ms", "p20_ms", "p80_ms")


def run_rows(run_dir: Path, name: str) -> list[dict[str, Any]]:
    """The rows of one run.

    Args:
        run_dir: Folder of a finished run.
        name: Name of the recipe, repeated in each row.

    Raises:
        FileNotFoundError: The run is not finished.
    """
    run = read_json(run_dir / "run.json", schema=_SCHEMA)
    grid = GridReport.load(run_dir / "grid.json")
    arguments = {key: value for key, value in run["arguments"].items() if key not in _FOLDERS}
    rows: list[dict[str, Any]] = [
        {
            "section": "run",
            "task": run["task"],
            "train_rows": run["data"]["train_rows"],
            "validation_rows": run["data"]["validation_rows"],
            "data_fingerprint": run["data"]["fingerprint"],
            "arguments": arguments,
            "grid_mean": grid.mean,
            "metric": grid.primary_metric,
            "latency_setting": grid.latency_setting,
            "machine": {
                **describe_machine("cpu"),
                "hardware": hardware_name(torch.device("cpu")),
                **run["versions"],
            },
            "commit": commit_of_checkout(),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }
    ]
    for stage in arguments["stages"]:
        record = read_json(run_dir / stage / "stage.json", schema=_SCHEMA)
        kept = ("teacher", "rewiring", "metrics", "steps", "seconds")
        rows.append({"section": "stage", "stage": stage, **{key: record[key] for key in kept}})
    for record in grid.to_json()["rows"]:
        subnet = record.pop("subnet")
        kept = ("metrics", "num_rows", "num_layers", "parameters", "flops", *_LATENCIES)
        rows.append(
            {
                "section": "grid",
                "width": subnet["width_mult"],
                "depth": subnet["depth_mult"],
                **{key: record[key] for key in kept},
            }
        )
    return [{"run": name, **row} for row in rows]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = run_rows(options.run, options.name)
    former = options.out.read_bytes() if options.out.exists() else b""
    added = "".join(json.dumps(row) + "\n" for row in rows).encode()
    write_bytes(options.out, former + added)
    print(f"{len(rows)} rows added to {options.out}")


if __name__ == "__main__":
    main()
