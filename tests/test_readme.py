"""The README keeps its word: its Python runs, its commands exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

CHECKOUT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    p.relative_to(CHECKOUT).as_posix()
    for p in (*CHECKOUT.glob("*.md"), *(CHECKOUT / "docs").rglob("*.md"))
)


def blocks(language: str) -> list[str]:
    """Code blocks of the README whose info string is exactly `language`."""
    text = (CHECKOUT / "README.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(program: str) -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.split()[:1] == [program]]


@pytest.mark.parametrize("number", range(len(blocks("python runnable"))))
def test_python_block_runs(number: int) -> None:
    code = blocks("python runnable")[number]
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_there_is_python_to_run() -> None:
    assert len(blocks("python runnable")) >= 2
    assert not blocks("python"), "a Python block that no test runs: mark it `python runnable`"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (CHECKOUT / "Makefile").read_text(), re.MULTILINE))
    named = [word for words in commands("make") for word in words if "=" not in word]
    assert named
    assert set(named) <= targets


def test_every_make_target_is_phony_and_explained() -> None:
    text = (CHECKOUT / "Makefile").read_text()
    phony = set(re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE).group(1).split())
    assert phony == set(re.findall(r"^([a-z-]+):.*## ", text, re.MULTILINE))


def test_verbs_and_their_options_exist() -> None:
    from dynabert.cli import app

    verbs = typer.main.get_command(app).commands
    named = commands("dynabert")
    assert named
    for verb, *arguments in named:
        assert verb in verbs, verb
        options = {option for parameter in verbs[verb].params for option in parameter.opts}
        used = {argument for argument in arguments if argument.startswith("--")}
        assert used <= options, f"dynabert {verb}: {sorted(used - options)}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    path = CHECKOUT / document
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), f"{document}: {target}"
