"""Does `pick` keep its budgets, how far is the predictor off, what is a search worth: on one run.

    python -m benchmarks.bench_pick RUN --data-dir DATA --out benchmarks/results/pick.jsonl

Works on a copy of RUN. Searches (`dynabert search`), which scores and times the uniform grid and
what it finds; draws budgets at random, picks for each, and measures the picked subnet afresh;
measures random subnets that the predictor has not seen. About eight minutes for six layers on two
threads of a quiet machine; `--work FOLDER` keeps the copy, and the same command goes on there.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.records import commit_of_checkout, describe_machine
from dynabert import DynaBertForSequenceClassification
from dynabert.json_file import read_json, write_bytes
from dynabert.latency import load_latency, measure_latency
from dynabert.latency_predictor import LatencyPredictor, PredictorError, random_subnets
from dynabert.latency_table import hardware_name
from dynabert.picking import MARGIN

_COPIED = ("run.json", "grid.json", "model")
_PERCENTILE = "p80"
_UNSEEN_SEED = 9  # the search draws from its own


def search(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Run `dynabert search` on the copy, and return its result."""
    arguments = ["search", str(work), "--data-dir", str(options.data_dir)]
    for name in ("trials", "search_rows", "threads", "seq_len", "seconds", "keep"):
        arguments += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    subprocess.run([sys.executable, "-m", "dynabert", *arguments], check=True)
    return read_json(work / "search" / "result.json", schema=1)


def budget_rows(
    model: DynaBertForSequenceClassification, work: Path, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Random budgets, the subnet picked for each, and its latency measured afresh."""
    timed = [row.at(_PERCENTILE) for row in load_latency(work / "latency.json", model=model).rows]
    draw = random.Random(options.seed)
    budgets = [draw.uniform(min(timed) * (1 + MARGIN), max(timed)) for _ in range(options.budgets)]
    rows = []
    for budget_ms in budgets:
        choice = model.pick(budget_ms=budget_ms, seq_len=options.seq_len, folder=work)
        (fresh,) = measure_latency(
            model,
            [choice.subnet],
            seq_len=options.seq_len,
            threads=options.threads,
            seconds_per_subnet=options.seconds,
            progress=False,
        ).rows
        rows.append(
            {
                "section": "budget",
                "budget_ms": budget_ms,
                "subnet": choice.subnet.name,
                "score": choice.primary,
                "table_p80_ms": choice.latency_ms,
                "fresh_median_ms": fresh.median_ms,
                "fresh_p80_ms": fresh.p80_ms,
                "fresh_over_table": fresh.p80_ms / choice.latency_ms,
                "is_within": fresh.p80_ms <= budget_ms,
            }
        )
    return rows


def predictor_rows(
    model: DynaBertForSequenceClassification, work: Path, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Predicted and measured latency of random subnets that the predictor has not seen."""
    predictor = LatencyPredictor.load(work / "search" / "predictor.json")
    table = measure_latency(
        model,
        random_subnets(model, options.unseen, seed=_UNSEEN_SEED),
        seq_len=options.seq_len,
        threads=options.threads,
        seconds_per_subnet=options.seconds,
        progress=False,
    )
    return [
        {
            "section": "predictor",
            "subnet": row.subnet.name,
            "predicted_ms": predictor.predict_ms(model.subnet_shape(row.subnet)),
            "median_ms": row.median_ms,
        }
        for row in table.rows
    ]


def run_rows(options: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """All rows of the benchmark, the summary first."""
    for name in _COPIED:
        source, target = options.run / name, work / name
        if not target.exists():
            (shutil.copytree if source.is_dir() else shutil.copy2)(source, target)
    found = search(options, work)
    torch.set_num_threads(options.threads)
    model = DynaBertForSequenceClassification.from_pretrained(
        work / "model", dtype=torch.float32
    ).eval()
    budgets = budget_rows(model, work, options)
    unseen = predictor_rows(model, work, options)
    error = PredictorError.of(
        [row["predicted_ms"] for row in unseen], [row["median_ms"] for row in unseen]
    )
    ratios = sorted(row["fresh_over_table"] for row in budgets)
    gain, subnets = found.pop("gain"), found.pop("subnets")
    found.pop("schema")
    summary = {
        "section": "summary",
        "budgets_kept": sum(row["is_within"] for row in budgets),
        "budgets": len(budgets),
        "margin": MARGIN,
        "fresh_over_table": {"least": ratios[0], "most": ratios[-1]},
        "predictor_error": asdict(error),
        "gain_mean": gain["best_mean"] - gain["uniform_mean"],
        **{f"{name}_mean": gain[f"{name}_mean"] for name in ("uniform", "best")},
        "search": found,
        "machine": {**describe_machine("cpu"), "hardware": hardware_name("cpu")},
        "commit": commit_of_checkout(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    return [
        summary,
        *({"section": "gain", **row} for row in gain["at"]),
        *({"section": "subnet", **row} for row in subnets),
        *budgets,
        *unseen,
    ]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run of texts to classify")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", default="sst2-minilm", help="repeated in each row")
    parser.add_argument("--work", type=Path, help="folder of the copy; default: a temporary one")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--budgets", type=int, default=20)
    parser.add_argument("--unseen", type=int, default=20, help="subnets to check the predictor on")
    parser.add_argument("--trials", type=int, default=320)
    parser.add_argument("--search-rows", type=int, default=1500)
    parser.add_argument("--keep", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=2.0, help="of measuring each subnet")
    parser.add_argument("--seed", type=int, default=0, help="draws the budgets")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        rows = [{"run": options.name, **row} for row in run_rows(options, work)]
    former = options.out.read_bytes() if options.out.exists() else b""
    write_bytes(options.out, former + "".join(json.dumps(row) + "\n" for row in rows).encode())
    summary = rows[0]
    error = summary["predictor_error"]
    print(
        f"{summary['budgets_kept']} of {summary['budgets']} budgets kept; predictor off by "
        f"{error['mean']:.1%} on average, {error['worst']:.1%} at most; score at equal latency "
        f"{summary['uniform_mean']:.4f} from the grid, {summary['best_mean']:.4f} with the search; "
        f"{len(rows)} rows added to {options.out}"
    )


if __name__ == "__main__":
    main()
