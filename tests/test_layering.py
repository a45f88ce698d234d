"""Imports point down only, and the project's own rules hold in every file.

The rules are the `pygrep` and `fail` hooks of .pre-commit-config.yaml, applied here to the tree.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

CHECKOUT = Path(__file__).resolve().parents[1]
CODE_SUFFIXES = {".py", ".cpp", ".h", ".cu", ".cuh"}
CODE_FOLDERS = ("dynabert_kernels", "python", "csrc", "benchmarks", "tests")

# Bottom to top. A name is a module or a package of `dynabert`; a module imports from its own row
# and from earlier ones. The last row is a user of the library and may import its public names too.
DYNABERT_FLOORS = (
    ("subnet", "durable", "json_file"),
    ("configuration_dynabert", "hf_checkpoint", "rewiring_record", "modeling_*"),
    ("importance", "rewiring", "extraction"),
    ("data",),
    ("evaluation", "flops", "latency*", "picking", "report*", "*_plot", "export*", "sentence_*"),
    ("search*", "runner*"),
    ("training",),
    ("cli", "__main__"),
)
# Methods of a model whose work stands above it: (module, what it may import, inside the method).
METHODS_ABOVE = {("dynabert.modeling_pretrained", "dynabert.picking")}
KERNEL_IMPORTS = {"torch", "triton"}


def _python_files(folder: str) -> list[Path]:
    return sorted((CHECKOUT / folder).rglob("*.py"))


def _imported_modules(path: Path, module: str) -> set[str]:
    """Every module a file imports anywhere in it, relative imports made absolute."""
    parents = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            found.update(f"{origin}.{alias.name}" for alias in node.names)
    return found


def _module_name(path: Path, root: str) -> str:
    parts = path.relative_to(CHECKOUT / root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _floor(module: str) -> int | None:
    """Row of DYNABERT_FLOORS of `dynabert.<name>...`, or None if no row names it."""
    name = module.split(".")[1]
    for floor, patterns in enumerate(DYNABERT_FLOORS):
        if any(re.fullmatch(p.replace("*", r"\w*"), name) for p in patterns):
            return floor
    return None


KERNEL_FILES = _python_files("dynabert_kernels")
MODEL_FILES = [p for p in _python_files("python") if p != CHECKOUT / "python/dynabert/__init__.py"]


def _id(path: Path) -> str:
    return path.relative_to(CHECKOUT).as_posix()


@pytest.mark.parametrize("path", KERNEL_FILES, ids=_id)
def test_kernels_import_torch_and_standard_library_only(path: Path) -> None:
    module = _module_name(path, ".")
    allowed = KERNEL_IMPORTS | set(sys.stdlib_module_names) | {"dynabert_kernels"}
    tops = {name.split(".")[0] for name in _imported_modules(path, module)}
    assert tops <= allowed, f"{_id(path)} imports {sorted(tops - allowed)}"


@pytest.mark.parametrize("path", MODEL_FILES, ids=_id)
def test_model_package_imports_point_down(path: Path) -> None:
    module = _module_name(path, "python")
    floor = _floor(module)
    assert floor is not None, f"{_id(path)} has no row in DYNABERT_FLOORS; give it one"
    for imported in _imported_modules(path, module):
        if not imported.startswith("dynabert."):
            assert imported != "dynabert", f"{_id(path)} imports the package that imports it"
            continue
        if any(module == user and imported.startswith(above) for user, above in METHODS_ABOVE):
            continue
        its_floor = _floor(imported)
        if its_floor is None and floor == len(DYNABERT_FLOORS) - 1:
            continue
        assert its_floor is not None, f"{_id(path)} imports {imported}, which is in no row"
        assert its_floor <= floor, f"{_id(path)} imports {imported}, which stands above it"


def test_subnet_imports_standard_library_only() -> None:
    imported = _imported_modules(CHECKOUT / "python/dynabert/subnet.py", "dynabert.subnet")
    assert {name.split(".")[0] for name in imported} <= set(sys.stdlib_module_names)


def _rules() -> list[dict[str, Any]]:
    config = yaml.safe_load((CHECKOUT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    return [hook for hook in hooks if hook["language"] in ("pygrep", "fail")]


def _breaches(rule: dict[str, Any], name: str, text: str) -> list[str]:
    """Lines of one file that break a rule, as pre-commit would find them."""
    if not re.search(rule["files"], name) or re.search(rule.get("exclude", "^$"), name):
        return []
    if rule["language"] == "fail":
        return [name]
    lines = enumerate(text.splitlines(), start=1)
    return [f"{name}:{n}: {line.strip()}" for n, line in lines if re.search(rule["entry"], line)]


@pytest.mark.parametrize("rule", _rules(), ids=lambda rule: rule["id"])
def test_rule_holds(rule: dict[str, Any]) -> None:
    files = [p for top in CODE_FOLDERS for p in (CHECKOUT / top).rglob("*") if p.is_file()]
    code = [p for p in files if p.suffix in CODE_SUFFIXES]
    breaches = [line for p in sorted(code) for line in _breaches(rule, _id(p), p.read_text())]
    assert not breaches, f"{rule['name']}:\n" + "\n".join(breaches)


@pytest.mark.parametrize(
    ("rule_id", "name", "line"),
    [
        ("no-multiplier-in-kernels", "dynabert_kernels/layout.py", "n = round(width_mult * 12)"),
        ("environment-in-one-file", "python/dynabert/report.py", "x = os.environ['HOME']"),
        ("environment-in-one-file", "csrc/cpu/isa.cpp", 'getenv("DYNABERT_ISA")'),
        ("no-transformers-in-kernels", "dynabert_kernels/varlen.py", "    import transformers"),
        ("no-bare-torch-check", "csrc/ffn/ffn_cpu.cpp", "TORCH_CHECK(a.dim() == b.dim());"),
        ("todo-with-condition", "dynabert_kernels/varlen.py", "# TODO make faster"),
        ("no-code-from-data", "python/dynabert/hf_checkpoint.py", "pickle.load(f)"),
        ("no-code-from-data", "python/dynabert/report.py", "x = eval(text)"),
        ("no-utils-file", "python/dynabert/data/utils.py", ""),
    ],
)
def test_rule_catches_a_breach(rule_id: str, name: str, line: str) -> None:
    rule = next(rule for rule in _rules() if rule["id"] == rule_id)
    assert _breaches(rule, name, line)


@pytest.mark.parametrize(
    ("rule_id", "name", "line"),
    [
        ("environment-in-one-file", "dynabert_kernels/_env.py", "os.environ.get('DYNABERT_ISA')"),
        ("no-bare-torch-check", "csrc/checks.h", 'TORCH_CHECK(n > 0, "ffn: n=", n);'),
        ("todo-with-condition", "csrc/layout.h", "// TODO(when torch >= 2.12): use the stable ABI"),
        ("no-code-from-data", "python/dynabert/report.py", "model.eval()"),
    ],
)
def test_rule_allows_the_proper_form(rule_id: str, name: str, line: str) -> None:
    rule = next(rule for rule in _rules() if rule["id"] == rule_id)
    assert not _breaches(rule, name, line)
