"""``dynabert doctor``: what runs on this machine, and why the rest does not."""

from __future__ import annotations

from dynabert.cli._app import JsonFile, app, finish


@app.command()
def doctor(json_file: JsonFile = None) -> None:
    """Show versions, instruction sets, and each operator's backends or the reason against them."""
    from dynabert_kernels.doctor import doctor_report, format_report

    report = doctor_report()
    finish(format_report(report), report, json_file)
