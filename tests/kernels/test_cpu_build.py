"""The machine code of the extension: each instruction set stays in its own functions, and the sums
of a tile stay in registers."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from dynabert_kernels import _extension

# What only a later instruction set has: wider or more registers, dot products, conversions.
FORBIDDEN = {
    "scalar": r"%[yz]mm|%xmm(1[6-9]|[23]\d)|\tv",
    "avx2": r"%zmm|%[xy]mm(1[6-9]|[23]\d)|%k\d|\tvpdp|\tvdpbf16ps",
    "avx512": r"\tvpdp|\tvdpbf16ps|\tvcvtne",
    "avx512_vnni": r"\tvdpbf16ps|\tvcvtne",
    "avx512_bf16": r"\tvp2intersect",
}
# The products whose tile is as large as the registers allow; the others put theirs together from
# more instructions, and may keep operands on the stack.
PRODUCTS = {
    ("avx2", "DotFloat32"): r"\tvfmadd\w+ .*%ymm",
    ("avx512", "DotFloat32"): r"\tvfmadd\w+ .*%zmm",
    ("avx512_vnni", "DotInt8"): r"\tvpdpbusd .*%zmm",
    ("avx512_bf16", "DotFloat32"): r"\tvfmadd\w+ .*%zmm",
    ("avx512_bf16", "DotBFloat16"): r"\tvdpbf16ps .*%zmm",
    ("avx512_bf16", "DotInt8"): r"\tvpdpbusd .*%zmm",
}


class Instruction(NamedTuple):
    address: int
    text: str


class Binary(NamedTuple):
    functions: dict[str, list[Instruction]]
    weak: set[str]

    def of_isa(self, isa: str) -> dict[str, list[Instruction]]:
        """The functions of one namespace, by their mangled names."""
        namespace = f"N8dynabert{len(isa)}{isa}"
        return {name: code for name, code in self.functions.items() if namespace in name}


@pytest.fixture(scope="module")
def binary() -> Binary:
    reason = _extension.extension_error()
    if reason is not None:
        pytest.skip(reason)
    if platform.machine() != "x86_64":
        pytest.skip(f"reads x86-64 code, this is {platform.machine()}")
    if not {"gcc", "g++"} & set(_extension.cpu_extension().build_info()["compiler"].split()):
        pytest.skip("what is asserted of registers was measured with g++")
    missing = [tool for tool in ("nm", "objdump") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not found. Install binutils")
    path = Path(str(_extension.cpu_extension().__file__))
    symbols = [line.split() for line in output_of("nm", "--defined-only", path).splitlines()]
    if not symbols:
        pytest.skip("the extension is stripped of its symbols")
    weak = {name for _, kind, name in symbols if kind in "WVu"}
    functions: dict[str, list[Instruction]] = {}
    code: list[Instruction] = []
    for line in output_of("objdump", "-d", "--no-show-raw-insn", path).splitlines():
        if line.endswith(">:"):
            code = functions.setdefault(line.split("<", 1)[1][:-2], [])
        elif line.startswith(" "):
            address, text = line.split(":", 1)
            code.append(Instruction(int(address, 16), text))
    return Binary(functions, weak)


def output_of(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_what_other_libraries_may_share_has_no_wide_instruction(binary: Binary) -> None:
    """Of equal weak functions the linker keeps one for all: it has to run on every CPU."""
    shared = binary.weak & set(binary.functions)
    assert shared
    wide = re.compile(FORBIDDEN["scalar"])
    assert [
        n for n in sorted(shared) if any(wide.search(i.text) for i in binary.functions[n])
    ] == []


@pytest.mark.parametrize("isa", FORBIDDEN)
def test_an_instruction_set_uses_no_instruction_of_a_later_one(binary: Binary, isa: str) -> None:
    functions = binary.of_isa(isa)
    assert any("multiply_tile" in name for name in functions)
    later = re.compile(FORBIDDEN[isa])
    found = {i.text.strip() for code in functions.values() for i in code if later.search(i.text)}
    assert found == set()


def inner_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The bodies of conditional backward jumps that hold no other one and no return."""
    places = {instruction.address: place for place, instruction in enumerate(code)}
    loops: list[tuple[int, int]] = []
    for last, instruction in enumerate(code):
        jump = re.match(r"\tj(?!mp)\w+\s+([0-9a-f]+)", instruction.text)
        first = places.get(int(jump[1], 16), last + 1) if jump else last + 1
        if first <= last and not any("\tret" in i.text for i in code[first:last]):
            loops.append((first, last))
    return [
        code[first : last + 1]
        for first, last in loops
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in loops)
    ]


@pytest.mark.parametrize(("isa", "dot"), PRODUCTS)
def test_sums_of_a_tile_stay_in_registers(binary: Binary, isa: str, dot: str) -> None:
    product = re.compile(PRODUCTS[isa, dot])
    loops = [
        (name, loop)
        for name, code in binary.of_isa(isa).items()
        if "multiply_tile" in name and dot in name
        for loop in inner_loops(code)
        if any(product.search(i.text) for i in loop)
    ]
    # Among them the full tile, whose sums take most of the registers.
    assert max(sum(bool(product.search(i.text)) for i in loop) for _, loop in loops) >= 12
    for name, loop in loops:
        on_stack = [i.text for i in loop if re.search(r"\(%r[sb]p", i.text) and "mm" in i.text]
        assert on_stack == [], name
