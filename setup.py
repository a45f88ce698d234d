"""Builds the C++ extension `dynabert_kernels._C`, or records why it could not.

An install never fails for want of a compiler: the package runs on its `reference` backend then, and
`dynabert doctor` repeats the sentence recorded here. Everything else about the package is in
pyproject.toml.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from setuptools import Command, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp"))
HEADERS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h"))
# -fopenmp: without it at::parallel_for compiles to a serial loop, silently.
# No -march=native: a wheel runs on other machines, kernels choose their ISA at run time.
COMPILE_FLAGS = ["-O3", "-fopenmp", "-Wall", "-Wextra"]
LINK_FLAGS = ["-fopenmp"]
# For `make asan`: such an extension loads only where the sanitizer's library came first.
if os.environ.get("DYNABERT_SANITIZE", "0") not in ("", "0"):
    SANITIZE = "-fsanitize=address,undefined"
    COMPILE_FLAGS += [SANITIZE, "-fno-sanitize-recover=undefined", "-O1", "-g"]
    LINK_FLAGS.append(SANITIZE)


def why_no_extension() -> str | None:
    """Returns None if the extension can be tried here, else the reason, to follow 'not built: '."""
    if os.environ.get("DYNABERT_NO_EXTENSION", "0") not in ("", "0"):
        return "DYNABERT_NO_EXTENSION was set at build time"
    try:
        from torch.utils.cpp_extension import get_cxx_compiler
    except ImportError:
        return (
            "torch was not importable at build time. Install torch first, then this package with "
            "--no-build-isolation"
        )
    compiler = get_cxx_compiler().split()[0]
    if shutil.which(compiler) is None:
        return f"{compiler} was not found at build time. Install g++ and reinstall"
    return None


def find_ninja() -> None:
    """Puts pip's ninja on PATH, where torch looks; a virtual environment need not be activated."""
    if shutil.which("ninja") is None:
        try:
            import ninja
        except ImportError:
            return  # torch compiles without it, one file at a time
        os.environ["PATH"] += os.pathsep + ninja.BIN_DIR


def record_outcome(command: Command, why_not: str | None) -> None:
    """Writes `_build_record.json` beside the modules, wherever this build puts them.

    An editable build without an extension also deletes the one an earlier build left in the source
    tree, so that what is loaded and what is recorded agree.

    Args:
        command: A `build_py` or `build_ext` command; decides between source tree and build folder.
        why_not: Why there is no extension, or None if it was built.
    """
    in_place = getattr(command, "editable_mode", False) or getattr(command, "inplace", False)
    folder = (ROOT if in_place else Path(command.build_lib)) / "dynabert_kernels"
    folder.mkdir(parents=True, exist_ok=True)
    record = {"extension_built": why_not is None, "reason": why_not}
    if why_not is None:
        import torch

        record["torch"] = torch.__version__
    else:
        announce(why_not)
        if in_place:
            for path in folder.glob("_C.*.so"):
                path.unlink()
    (folder / "_build_record.json").write_text(json.dumps(record, indent=2) + "\n")


def announce(reason: str) -> None:
    """Says once, on stderr, that the package goes without its extension and why."""
    print(
        f"dynabert-kernels: extension not built: {reason}. The package works without it, on the "
        "reference backend.",
        file=sys.stderr,
    )


class BuildPython(build_py):
    """Copies the Python files and, where no extension is tried, records the reason."""

    def run(self) -> None:
        super().run()
        if WHY_NOT is not None:
            record_outcome(self, WHY_NOT)


def extension_arguments() -> dict[str, object]:
    """Returns the arguments of `setup` that build the extension; needs torch."""
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class OptionalBuildExtension(BuildExtension):
        """Torch's ninja build, with every failure turned into a recorded reason."""

        why_not: str | None = None

        def run(self) -> None:
            super().run()
            record_outcome(self, self.why_not)

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            # Compiler, linker and ninja fail with errors of several unrelated types, after printing
            # what went wrong.
            except Exception:
                self.why_not = (
                    "compiling or linking failed at build time. Reinstall with pip's -v option to "
                    "see the compiler's messages"
                )
                # setuptools skips copying the output of an optional extension that is missing.
                for extension in self.extensions:
                    extension.optional = True

    find_ninja()
    flags = " ".join(COMPILE_FLAGS)
    extension = CppExtension(
        "dynabert_kernels._C",
        sources=SOURCES,
        depends=HEADERS,
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[
            ("DYNABERT_BUILD_FLAGS", f'"{flags}"'),
            ("DYNABERT_BUILD_TORCH", f'"{torch.__version__}"'),
        ],
        extra_compile_args=COMPILE_FLAGS,
        extra_link_args=LINK_FLAGS,
    )
    # After torch's own headers: most torch builds carry pybind11, some leave it to the package.
    try:
        import pybind11
    except ImportError:
        pass
    else:
        extension.include_dirs.append(pybind11.get_include())
    return {"ext_modules": [extension], "cmdclass": {"build_ext": OptionalBuildExtension}}


WHY_NOT = why_no_extension()
arguments = extension_arguments() if WHY_NOT is None else {"cmdclass": {}}
arguments["cmdclass"]["build_py"] = BuildPython
setup(**arguments)
