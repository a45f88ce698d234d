"""Builds `dynabert_kernels._C` (C++, for CPUs) and `_C_cuda` (CUDA), or records why it could not.

An install never fails for want of a compiler: the package runs on its other backends then, and
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
sys.path.insert(0, str(ROOT / "csrc" / "cuda"))

import build_cuda  # noqa: E402

CPP_FILES = set((ROOT / "csrc").rglob("*.cpp")) - set(build_cuda.sources())
SOURCES = sorted(str(path.relative_to(ROOT)) for path in CPP_FILES)
HEADERS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h"))
# -fopenmp: without it at::parallel_for compiles to a serial loop, silently.
# No -march=native: a wheel runs on other machines, kernels choose their ISA at run time.
COMPILE_FLAGS = ["-O3", "-fopenmp", "-Wall", "-Wextra"]
LINK_FLAGS = ["-fopenmp"]
# For `make asan`: such an extension loads only where the sanitizer's library came first.
SANITIZE = os.environ.get("DYNABERT_SANITIZE", "0") not in ("", "0")
if SANITIZE:
    CHECKS = "-fsanitize=address,undefined"
    COMPILE_FLAGS += [CHECKS, "-fno-sanitize-recover=undefined", "-O1", "-g"]
    LINK_FLAGS.append(CHECKS)


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


def cuda_record(command: Command) -> dict[str, object]:
    """Builds `_C_cuda` where nvcc is, whatever the machine's GPU.

    Args:
        command: The `build_ext` command.

    Returns:
        What `_build_record.json` says of it.
    """
    folder = package_folder(command)
    record: dict[str, object] = {"cuda_built": False, "cuda_reason": None}
    try:
        compiler = build_cuda.nvcc_compiler(
            os.environ.get("CUDA_HOME"), wanted_architectures(), os.environ.get("CXX")
        )
        # In the tree the objects stay, so that the next build compiles only what has changed.
        work = ROOT / "build" if is_in_place(command) else Path(command.build_temp)
        jobs = os.environ.get("MAX_JOBS")
        build_cuda.build(folder, compiler, work=work / "cuda", jobs=int(jobs) if jobs else None)
    except build_cuda.BuildError as error:
        print(f"dynabert-kernels: CUDA kernels not built: {error}.", file=sys.stderr)
        return record | {"cuda_reason": str(error)}
    return record | {
        "cuda_built": True,
        "cuda_architectures": list(compiler.architectures),
        "nvcc": compiler.release,
    }


def wanted_architectures() -> list[str] | None:
    """The architectures of `DYNABERT_CUDA_ARCHITECTURES`, or None for the usual ones.

    Raises:
        BuildError: None are wanted.
    """
    named = os.environ.get("DYNABERT_CUDA_ARCHITECTURES", "").strip()
    if named == "none":
        raise build_cuda.BuildError("DYNABERT_CUDA_ARCHITECTURES was none at build time")
    if SANITIZE:
        raise build_cuda.BuildError("DYNABERT_SANITIZE was set at build time")
    return [part.strip() for part in named.split(",")] if named else None


def is_in_place(command: Command) -> bool:
    """Whether a build puts what it makes beside the sources."""
    return bool(getattr(command, "editable_mode", False) or getattr(command, "inplace", False))


def package_folder(command: Command) -> Path:
    """Where a build puts the modules of the package."""
    folder = (ROOT if is_in_place(command) else Path(command.build_lib)) / "dynabert_kernels"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def find_ninja() -> None:
    """Puts pip's ninja on PATH, where torch looks; a virtual environment need not be activated."""
    if shutil.which("ninja") is None:
        try:
            import ninja
        except ImportError:
            return  # torch compiles without it, one file at a time
        os.environ["PATH"] += os.pathsep + ninja.BIN_DIR


def record_outcome(command: Command, why_not: str | None, cuda: dict[str, object]) -> None:
    """Writes `_build_record.json` beside the modules, wherever this build puts them.

    An editable build without a module also deletes the one an earlier build left in the source
    tree, so that what is loaded and what is recorded agree.

    Args:
        command: A `build_py` or `build_ext` command; decides between source tree and build folder.
        why_not: Why there is no C++ extension, or None if it was built.
        cuda: What to record of the CUDA kernels.
    """
    folder = package_folder(command)
    record = {"extension_built": why_not is None, "reason": why_not, **cuda}
    if why_not is None:
        import torch

        record["torch"] = torch.__version__
    else:
        announce(why_not)
    missing = {"_C": why_not is not None, "_C_cuda": not cuda["cuda_built"]}
    for name, is_missing in missing.items():
        if is_missing and is_in_place(command):
            for path in folder.glob(f"{name}.*.so"):
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
            record_outcome(self, WHY_NOT, {"cuda_built": False, "cuda_reason": WHY_NOT})


def extension_arguments() -> dict[str, object]:
    """Returns the arguments of `setup` that build the extension; needs torch."""
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class OptionalBuildExtension(BuildExtension):
        """Torch's ninja build, with every failure turned into a recorded reason."""

        why_not: str | None = None

        def run(self) -> None:
            super().run()
            record_outcome(self, self.why_not, cuda_record(self))

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
