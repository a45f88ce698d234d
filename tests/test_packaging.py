"""What an install brings: metadata, pins, and builds with and without a compiler."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import dynabert_kernels

CHECKOUT = Path(__file__).resolve().parents[1]
DISTRIBUTION = "dynabert-kernels"
SOURCES = ("csrc", "dynabert_kernels", "python", "requirements", "docs")
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "Makefile", "LICENSE")


def requirements(extra: str | None = None) -> dict[str, Requirement]:
    """The distribution's requirements by name: of the core, or what an extra adds."""
    found = {}
    for line in importlib.metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(line)
        of_extra = re.search(r"extra == ['\"](\w+)['\"]", str(requirement.marker or ""))
        if (of_extra.group(1) if of_extra else None) == extra:
            found[requirement.name] = requirement
    return found


def pinned(file: str) -> list[Requirement]:
    text = (CHECKOUT / "requirements" / file).read_text().replace("\\\n", " ")
    lines = [line.partition("--hash")[0].strip() for line in text.splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_version_is_the_same_in_the_package_and_its_metadata() -> None:
    assert dynabert_kernels.__version__ == importlib.metadata.version(DISTRIBUTION) == "0.1.0.dev0"


def test_extras_have_the_agreed_names() -> None:
    extras = importlib.metadata.metadata(DISTRIBUTION).get_all("Provides-Extra")
    agreed = {"train", "demo", "bench", "onnx", "search", "sbert", "serve", "dev"}
    assert set(extras or []) == agreed


def test_core_needs_five_packages() -> None:
    assert set(requirements()) == {"torch", "transformers", "safetensors", "tqdm", "typer"}


def test_console_script_is_the_cli() -> None:
    scripts = importlib.metadata.entry_points(group="console_scripts", name="dynabert")
    assert {script.value for script in scripts} == {"dynabert.cli:app"}


@pytest.mark.parametrize("file", ["torch.txt", "dev.txt", "demo.txt"])
def test_every_pin_is_exact(file: str) -> None:
    for requirement in pinned(file):
        assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), str(requirement)


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_pins_cover_core_and_development_once_per_python(python: str) -> None:
    environment = {
        "python_version": python,
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "extra": "",
    }
    names = [
        requirement.name
        for file in ("torch.txt", "dev.txt", "demo.txt")
        for requirement in pinned(file)
        if requirement.marker is None or requirement.marker.evaluate(environment)
    ]
    assert sorted(names) == sorted(set(names))
    needed = {name for extra in (None, "train", "dev") for name in requirements(extra)}
    assert needed - {DISTRIBUTION} <= set(names)


def test_pins_satisfy_the_declared_ranges() -> None:
    declared = {
        n: r for extra in (None, "train", "demo", "dev") for n, r in requirements(extra).items()
    }
    for file in ("torch.txt", "dev.txt", "demo.txt"):
        for pin in pinned(file):
            if pin.name in declared:
                version = next(iter(pin.specifier)).version
                assert declared[pin.name].specifier.contains(version, prereleases=True), str(pin)


def test_demo_model_is_pinned_by_hash() -> None:
    text = (CHECKOUT / "requirements" / "demo.txt").read_text()
    assert len(re.findall(r"--hash=sha256:[0-9a-f]{64}", text)) == len(pinned("demo.txt")) == 1


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what a build reads, without anything built."""
    root = tmp_path / "tree"
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "_build_record.json")
    for folder in SOURCES:
        shutil.copytree(CHECKOUT / folder, root / folder, ignore=ignore)
    for file in FILES:
        shutil.copy2(CHECKOUT / file, root / file)
    for file in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md"):
        shutil.copy2(CHECKOUT / file, root / file)
    (root / "tests").mkdir()
    return root


def build(tree: Path, kind: str, **environment: str) -> tuple[Path, str]:
    """Builds a wheel or an sdist through the PEP 517 hooks, in this environment.

    Without the CUDA kernels, which take minutes, unless `environment` names architectures.
    """
    environment = {"DYNABERT_CUDA_ARCHITECTURES": "none"} | environment
    out = tree.parent / "out"
    out.mkdir(exist_ok=True)
    code = f"from setuptools import build_meta as b; print(b.build_{kind}({str(out)!r}))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tree,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return out / result.stdout.split()[-1], result.stderr


def import_and_ask(wheel: Path) -> str:
    """Unpacks a wheel and asks the package in it, in a process of its own, why it has no `_C`."""
    site = wheel.parent / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # The finder of an editable install would offer the checkout's own extension.
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'Editable' not in repr(f)];"
        "import dynabert_kernels as kernels; from dynabert_kernels import _extension;"
        f"assert kernels.__file__.startswith({str(site)!r}), kernels.__file__;"
        "print(_extension.extension_error())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=site,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.slow
def test_wheel_without_extension_is_pure_and_imports(tree: Path) -> None:
    wheel, messages = build(tree, "wheel", DYNABERT_NO_EXTENSION="1")
    assert wheel.name.endswith("-py3-none-any.whl")
    sentence = "extension not built: DYNABERT_NO_EXTENSION was set at build time"
    assert messages.count(sentence) == 1
    assert import_and_ask(wheel) == sentence
    names = zipfile.ZipFile(wheel).namelist()
    assert "dynabert/subnet.py" in names
    assert {"dynabert/py.typed", "dynabert_kernels/py.typed"} <= set(names)
    assert "dynabert_kernels/proven.json" in names
    assert {f"dynabert/report_page/page.{kind}" for kind in ("html", "css", "js")} <= set(names)
    assert not [name for name in names if name.endswith((".so", ".cpp"))]


@pytest.mark.slow
def test_missing_compiler_does_not_fail_the_build(tree: Path) -> None:
    wheel, messages = build(tree, "wheel", CXX="no-such-compiler")
    sentence = "extension not built: no-such-compiler was not found at build time"
    assert messages.count(sentence) == 1
    assert import_and_ask(wheel).startswith(sentence)


@pytest.mark.slow
def test_failing_compiler_does_not_fail_the_build(tree: Path) -> None:
    header = tree / "csrc" / "layout.h"
    header.write_text("#error broken on purpose\n")
    wheel, messages = build(tree, "wheel")
    sentence = "extension not built: compiling or linking failed at build time"
    assert messages.count(sentence) == 1
    assert import_and_ask(wheel).startswith(sentence)


@pytest.mark.slow
def test_wheel_with_extension_loads_it(tree: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not on PATH")
    wheel, _ = build(tree, "wheel")
    assert not wheel.name.endswith("-none-any.whl")
    assert import_and_ask(wheel) == "None"


@pytest.mark.slow
def test_sdist_carries_headers_and_cuda_sources(tree: Path) -> None:
    sdist, _ = build(tree, "sdist", DYNABERT_NO_EXTENSION="1")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for suffix in ("h", "cu", "cuh", "sh"):
        sources = (CHECKOUT / "csrc").rglob(f"*.{suffix}")
        expected = {path.relative_to(CHECKOUT).as_posix() for path in sources}
        assert expected
        assert expected <= names
    assert {"setup.py", "csrc/registration_cpu.cpp", "requirements/dev.txt", "LICENSE"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc", "_build_record.json"))]
