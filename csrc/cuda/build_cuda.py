"""Builds the CUDA C++ kernels as a Python module, with ninja; setup.py calls `build`.

    python csrc/cuda/build_cuda.py --out FOLDER                `_C_cuda`, for cards, by nvcc
    python csrc/cuda/build_cuda.py --out FOLDER --emulated     `_C_cuda_emulated`, the same sources
                                                               for the CPU, by the C++ compiler

Neither needs a GPU or links torch. Needed are ninja, pybind11's headers (those in torch will do),
and of the CUDA toolkit nvcc, or for the emulation just the headers. Only the standard library is
imported, so that any Python can run this.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1]
TOOLKIT = "/usr/local/cuda"

# What nvcc makes code for, of what it knows; PTX of the last serves cards that are newer still.
ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
HOPPER = "90a"
OLDEST_NVCC = (12, 0)  # C++20, and Hopper
HOST_FLAGS = ("-fPIC", "-fvisibility=hidden", "-Wall")
NVCC_FLAGS = ("-std=c++20", "-O3", *(f"-Xcompiler={flag}" for flag in HOST_FLAGS))
# The emulation counts on checks, and -O1 compiles in half the time of -O2.
EMULATED_FLAGS = ("-std=c++20", "-O1", *HOST_FLAGS, "-Wno-unknown-pragmas")
# Symbols of the static CUDA runtime stay inside: torch brings another one into the process.
LINK_FLAGS = ("-shared", "-cudart=static", "-Xlinker=--exclude-libs,ALL")
EMULATED_LINK_FLAGS = ("-shared",)


class BuildError(Exception):
    """Why there is no module: a sentence to follow "not built: "."""


@dataclass(frozen=True)
class Compiler:
    """How sources become objects and objects a module.

    Attributes:
        compile: Command for any source, without architecture, files and includes.
        link: Command that makes a module of objects.
        release: nvcc's, such as ``"13.0"``; ``"none"`` in the emulation.
        architectures: What it makes code for; none in the emulation.
    """

    compile: tuple[str, ...]
    link: tuple[str, ...]
    release: str
    architectures: tuple[str, ...]

    @property
    def emulated(self) -> bool:
        return not self.architectures

    @property
    def ptx(self) -> str:
        """The architecture whose PTX is kept: the newest that later cards can run."""
        portable = [a for a in self.architectures if a.isdigit()]
        return max(portable, key=int, default="")

    def code_flags(self, source: Path) -> tuple[str, ...]:
        """The architectures of one source."""
        if self.emulated or source.suffix != ".cu":
            return ()
        if is_for_hopper(source):
            return (_gencode(HOPPER),)
        flags = [_gencode(architecture) for architecture in self.architectures]
        if self.ptx:
            flags.append(f"-gencode=arch=compute_{self.ptx},code=compute_{self.ptx}")
        return tuple(flags)


def _gencode(architecture: str) -> str:
    return f"-gencode=arch=compute_{architecture},code=sm_{architecture}"


def is_for_hopper(source: Path) -> bool:
    """Whether a file uses instructions that only sm_90a has."""
    return "_sm90" in source.name or source.name == "encoder_cuda.cu"


def sources() -> list[Path]:
    """Kernels with their launchers, and the Python module."""
    kernels = [path for path in CSRC.rglob("*.cu") if "tests" not in path.parts]
    return [*sorted(kernels), CSRC / "registration_cuda.cpp"]


def source_hash() -> str:
    """Twelve digits that change with any file the kernels are made from."""
    digest = hashlib.sha256()
    files = [p for kind in ("cu", "cuh", "h") for p in CSRC.rglob(f"*.{kind}")]
    for path in sorted(files):
        name = path.relative_to(CSRC)
        if not {"tests", "emulation", "cpu"} & set(name.parts):
            digest.update(f"{name.as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def find_nvcc(cuda_home: str | None = None) -> str:
    """Path of nvcc: in `cuda_home` if given, else on PATH or in the usual folder.

    Raises:
        BuildError: There is none.
    """
    home = cuda_home or TOOLKIT
    found = shutil.which("nvcc", path=f"{home}/bin")
    if cuda_home is None:
        found = shutil.which("nvcc") or found
    if found is None:
        where = f"in {home}/bin" if cuda_home else f"on PATH or in {home}/bin"
        raise BuildError(
            f"nvcc was not found {where} at build time. Install the CUDA toolkit and reinstall"
        )
    return found


def find_headers(cuda_home: str | None = None) -> Path:
    """The folder of ``cuda_runtime_api.h``.

    Raises:
        BuildError: There is none.
    """
    homes = [Path(cuda_home or TOOLKIT)]
    nvcc = None if cuda_home else shutil.which("nvcc")
    if nvcc is not None:
        homes.insert(0, Path(nvcc).resolve().parents[1])
    for home in homes:
        if (home / "include" / "cuda_runtime_api.h").is_file():
            return home / "include"
    raise BuildError(
        f"cuda_runtime_api.h was not found in {homes[-1]}/include. Install the CUDA toolkit"
    )


def nvcc_compiler(
    cuda_home: str | None = None, architectures: Sequence[str] | None = None, cxx: str | None = None
) -> Compiler:
    """nvcc for the architectures that it knows.

    Args:
        cuda_home: Folder of the toolkit; None searches.
        architectures: What to make code for, such as ``["80", "90a"]``; None for `ARCHITECTURES`.
        cxx: The C++ compiler beneath nvcc; None for its own choice.

    Raises:
        BuildError: nvcc is missing or too old, or an architecture that was asked for is unknown.
    """
    nvcc = find_nvcc(cuda_home)
    found = re.search(r"release (\d+)\.(\d+)", _output([nvcc, "--version"]))
    release = (int(found[1]), int(found[2])) if found else (0, 0)
    if release < OLDEST_NVCC:
        raise BuildError(
            f"nvcc is of release {release[0]}.{release[1]}, expected 12.0 or newer. Install a "
            "newer CUDA toolkit and reinstall"
        )
    known = set(re.findall(r"compute_(\d+)", _output([nvcc, "--list-gpu-arch"])))
    wanted = ARCHITECTURES if architectures is None else tuple(architectures)
    unknown = [a for a in wanted if a.rstrip("af") not in known]
    if architectures is not None and (unknown or not wanted):
        listed = ", ".join(sorted(known, key=int))
        raise BuildError(
            f"architectures={','.join(wanted)}, expected some of {listed}, with a after the number "
            "for code of one generation. Correct DYNABERT_CUDA_ARCHITECTURES"
        )
    flags = (*NVCC_FLAGS, *(("-ccbin", cxx) if cxx else ()))
    return Compiler(
        (nvcc, *flags),
        (nvcc, *LINK_FLAGS, *flags),
        f"{release[0]}.{release[1]}",
        tuple(a for a in wanted if a not in unknown),
    )


def emulating_compiler(cuda_home: str | None = None, cxx: str | None = None) -> Compiler:
    """A C++ compiler that sees the kernels as plain C++.

    Raises:
        BuildError: The compiler or the toolkit's headers are missing.
    """
    compiler = shutil.which(cxx or "g++")
    if compiler is None:
        raise BuildError(f"{cxx or 'g++'} was not found. Install g++")
    headers = str(find_headers(cuda_home))
    return Compiler(
        (compiler, *EMULATED_FLAGS, "-isystem", headers, "-x", "c++"),
        (compiler, *EMULATED_LINK_FLAGS),
        "none",
        (),
    )


def find_ninja() -> str:
    """Path of ninja: pip's package, or the one on PATH.

    Raises:
        BuildError: There is neither.
    """
    folders = [str(Path(sys.executable).parent)]  # of an environment that nobody activated
    spec = importlib.util.find_spec("ninja")
    if spec is not None:
        import ninja

        folders.append(ninja.BIN_DIR)
    found = shutil.which("ninja") or shutil.which("ninja", path=os.pathsep.join(folders))
    if found is None:
        raise BuildError("ninja was not found. Install the package ninja and reinstall")
    return found


def find_pybind11() -> Path:
    """The folder of pybind11's headers: its own package's, or torch's.

    Raises:
        BuildError: There is neither.
    """
    for package in ("pybind11", "torch"):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            folder = Path(spec.origin).parent / "include"
            if (folder / "pybind11" / "pybind11.h").is_file():
                return folder
    raise BuildError("pybind11's headers were not found. Install pybind11 and reinstall")


def module_name(emulated: bool) -> str:
    """Name of the module, which is also that of its file without the suffix."""
    return "_C_cuda_emulated" if emulated else "_C_cuda"


def ninja_file(compiler: Compiler, folder: Path, target: Path) -> str:
    """The text of ``build.ninja``.

    Args:
        compiler: What compiles and links.
        folder: Of the objects, and of ``build_info.h``.
        target: The module's file.
    """
    includes = [f"-I{folder}", f"-I{CSRC}", "-isystem", str(find_pybind11())]
    includes += ["-isystem", sysconfig.get_paths()["include"]]
    compile_command = _command((*compiler.compile, *includes))
    lines = [
        "ninja_required_version = 1.5",
        "rule compile",
        f"  command = {compile_command} $code -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $in",
        "rule link",
        f"  command = {_command(compiler.link)} $in -o $out",
        "  description = $out",
        "",
    ]
    objects = []
    for source in sources():
        name = source.relative_to(CSRC).as_posix().replace("/", ".")
        objects.append(_path(folder / f"{name}.o"))
        lines.append(f"build {objects[-1]}: compile {_path(source)}")
        lines.append(f"  code = {_command(compiler.code_flags(source))}")
    lines += [f"build {_path(target)}: link {' '.join(objects)}", f"default {_path(target)}", ""]
    return "\n".join(lines)


def _command(words: Sequence[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def _path(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def build_info_header(compiler: Compiler) -> str:
    """What the module reports about its build, as a header for registration_cuda.cpp."""
    constants = {
        "Architectures": ",".join(compiler.architectures),
        "Ptx": compiler.ptx,
        "Nvcc": compiler.release,
        "Sources": source_hash(),
    }
    lines = [
        f'inline constexpr char kBuild{name}[] = "{text}";' for name, text in constants.items()
    ]
    emulated = "true" if compiler.emulated else "false"
    lines.append(f"inline constexpr bool kBuildEmulated = {emulated};")
    lines.append(f"#define DYNABERT_CUDA_MODULE {module_name(compiler.emulated)}")
    return "#pragma once\n" + "\n".join(lines) + "\n"


def build(
    out: Path, compiler: Compiler, *, work: Path | None = None, jobs: int | None = None
) -> Path:
    """Builds the module; what is up to date is not compiled again.

    Args:
        out: Folder of the module.
        compiler: What `nvcc_compiler` or `emulating_compiler` returned.
        work: Folder of the objects; None for one in `out`.
        jobs: Compilers at a time; None for as many as ninja likes.

    Returns:
        The module's file.

    Raises:
        BuildError: A tool is missing, or a source does not compile; the messages are on stdout.
    """
    out = out.resolve()
    name = module_name(compiler.emulated)
    folder = (work or out / f"{name}.objects").resolve()
    target = out / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    ninja = find_ninja()
    text = ninja_file(compiler, folder, target)
    for place in (out, folder):
        place.mkdir(parents=True, exist_ok=True)
    _write(folder / "build.ninja", text)
    _write(folder / "build_info.h", build_info_header(compiler))
    jobs_flag = [] if jobs is None else [f"-j{jobs}"]
    done = subprocess.run([ninja, "-C", str(folder), *jobs_flag], check=False)
    if done.returncode != 0:
        raise BuildError(
            "compiling or linking the CUDA kernels failed at build time. Reinstall with pip's -v "
            "option to see the compiler's messages"
        )
    return target


def _write(path: Path, text: str) -> None:
    """Writes a file that differs, so that nothing is compiled again for the sake of its date."""
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def _output(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)} failed at build time: {done.stderr.strip()}")
    return done.stdout


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds what the command line asks for and prints the file; returns 1 where it cannot."""
    parser = argparse.ArgumentParser(description="Build the CUDA kernels as a Python module.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the module")
    parser.add_argument("--emulated", action="store_true", help="for the CPU, by the C++ compiler")
    parser.add_argument(
        "--architectures", help="such as 80,90a; default: " + ",".join(ARCHITECTURES)
    )
    parser.add_argument("--cuda-home", help=f"folder of the CUDA toolkit; default: {TOOLKIT}")
    parser.add_argument("--cxx", help="C++ compiler; default: g++")
    parser.add_argument("--jobs", type=int, help="compilers at a time; default: ninja's")
    options = parser.parse_args(arguments)
    try:
        if options.emulated:
            compiler = emulating_compiler(options.cuda_home, options.cxx)
        else:
            wanted = options.architectures.split(",") if options.architectures else None
            compiler = nvcc_compiler(options.cuda_home, wanted, options.cxx)
        print(build(options.out, compiler, jobs=options.jobs))
    except BuildError as error:
        print(f"build_cuda: {error}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
