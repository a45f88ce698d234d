"""The command ``dynabert``: one file for each verb, all on the application in `_app`."""

from dynabert.cli import (
    augment,
    demo,
    doctor,
    evaluate,
    export,
    latency,
    pick,
    report,
    search,
    train,
)
from dynabert.cli._app import app

__all__ = [
    "app",
    "augment",
    "demo",
    "doctor",
    "evaluate",
    "export",
    "latency",
    "pick",
    "report",
    "search",
    "train",
]
