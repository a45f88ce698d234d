"""``python -m dynabert``: the same as the command ``dynabert``."""

from dynabert.cli import app

app(prog_name="dynabert")
