"""The compiled module: what it reports, how an ISA is forced, what is said when it is missing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dynabert_kernels import _extension
from dynabert_kernels.doctor import doctor_report, format_report
from dynabert_kernels.ops import _cpu

ISAS = ["scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16"]


@pytest.fixture
def module() -> ModuleType:
    reason = _extension.extension_error()
    if reason is not None:
        pytest.skip(reason)
    return _extension.cpu_extension()


@pytest.fixture
def fresh_load(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Forgets what is loaded, before the test and after it."""
    caches = (_extension._load, _extension._apply_forced_isa)
    for cache in caches:
        cache.cache_clear()
    yield monkeypatch
    for cache in caches:
        cache.cache_clear()


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False
    )


def test_isa_levels_are_a_prefix_of_the_known_ones(module: ModuleType) -> None:
    supported = module.supported_isas()
    assert supported == ISAS[: len(supported)]
    assert supported[0] == "scalar"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/cpuinfo")
def test_isa_agrees_with_the_kernel_s_flags(module: ModuleType) -> None:
    with open("/proc/cpuinfo") as file:
        line = next((line for line in file if line.startswith("flags")), "")
    flags = set(line.split())
    needed = {
        "avx2": {"avx2", "fma"},
        "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
        "avx512_vnni": {"avx512_vnni"},
        "avx512_bf16": {"avx512_bf16"},
    }
    expected = ["scalar"]
    for name, flags_needed in needed.items():
        if not flags_needed <= flags:
            break
        expected.append(name)
    assert module.supported_isas() == expected


def test_every_supported_isa_can_be_forced(module: ModuleType) -> None:
    try:
        for name in module.supported_isas():
            module.force_isa(name)
            assert module.isa_name() == name
    finally:
        module.force_isa("")
    assert module.isa_name() == module.supported_isas()[-1]


def test_unknown_isa_is_refused_and_changes_nothing(module: ModuleType) -> None:
    before = module.isa_name()
    with pytest.raises(ValueError, match=r"^force_isa: name='sse2', expected one of scalar.*\."):
        module.force_isa("sse2")
    assert module.isa_name() == before


@pytest.mark.parametrize("num_threads", [1, 2])
def test_parallel_for_runs_on_the_threads_torch_was_given(
    module: ModuleType, num_threads: int
) -> None:
    torch.set_num_threads(num_threads)
    assert module.parallel_for_threads() == num_threads


def test_build_info_names_compiler_flags_torch_and_openmp(module: ModuleType) -> None:
    info = module.build_info()
    assert info["compiler"].split()[0] in ("g++", "clang")
    assert "-fopenmp" in info["flags"].split()
    assert "-march" not in info["flags"]
    assert info["torch"] == torch.__version__
    assert int(info["openmp"]) >= 200805


def test_environment_forces_the_isa(module: ModuleType) -> None:
    code = "from dynabert_kernels._extension import cpu_extension as c; print(c().isa_name())"
    assert run_python(code, DYNABERT_ISA="scalar").stdout == "scalar\n"


def test_bad_environment_isa_is_one_sentence_in_the_report() -> None:
    result = run_python(
        "import runpy; runpy.run_module('dynabert_kernels', run_name='__main__')",
        DYNABERT_ISA="avx9",
    )
    assert result.returncode == 0, result.stderr
    assert "extension  environment: DYNABERT_ISA='avx9', expected one of scalar" in result.stdout


def test_isa_of_another_cpu_is_refused(module: ModuleType, fresh_load: pytest.MonkeyPatch) -> None:
    fresh_load.setenv("DYNABERT_ISA", "avx512_bf16")
    older_cpu = ModuleType("older_cpu")
    older_cpu.supported_isas = lambda: ["scalar", "avx2"]  # type: ignore[attr-defined]
    fresh_load.setattr(_extension, "_load", lambda: (older_cpu, None))
    with pytest.raises(ValueError, match="expected one of scalar, avx2 on this CPU"):
        _extension.cpu_extension()
    fresh_load.undo()


def test_missing_extension_says_the_recorded_reason(
    tmp_path: Path, fresh_load: pytest.MonkeyPatch
) -> None:
    (tmp_path / "_build_record.json").write_text(
        '{"extension_built": false, "reason": "g++ was not found at build time"}'
    )
    fresh_load.setattr(_extension, "_PACKAGE", tmp_path)
    fresh_load.setattr(_extension.importlib.util, "find_spec", lambda name: None)
    sentence = "extension not built: g++ was not found at build time"
    assert _extension.extension_error() == sentence
    with pytest.raises(ImportError, match=re.escape(sentence)):
        _extension.cpu_extension()
    fresh_load.setattr(_cpu, "_MISSING", _cpu._find_missing())
    report = doctor_report()
    assert report["extension"] == {"reason": sentence}
    assert report["ops"]["attention"]["cpu"] == sentence
    assert report["ops"]["attention"]["reference"] is None
    assert f"extension  {sentence}" in format_report(report)


def test_an_extension_without_kernels_is_not_used(fresh_load: pytest.MonkeyPatch) -> None:
    older = ModuleType("older_sources")
    fresh_load.setattr(_extension, "_load", lambda: (older, None))
    reason = _cpu._find_missing()
    assert reason is not None
    assert reason.startswith("the extension was built from older sources")
    fresh_load.undo()


def test_damaged_record_is_no_error(tmp_path: Path, fresh_load: pytest.MonkeyPatch) -> None:
    (tmp_path / "_build_record.json").write_text('{"extension_built": fal')
    fresh_load.setattr(_extension, "_PACKAGE", tmp_path)
    fresh_load.setattr(_extension.importlib.util, "find_spec", lambda name: None)
    assert _extension.extension_error() == (
        "extension not built: no build has run. Install the package with pip"
    )


def test_unloadable_extension_names_both_torch_versions(
    tmp_path: Path, fresh_load: pytest.MonkeyPatch
) -> None:
    (tmp_path / "_build_record.json").write_text('{"extension_built": true, "torch": "1.0"}')

    def refuse(name: str) -> ModuleType:
        raise ImportError("undefined symbol: _ZN3c10")

    fresh_load.setattr(_extension, "_PACKAGE", tmp_path)
    fresh_load.setattr(_extension.importlib.util, "find_spec", lambda name: object())
    fresh_load.setattr(_extension.importlib, "import_module", refuse)
    error = _extension.extension_error()
    assert error is not None
    assert "undefined symbol" in error
    assert f"built with torch 1.0, running {torch.__version__}" in error


def test_report_lists_every_backend_of_every_op() -> None:
    ops = doctor_report()["ops"]
    assert set(ops) == {"attention", "ffn"}
    for backends in ops.values():
        assert set(backends) >= {"cuda", "triton", "cpu", "reference"}
        assert list(backends)[-1] == "reference"
        assert all(reason is None or len(reason) > 10 for reason in backends.values())


def test_report_is_plain_json() -> None:
    report = doctor_report()
    assert json.loads(json.dumps(report)) == report
