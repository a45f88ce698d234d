"""Short tables from the GPU rows: a pivot per question, repeats joined as "first|second"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.records import format_table

Row = dict[str, Any]
Text = Callable[[Row], str]


def pivot(rows: list[Row], line: Text, column: Text, value: Text) -> str:
    """A table with one line per `line`, one column per `column`, in order of appearance."""
    lines: dict[str, dict[str, list[str]]] = {}
    columns: dict[str, None] = {}
    for row in rows:
        if "median_ms" in row:
            columns.setdefault(column(row))
            lines.setdefault(line(row), {}).setdefault(column(row), []).append(value(row))

    def cell(name: str) -> Text:
        return lambda entry: "|".join(entry["cells"].get(name, ["-"])[:2])

    entries = [{"line": name, "cells": cells} for name, cells in lines.items()]
    table = {"": (lambda entry: entry["line"])} | {name: cell(name) for name in columns}
    return format_table(entries, table)


def _text(row: Row, field: str, scale: float = 1.0, digits: int = 0) -> str:
    value = row.get(field)
    return "-" if value is None else f"{value * scale:.{digits}f}"


def _short(peer: str) -> str:
    """ "P1", "P2b", "ours graph"."""
    return peer if peer.startswith("ours") else peer.split()[0]


def _microseconds(row: Row) -> str:
    return _text(row, "median_ms", 1e3, 1)


def summarize(rows: list[Row]) -> str:
    """All tables as one text, errors last."""

    def where(section: str, *cases: str, **fields: Any) -> list[Row]:
        return [
            row
            for row in rows
            if row["section"].startswith(section)
            and (not cases or row["case"] in cases)
            and all(row.get(name) == value for name, value in fields.items())
        ]

    def shape(row: Row, name: str) -> Any:
        return row.get("shape", {}).get(name)

    parts = []

    def add(title: str, table: str) -> None:
        if table.count("\n"):
            parts.append(f"{title}\n{table}")

    ceilings = [row for row in rows if row.get("ceiling")]
    add(
        "Ceilings (TFLOP/s; GB/s for copy)",
        pivot(
            ceilings,
            lambda row: "rate",
            lambda row: row["ceiling"],
            lambda row: _text(row, "tflops") if "tflops" in row else _text(row, "gbps"),
        ),
    )
    other = where(
        "A",
        "fill",
        "sum",
        "gemm_sustained",
        "graph_node",
        "graph_of_one",
        "graph_replay_and_wait",
        "eager_launch",
    )
    parts.append(
        "  ".join(
            f"{r['case']} "
            + (
                f"{r['tflops']:.0f} TF/s [{r.get('smi')}]"
                if "tflops" in r
                else f"{r['gbps']:.0f} GB/s"
                if "gbps" in r
                else f"{r['median_ms'] * 1e3:.2f} us"
            )
            for r in other
            if "median_ms" in r
        )
    )
    gemms = [row for row in where("B") if row.get("shape", {}).get("model") != "bert-large"]
    tokens = sorted({shape(row, "M") for row in gemms if shape(row, "M")}, reverse=True)
    for count in tokens[:1] + tokens[-1:]:  # the rest is in the record
        chosen = [r for r in gemms if shape(r, "M") == count and r.get("l2") == "cold"]
        large = count == tokens[0]
        add(
            f"Projections, M={count}, cold L2, {'TFLOP/s' if large else 'us'}",
            pivot(
                chosen,
                lambda row: f"{row['case']} {row['subnet']}",
                lambda row: row["peer"],
                (lambda row: _text(row, "tflops")) if large else _microseconds,
            ),
        )
    for case in ("forward", "forward_backward", "ragged_forward"):
        add(
            f"Attention {case}, us",
            pivot(
                where("C", case),
                lambda row: f"S{shape(row, 'S') or ''} H{shape(row, 'H')}",
                lambda row: row["peer"].replace("masked_", "m_"),
                _microseconds,
            ),
        )
    large = [r for r in where("D") if r["case"].startswith("batch") and shape(r, "B") != 1]
    for suffix, title in (("", "device ms per batch"), ("_x100", "ms per batch over 100, host")):
        chosen = [row for row in large if row["case"].endswith("_x100") == bool(suffix)]
        add(
            f"Encoder, large batch, {title}",
            pivot(
                chosen,
                lambda row: row["subnet"],
                lambda row: row["peer"],
                lambda row: _text(row, "median_ms", 1, 3),
            ),
        )
    add(
        "Encoder, batch 1, us",
        pivot(
            [r for r in where("D", "batch1")],
            lambda row: row["subnet"],
            lambda row: f"{_short(row['peer'])} {row.get('l2')}",
            _microseconds,
        ),
    )
    add(
        "Short texts, thousand real tokens per second",
        pivot(
            where("D", "short_texts"),
            lambda row: (
                f"{row['peer']} S{shape(row, 'S')} {row['sdpa']}"
                + (" host" if "clock" in row else "")
            ),
            lambda row: row["subnet"],
            lambda row: _text(row, "tokens_per_s", 1e-3),
        ),
    )
    add(
        "Mixed widths, ms",
        pivot(
            where("D", "mixed_widths"),
            lambda row: row["peer"],
            lambda row: "ms",
            lambda row: _text(row, "median_ms", 1, 3),
        ),
    )
    add(
        "Training step, ms",
        pivot(
            where("E", "fine_tuning", "width_stage", "depth_stage"),
            lambda row: row["case"],
            lambda row: row["peer"],
            lambda row: _text(row, "median_ms", 1, 2),
        ),
    )
    products = where("F")
    for model in dict.fromkeys(row["model"] for row in products if "model" in row):
        add(
            f"Products with their epilogues, {model}, cold L2, us",
            pivot(
                [row for row in products if row.get("model") == model],
                lambda row: f"{row['case']} {row['subnet']}",
                lambda row: row["peer"],
                _microseconds,
            ),
        )
    failed: dict[str, int] = {}
    for row in rows:
        if "error" in row:
            text = f"{row['section']} {row['case']} {row.get('peer', '')}: {row['error'][:110]}"
            failed[text] = failed.get(text, 0) + 1
    lines = [f"{len(rows)} rows, {sum(failed.values())} without a timing"]
    parts.append("\n".join(lines + [f"  {n} x {text}" for text, n in list(failed.items())[:15]]))
    return "\n\n".join(part for part in parts if part)
