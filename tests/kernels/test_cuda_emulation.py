"""The CUDA C++ kernels on the CPU: their test programs, built as plain C++ over the emulated device
of csrc/cuda/emulation, compare them with double precision."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
TESTS = CSRC / "cuda" / "tests"
FLAGS = ("-std=c++20", "-Wall", "-Wextra", "-Werror")
# What nvcc does not report either: its own loop pragmas, the calling convention of tensor maps, and
# thread indices, which are unsigned, beside sizes, which are not.
SILENCED = ("-Wno-unknown-pragmas", "-Wno-psabi", "-Wno-sign-compare")

GEMM_SM80 = ("cuda/gemm_sm80*.cu", "cuda/row_tiles.cu")
SUBLAYER = (*GEMM_SM80, "cuda/gemm_sm90.cu", "cuda/layer_norm.cu")


class Program(NamedTuple):
    """A test program and the device it runs on.

    Attributes:
        name: Of the file in csrc/cuda/tests.
        sources: Of the kernels it tests, in csrc.
        cases: Random cases of the slow test, for each seed.
        capability: Compute capability, times ten.
        multiprocessors: The encoder needs eight clusters of eight blocks.
    """

    name: str
    sources: tuple[str, ...]
    cases: int
    capability: int = 80
    multiprocessors: int = 4


PROGRAMS = (
    Program("emulation_test", (), 2),
    Program("instructions_test", (), 10, capability=90),
    Program("gemm_sm80_test", GEMM_SM80, 60),
    Program("gemm_test", ("cuda/gemm_sm90.cu",), 30, capability=90),
    Program("ffn_test", ("ffn/ffn_cuda.cu", *SUBLAYER), 60),
    Program("ffn_test", ("ffn/ffn_cuda.cu", *SUBLAYER), 60, capability=90),
    Program("attention_test", ("attention/attention_c*.cu", *SUBLAYER), 60),
    Program("attention_test", ("attention/attention_c*.cu", *SUBLAYER), 60, capability=90),
    Program("encoder_test", ("encoder/encoder_cuda.cu",), 2, capability=90, multiprocessors=64),
)
FAST = tuple(each for each in PROGRAMS if each.name in {"emulation_test", "gemm_sm80_test"})


def id_of(program: Program) -> str:
    return f"{program.name}-sm{program.capability}"


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Builds a program, once for all tests of it."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not on PATH")
    nvcc = shutil.which("nvcc")
    toolkits = [Path(nvcc).resolve().parents[1]] if nvcc is not None else []
    toolkits.append(Path("/usr/local/cuda"))
    found = [path / "include" for path in toolkits if (path / "include/cuda_bf16.h").exists()]
    if not found:
        pytest.skip("no CUDA headers beside the nvcc on PATH or in /usr/local/cuda")
    folder = tmp_path_factory.mktemp("emulation")
    built: dict[tuple[str, tuple[str, ...]], Path] = {}

    def build_program(name: str, sources: tuple[str, ...], *options: str) -> Path:
        key = (name, options)
        if key not in built:
            target = folder / f"{name}_{len(built)}"
            files = [TESTS / f"{name}.cu"]
            files += [path for pattern in sources for path in sorted(CSRC.glob(pattern))]
            # As one file: reading the headers takes most of the time.
            whole = target.with_suffix(".cpp")
            whole.write_text("".join(f'#include "{path}"\n' for path in files))
            headers = ("-isystem", str(found[0]))
            run(compiler, *FLAGS, *SILENCED, *options, *headers, str(whole), "-o", str(target))
            built[key] = target
        return built[key]

    return build_program


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_program(path: Path, program: Program, cases: int, seed: int) -> None:
    output = run(
        str(path),
        str(cases),
        str(seed),
        DYNABERT_EMULATION_SEED=str(seed),
        DYNABERT_EMULATED_CAPABILITY=str(program.capability),
        DYNABERT_EMULATED_MULTIPROCESSORS=str(program.multiprocessors),
    )
    assert f"{cases} cases, 0 failed" in output, output


@pytest.mark.parametrize("program", FAST, ids=id_of)
def test_program_passes_emulated(build, program: Program) -> None:
    run_program(build(program.name, program.sources, "-O0"), program, cases=1, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", (2, 3, 4))
@pytest.mark.parametrize("program", PROGRAMS, ids=id_of)
def test_program_passes_whatever_the_order_of_threads(build, program: Program, seed: int) -> None:
    run_program(build(program.name, program.sources, "-O1"), program, program.cases, seed)


@pytest.mark.slow
def test_emulation_holds_without_assembler(build) -> None:
    program = PROGRAMS[0]
    run_program(build(program.name, (), "-O1", "-DDYNABERT_UCONTEXT"), program, cases=1, seed=1)
