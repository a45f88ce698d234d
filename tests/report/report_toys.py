"""What the tests of the HTML page make pages of: a grid, tables, a peak."""

from __future__ import annotations

from typing import Any

import torch

from dynabert import DynaBertForSequenceClassification
from dynabert.data.examples import TaskSpec
from dynabert.evaluation import GridRow
from dynabert.latency import LatencyRow, LatencySetting, LatencyTable
from dynabert.latency_table import (
    automatic_backend,
    describe_model,
    hardware_name,
    package_versions,
)
from dynabert.report import GridReport, build_report
from dynabert.report_page import PeakFile, Sources
from dynabert.report_page.peaks import KernelRow, KernelTable, Peak
from dynabert.subnet import SubnetConfig, subnet_grid

GRID = [*subnet_grid(widths=(1.0, 0.5), depths=(1.0, 2 / 3, 1 / 3))]
UNEVEN = SubnetConfig(num_heads=(4, 1), intermediate_size=(7, 28), layers=(0, 2))
SUBNETS = [*GRID, UNEVEN]
SCORES = (0.90, 0.89, 0.895, 0.80, 0.70, 0.60, 0.897)
MEDIANS = (12.0, 8.0, 7.5, 5.0, 4.0, 3.0, 6.0)
EVIL = '</script><script>alert("x")</script><b id=evil>&amp;\u2028'
WHEN = "2026-01-01T00:00:00+00:00"


def setting_of(model: Any, /, **changes: Any) -> LatencySetting:
    return LatencySetting(
        **{
            "hardware": hardware_name("cpu"),
            "device": "cpu",
            "threads": 2,
            "backend": automatic_backend(torch.device("cpu")),
            "dtype": "float32",
            "batch_size": 3,
            "seq_len": 16,
            "model": describe_model(model),
            "versions": package_versions(),
            **changes,
        }
    )


def timed(setting: LatencySetting, factor: float = 1.0) -> LatencyTable:
    rows = [
        LatencyRow(subnet, ms, ms * 0.9, ms * 1.2, ms * 2, 50, 3e3 / ms, WHEN)
        for subnet, ms in zip(SUBNETS, (each * factor for each in MEDIANS), strict=True)
    ]
    return LatencyTable(setting, tuple(rows))


def toy_grid(model: DynaBertForSequenceClassification) -> GridReport:
    spec = TaskSpec("toy", "classification", ("text",), ("a", "b"), ("accuracy", "mcc"), "accuracy")
    rows = [
        GridRow(subnet, {"accuracy": score, "mcc": score / 2}, score, 41)
        for subnet, score in zip(SUBNETS, SCORES, strict=True)
    ]
    return build_report(model, rows, spec, seq_len=16)


def toy_sources(model: DynaBertForSequenceClassification) -> Sources:
    """A grid, tables of several settings, another machine and another model, and a peak."""
    here = setting_of(model)
    peak = Peak(here.hardware, "cpu", 2, "float32", 1e9, "a guess", WHEN)
    return Sources(
        name="runs/toy",
        model=model,
        grid=toy_grid(model),
        tables=[
            timed(here),
            timed(setting_of(model, batch_size=1), 0.5),
            timed(setting_of(model, dtype="int8"), 0.6),
            timed(setting_of(model, hardware="an abacus"), 30.0),
            timed(setting_of(model, model="another: 2 layers")),
        ],
        peaks=PeakFile((peak,), (KernelTable(here, (KernelRow("ffn", 28, 0.5, 10_000),)),)),
        pick_command=lambda setting: "dynabert pick runs/toy",
    )
