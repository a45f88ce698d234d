"""The CUDA C++ sources without a GPU: they compile for the oldest and the fastest cards, and the
machine code is what they were written for. The parts that are plain C++ run here."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
TESTS = CSRC / "cuda" / "tests"
# These need no GPU and are compiled as plain C++.
SCHEDULE_TESTS = sorted(TESTS.glob("*_schedule_test.cu"))
SOURCES = sorted(path for path in CSRC.rglob("*.cu") if path not in SCHEDULE_TESTS)
CUDA_FILES = sorted(path for suffix in ("cu", "cuh") for path in CSRC.rglob(f"*.{suffix}"))
OLDEST, HOPPER = "80", "90a"


class Kernels(NamedTuple):
    """What the kernels of a source are made of.

    Attributes:
        registers: Of a thread, at most.
        instructions: That every kernel has.
        by_size: The registers of each last template argument, a tile or a head size, where they
            decide how many blocks share a multiprocessor.
    """

    registers: int
    instructions: frozenset[str]
    by_size: dict[int, int]


def kernels(registers: int, *instructions: str, by_size: dict[int, int] | None = None) -> Kernels:
    return Kernels(registers, frozenset(instructions), by_size or {})


# Products of a warpgroup (HGMMA) or a warp (HMMA); copies by the tensor memory accelerator
# (UTMALDG, UTMASTG) or by cp.async (LDGSTS), which brings the encoder's pieces of rows, too small
# for that engine. 168 registers are 64 Ki among 384 threads, in units of 8 a thread.
TILES = {0: 255, 1: 168, 2: 128}
HEADS = {32: 128, 64: 128, 80: 168, 128: 255}
KERNELS = {
    "gemm_sm90.cu": kernels(168, "HGMMA", "UTMALDG", "UTMASTG"),
    "encoder_cuda.cu": kernels(168, "HGMMA", "HMMA", "LDGSTS"),
    "gemm_sm80_bf16.cu": kernels(255, "HMMA", "LDSM", "LDGSTS", by_size=TILES),
    "gemm_sm80_fp16.cu": kernels(255, "HMMA", "LDSM", "LDGSTS", by_size=TILES),
    "attention_core_bf16.cu": kernels(255, "HMMA", "LDSM", "LDGSTS", by_size=HEADS),
    "attention_core_fp16.cu": kernels(255, "HMMA", "LDSM", "LDGSTS", by_size=HEADS),
    "layer_norm.cu": kernels(80, "SHFL", "LDG", "STG"),
    "row_tiles.cu": kernels(64, "SHFL", "BAR"),
}
FOR_HOPPER = {"gemm_sm90.cu", "encoder_cuda.cu"}
MACHINE_CODE = [
    (name, architecture)
    for name in KERNELS
    for architecture in ((HOPPER,) if name in FOR_HOPPER else (OLDEST, HOPPER))
]


class Usage(NamedTuple):
    registers: int
    stack: int
    local: int


class Object(NamedTuple):
    path: Path
    messages: str


def name_of(path: Path) -> str:
    return path.relative_to(CSRC).as_posix()


def output_of(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def nvcc() -> str:
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found is None:
        pytest.skip("nvcc not found on PATH or in /usr/local/cuda/bin")
    return found


@pytest.fixture(scope="module")
def cuobjdump() -> str:
    """The toolkit's, or the one in the triton package."""
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path="/usr/local/cuda/bin")
    spec = find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        folder = Path(spec.origin).parent / "backends" / "nvidia" / "bin"
        found = shutil.which("cuobjdump", path=str(folder))
    if found is None:
        pytest.skip("cuobjdump found neither in a CUDA toolkit nor in the triton package")
    return found


@pytest.fixture(scope="module")
def compiled(nvcc, tmp_path_factory):
    """Compiles a source for an architecture, once for all tests of it."""
    folder = tmp_path_factory.mktemp("cuda")
    objects: dict[tuple[Path, str], Object] = {}

    def compile_source(source: Path, architecture: str) -> Object:
        key = source, architecture
        if key not in objects:
            target = folder / f"{source.stem}_{architecture}.o"
            code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
            flags = ("-std=c++20", "-O3", code)
            checks = ("-Werror=all-warnings", "-Xcompiler=-Wall", "-Xptxas=-v")
            objects[key] = Object(
                target, output_of(nvcc, *flags, *checks, "-c", source, "-o", target)
            )
        return objects[key]

    return compile_source


def size_in(function: str) -> int:
    """The last number among the template arguments of a mangled name; -1 if there is none."""
    return int([-1, *re.findall(r"Li(\d+)E", function)][-1])


def source_named(name: str) -> Path:
    (source,) = (path for path in SOURCES if path.name == name)
    return source


def test_every_kernel_is_looked_at() -> None:
    sources = [path for path in SOURCES if TESTS not in path.parents]
    assert {path.name for path in sources if "__global__" in path.read_text()} <= set(KERNELS)


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_source_compiles_without_a_warning(compiled, source: Path) -> None:
    messages = compiled(source, HOPPER).messages
    # ptxas reports under these numbers where it makes warpgroup products wait for each other.
    assert not re.search(r"\bC75\d\d\b", messages), messages


@pytest.mark.slow
@pytest.mark.parametrize(("name", "architecture"), MACHINE_CODE)
def test_kernels_stay_in_registers(compiled, cuobjdump: str, name: str, architecture: str) -> None:
    text = output_of(cuobjdump, "-res-usage", compiled(source_named(name), architecture).path)
    found = {
        function: Usage(*map(int, numbers))
        for function, *numbers in re.findall(
            r"Function (\S+):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text
        )
    }
    assert found and len(found) == text.count("Function "), text
    sizes = {function: size_in(function) for function in found}
    assert set(sizes.values()) >= set(KERNELS[name].by_size)
    for function, usage in found.items():
        allowed = KERNELS[name].by_size.get(sizes[function], KERNELS[name].registers)
        assert usage.registers <= allowed, function
        assert usage.stack == usage.local == 0, function


@pytest.mark.slow
@pytest.mark.parametrize(("name", "architecture"), MACHINE_CODE)
def test_kernels_use_the_instructions_of_the_card(
    compiled, cuobjdump: str, name: str, architecture: str
) -> None:
    text = output_of(cuobjdump, "-sass", compiled(source_named(name), architecture).path)
    functions = text.split("Function : ")[1:]
    assert functions
    for function in functions:
        found = set(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@\S+ )?([A-Z0-9]+)", function, re.M))
        assert KERNELS[name].instructions <= found, function.splitlines()[0]
        # Loads and stores of local memory: what spills, or is indexed by a variable.
        assert not {"LDL", "STL"} & found, function.splitlines()[0]


@pytest.mark.parametrize("source", SCHEDULE_TESTS, ids=name_of)
def test_schedule_holds_on_the_cpu(source: Path, tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("neither g++ nor clang++ is on PATH")
    program = tmp_path / source.stem
    warnings = ("-Wall", "-Wextra", "-Werror")
    output_of(compiler, "-std=c++20", "-O2", *warnings, "-x", "c++", source, "-o", program)
    assert output_of(program)


@pytest.mark.parametrize("path", CUDA_FILES, ids=name_of)
def test_source_includes_no_torch_header(path: Path) -> None:
    """Direct includes, and those of the headers beside them: all are in csrc."""
    seen, waiting = set(), [path]
    while waiting:
        file = waiting.pop()
        seen.add(file)
        text = file.read_text()
        assert not re.search(r"#include [<\"](torch|ATen|c10|pybind11)/", text), file
        included = [file.parent / name for name in re.findall(r'#include "(.+?)"', text)]
        waiting += [other.resolve() for other in included if other.resolve() not in seen]


def test_sanitizer_script_names_what_is_missing(tmp_path: Path) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("bash is not on PATH")
    for tool in ("dirname", "cat"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    environment = {"PATH": str(tmp_path), "CUDA_HOME": str(tmp_path)}

    def message() -> str:
        done = subprocess.run(
            [bash, str(TESTS / "sanitize.sh"), str(tmp_path / "work")],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        return done.stderr

    assert "nvcc not found" in message()
    for tool in ("nvcc", "compute-sanitizer"):
        assert f"{tool} not found" in message()
        (tmp_path / tool).write_text("#!/bin/sh\n")
        (tmp_path / tool).chmod(0o755)
    (tmp_path / "head").symlink_to(str(shutil.which("head")))
    assert "no GPU answers" in message()
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 7.5\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert "compute capability 7.5, expected 8.0 or newer" in message()
