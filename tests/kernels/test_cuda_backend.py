"""Backend `cuda` around its kernels: when it is chosen, what it says, what proves it, its build.

None of this needs a GPU, nvcc or the emulation.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import types
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools
import torch

from dynabert_kernels import _cuda_extension, attention, ffn, proof, prove, use_backend
from dynabert_kernels.doctor import doctor_report, format_report
from dynabert_kernels.ops import _cuda, _op, _self_check, _trust
from dynabert_kernels.ops.attention import ATTENTION
from dynabert_kernels.ops.attention import _cuda as cuda_attention
from dynabert_kernels.ops.ffn import FFN
from dynabert_kernels.ops.ffn import _cuda as cuda_ffn
from dynabert_kernels.proof import Path as ProofPath
from dynabert_kernels.proof import Proof
from dynabert_kernels.testing import random_attention, random_ffn, random_hidden
from dynabert_kernels.varlen import offsets_of
from tests.kernels.emulation import CHECKOUT, build_script

CARD = "sm_90"
INFO = {
    "architectures": ["80", "86", "90a", "120"],
    "ptx": "120",
    "nvcc": "13.0",
    "sources": "0123456789ab",
    "emulated": False,
}
build_cuda = build_script()


# --- when it runs


@pytest.mark.parametrize("op", [ATTENTION, FFN], ids=["attention", "ffn"])
def test_it_comes_before_triton(op):
    assert op.backend_names == ("cpu", "cuda", "triton", "reference")
    (backend,) = [backend for backend in op.backends if backend.name == "cuda"]
    assert backend.training is None and backend.backward is None


def test_it_yields_where_nobody_has_timed_it(monkeypatch):
    one, two = torch.ones(1, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    untimed = "only bfloat16 on sm_90 has been timed beside the Triton kernels"
    for capability, compute, tokens, each, sentence in (
        ((9, 0), "bfloat16", 4096, None, None),
        ((9, 0), "bfloat16", 4096, one, None),
        ((9, 0), "float16", 4096, None, untimed),
        ((8, 0), "bfloat16", 4096, None, untimed),
        (
            (9, 0),
            "bfloat16",
            4095,
            None,
            "fewer than 4096 tokens leave multiprocessors without a tile",
        ),
        ((9, 0), "bfloat16", 4096, two, "a batch of several widths runs on the kernels for sm_80"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert _cuda.yields(torch.zeros(tokens, 8), compute, each) == sentence


def half(*sizes):
    return torch.zeros(*sizes, dtype=torch.bfloat16)


def reason(**changes):
    call = {
        "hidden": half(4, 16),
        "matrices": (half(3, 16), half(3, 16)),
        "vectors": (half(3), half(16), half(16), half(16)),
        "compute": torch.bfloat16,
        "quantization": None,
    }
    return _cuda.why_not(**call | changes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, None),
        ({"hidden": torch.zeros(4, 16), "compute": torch.float16}, None),
        ({"quantization": "int8"}, "the weights have quantization='int8', which is not implemen"),
        ({"compute": torch.float32}, "it would compute in torch.float32, expected bfloat16 or flo"),
        ({"hidden": half(4, 20)}, "hidden_size=20, expected a multiple of 8 up to 8192"),
        ({"hidden": half(4, 8200)}, "hidden_size=8200, expected a multiple of 8 up to 8192"),
        (
            {"hidden": half(4, 16).double()},
            "hidden is torch.float64, expected bfloat16, float16 or",
        ),
        ({"matrices": (half(16, 3).T, half(3, 16))}, "a weight matrix is not contiguous"),
        (
            {"vectors": (half(4)[1:], half(16), half(16), half(16))},
            "a weight does not start at a multiple of 16 bytes of its storage",
        ),
    ],
)
def test_it_says_what_it_cannot_run(changes, sentence):
    found = reason(**changes)
    assert found == sentence if sentence is None else found.startswith(sentence)


@pytest.mark.parametrize(
    ("capability", "sentence"),
    [
        ((7, 5), "the card is sm_75, expected sm_80 or newer"),
        ((8, 0), None),
        ((8, 9), None),
        ((9, 0), None),
        (
            (10, 0),
            "the card is sm_100, and the kernels were built for sm_80, sm_86, sm_90a, sm_120",
        ),
        ((12, 1), None),
    ],
)
def test_it_says_which_cards_it_was_built_for(capability, sentence, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(_cuda, "_COVERED", _cuda_extension.covered_capabilities(INFO))
    monkeypatch.setattr(_cuda, "_BUILT_FOR", "sm_80, sm_86, sm_90a, sm_120")
    device = SimpleNamespace(type="cuda")
    hidden = SimpleNamespace(device=device, dtype=torch.bfloat16, shape=(4, 16))
    assert reason(hidden=hidden) == sentence


def test_code_covers_later_cards_of_its_generation_and_ptx_all_later_ones():
    def covered(architectures, ptx=""):
        return _cuda_extension.covered_capabilities({"architectures": architectures, "ptx": ptx})

    assert covered(["86"]) == {(8, 6), (8, 7), (8, 8), (8, 9)}
    assert covered(["90a"]) == {(9, 0)}
    assert {(8, 9), (9, 0), (12, 1), (99, 9)} <= covered(["89"], "89")
    assert (8, 8) not in covered(["89"], "89")


@pytest.fixture
def on_the_cpu(monkeypatch):
    """The CPU counts as a card of this backend alone, whose kernels are the reference."""
    monkeypatch.setattr(_op, "_warned", set())
    monkeypatch.setattr(_trust, "trusted", set())
    monkeypatch.setattr(_trust, "_agreed", set())
    monkeypatch.setattr(_trust, "_differ", {})
    monkeypatch.setattr(proof, "capability", lambda device: CARD)
    monkeypatch.setattr(proof, "is_proven", lambda path: False)
    ran = []
    for op, module in ((ATTENTION, cuda_attention), (FFN, cuda_ffn)):
        backend = module.BACKEND.__class__(
            "cuda",
            "cpu",
            scope=module._scope,
            why_not=module.why_not,
            doubt=module._doubt,
        )
        monkeypatch.setattr(op, "backends", (backend,))
        monkeypatch.setitem(
            op._overloads, "cuda", lambda *a, op=op: ran.append(op.name) or a[0].clone()
        )
    return ran


def call(op, hidden, **more):
    if op == "ffn":
        weights = random_ffn(24, 16, dtype=torch.bfloat16)
        return ffn(hidden, weights, intermediate_size=9, **more)
    weights = random_attention(2, 32, 16, dtype=torch.bfloat16)
    offsets = offsets_of([4])
    return attention(hidden, weights, num_heads=1, cu_seqlens=offsets, max_seqlen=4, **more)


both_ops = pytest.mark.parametrize("op", ["attention", "ffn"])


@both_ops
def test_calls_it_is_not_made_for_take_the_reference_in_silence(op, on_the_cpu, monkeypatch):
    monkeypatch.setattr(_self_check, "difference", lambda *arguments: None)
    hidden = random_hidden(4, 16, dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(op, hidden.clone().requires_grad_())
        with torch.no_grad():
            call(op, hidden, dropout_p=0.5)
            assert on_the_cpu == []
            call(op, hidden)
    assert on_the_cpu == [op]


@both_ops
def test_a_forced_call_that_needs_gradients_says_so(op, on_the_cpu):
    hidden = random_hidden(4, 16, dtype=torch.bfloat16).requires_grad_()
    sentence = r"\n  cuda: the call needs gradients, and this backend has no backward\. Call it "
    with use_backend("cuda"), pytest.raises(NotImplementedError, match=sentence):
        call(op, hidden)


@both_ops
def test_its_first_call_is_compared_and_steps_aside_where_it_differs(op, on_the_cpu, monkeypatch):
    asked = []

    def differ(kernels, path, device, problems):
        asked.append(path)
        assert kernels.backend == "cuda"
        assert problems == _self_check.FIRST_USE["cuda"][op]
        return "output: largest error 1"

    monkeypatch.setattr(_self_check, "difference", differ)
    hidden = random_hidden(4, 16, dtype=torch.bfloat16)
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="because cuda: .* differs") as caught:
        results = [call(op, hidden) for _ in range(2)]
        with use_backend("reference"):
            expected = call(op, hidden)
    head_dim = 32 if op == "attention" else None
    assert asked == [ProofPath("cuda", op, "bfloat16", head_dim, "forward", CARD)]
    assert len(caught) == 1 and on_the_cpu == []
    assert all(torch.equal(result, expected) for result in results)


def test_what_is_said_without_a_module(monkeypatch, tmp_path):
    monkeypatch.setattr(_cuda_extension, "_PACKAGE", tmp_path)
    monkeypatch.setattr(_cuda_extension, "_NAME", "dynabert_kernels._C_cuda_absent")
    monkeypatch.setattr(_cuda_extension._env, "cuda_emulation", lambda: None)
    _cuda_extension._load.cache_clear()
    try:
        assert _cuda_extension.cuda_error() == (
            "CUDA kernels not built: no build has run. Install the package with pip, where nvcc is"
        )
        (tmp_path / "_build_record.json").write_text('{"cuda_reason": "nvcc was not found"}')
        _cuda_extension._load.cache_clear()
        with pytest.raises(ImportError, match=r"^CUDA kernels not built: nvcc was not found$"):
            _cuda_extension.cuda_extension()
        assert _cuda_extension.build_info() is None and _cuda_extension.kernels_version() is None
        monkeypatch.setattr(_cuda_extension._env, "cuda_emulation", lambda: str(tmp_path / "no.so"))
        _cuda_extension._load.cache_clear()
        assert _cuda_extension.cuda_error().startswith("CUDA kernels not loadable: ")
    finally:
        _cuda_extension._load.cache_clear()


def test_what_is_said_of_a_module_that_does_not_fit(monkeypatch):
    older, module = types.ModuleType("kernels"), types.ModuleType("kernels")
    monkeypatch.setattr(_cuda_extension, "_load", lambda: (older, None))
    assert _cuda_extension.cuda_error() == (
        "the CUDA kernels were built from older sources. Build them again"
    )
    monkeypatch.setattr(_cuda_extension, "_load", lambda: (module, None))
    for driver, runtime, sentence in (
        (0, 13000, None),  # there is none: other sentences say so
        (13010, 13000, None),
        (13000, 13020, None),
        (
            12080,
            13000,
            "the driver is for CUDA 12, and the kernels were built with CUDA 13. "
            "Update the driver, or build them with an older toolkit",
        ),
    ):
        module.versions = lambda found=(driver, runtime): found
        assert _cuda_extension.cuda_error() == sentence


# --- what is proven


@pytest.fixture
def built(monkeypatch):
    """The module is there, as `doctor` and proofs see it."""
    monkeypatch.setattr(_cuda_extension, "build_info", lambda: dict(INFO))
    monkeypatch.setattr(_cuda_extension, "cuda_error", lambda: None)
    monkeypatch.setattr(_cuda_extension, "OPT_IN", None)
    proof.proofs.cache_clear()
    proof._proven_here.cache_clear()
    yield
    proof.proofs.cache_clear()
    proof._proven_here.cache_clear()


def test_the_encoder_is_a_path_of_the_cards_it_is_made_for():
    on_hopper, elsewhere = (proof.all_paths("cuda", card) for card in ("sm_90", "sm_80"))
    assert len(elsewhere) == 2 * (4 + 1) and len(on_hopper) == len(elsewhere) + 2
    assert {path.op for path in elsewhere} == {"attention", "ffn"}
    assert {path.direction for path in on_hopper} == {"forward"}


def test_a_proof_holds_for_the_sources_and_the_compiler_that_it_names(built, tmp_path, monkeypatch):
    monkeypatch.setattr(proof, "PROVEN", tmp_path / "proven.json")
    paths = proof.all_paths("cuda", CARD)[:3]
    versions = ["0123456789ab nvcc 13.0", "0123456789ab nvcc 12.9", "ba9876543210 nvcc 13.0"]
    entries = [Proof(p, "H", "2.11.0", v, "d") for p, v in zip(paths, versions, strict=True)]
    proof.write(proof.PROVEN, entries)
    assert [proof.is_proven(path) for path in paths] == [True, False, False]
    assert set(proof.read(proof.PROVEN)) == set(entries)
    proof.write(proof.PROVEN, [], tried=paths)
    assert {entry.path for entry in proof.read(proof.PROVEN)} == set(paths[1:])


def test_doctor_says_what_was_built_and_how_paths_stand(built, tmp_path, monkeypatch):
    monkeypatch.setattr(proof, "PROVEN", tmp_path / "proven.json")
    paths = proof.all_paths("cuda", CARD)
    version = "0123456789ab nvcc 13.0"
    proven = [
        Proof(path, "Some card", "2.11.0", version, "d") for path in paths if path.op == "ffn"
    ]
    proof.write(proof.PROVEN, proven)
    properties = SimpleNamespace(name="H", major=9, minor=0, total_memory=0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(_trust, "_differ", {})
    report = doctor_report()
    assert json.loads(json.dumps(report)) == report
    assert report["cuda"]["build"] == INFO
    assert report["cuda"]["cards"][CARD][str(proven[0].path)] == "proven"
    text = format_report(report)
    assert (
        "cuda       built with nvcc 13.0 for sm_80, sm_86, sm_90a, sm_120, PTX of compute_120, "
        "sources 0123456789ab\n"
        "cuda       2 paths proven on Some card (sm_90), kernels 0123456789ab nvcc 13.0, "
    ) in text
    assert "cuda       on sm_90 here: 2 of 12 paths proven or checked\n" in text
    assert "at their first call: attention forward (8), encoder forward (2)\n" in text


def test_prove_compares_the_backends_that_are_there(built, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prove, "difference", lambda path, device: None)
    monkeypatch.setattr(prove.availability, "triton_missing", lambda: "no triton")
    monkeypatch.setattr(prove.availability, "OPT_IN", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some card")
    monkeypatch.setattr(proof, "capability", lambda device: CARD)
    file = tmp_path / "proven.json"
    assert prove.main(["--out", str(file), "--processes", "1"]) == 0
    out, err = capsys.readouterr()
    assert err == "prove: triton is left out: no triton\n"
    assert "cuda    encoder    forward   bfloat16  32 64\n12 of 12 paths proven in " in out
    assert {entry.kernels for entry in proof.read(file)} == {"0123456789ab nvcc 13.0"}


# --- the build

FAKE_NVCC = """#!/bin/sh
case "$*" in
  --version) echo "Cuda compilation tools, release {release}, V{release}.1";;
  --list-gpu-arch) printf 'compute_%s\\n' {known};;
  *) for word; do out=$word; done; echo "$out" >> {log}
     : > "$out"
     case "$out" in *.o) echo "$out: {header}" > "$out.d";; esac;;
esac
"""


@pytest.fixture
def toolkit(tmp_path):
    """Makes a folder with an nvcc that notes what it should make."""

    def make(release="13.0", known=("75", "80", "86", "89", "90", "100", "120")):
        nvcc = tmp_path / "cuda" / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True, exist_ok=True)
        header = tmp_path / "header.h"
        header.touch()
        nvcc.write_text(
            FAKE_NVCC.format(
                release=release, known=" ".join(known), log=tmp_path / "log", header=header
            )
        )
        nvcc.chmod(0o755)
        return str(tmp_path / "cuda")

    return make


def codes(compiler, name):
    (source,) = [path for path in build_cuda.sources() if path.name == name]
    return [flag.removeprefix("-gencode=arch=") for flag in compiler.code_flags(source)]


def test_sources_are_the_kernels_and_the_module():
    names = [path.relative_to(CHECKOUT).as_posix() for path in build_cuda.sources()]
    kernels = {"csrc/cuda/gemm_sm90.cu", "csrc/encoder/encoder_cuda.cu"}
    assert kernels < set(names) and names[-1] == "csrc/registration_cuda.cpp"
    assert not [name for name in names if "tests" in name or name.endswith("_cpu.cpp")]


def test_every_source_names_its_architectures(toolkit):
    compiler = build_cuda.nvcc_compiler(toolkit())
    every = [f"compute_{a},code=sm_{a}" for a in ("80", "86", "89", "90a", "100", "120")]
    assert codes(compiler, "gemm_sm90.cu") == ["compute_90a,code=sm_90a"]
    assert codes(compiler, "encoder_cuda.cu") == ["compute_90a,code=sm_90a"]
    others = [p.name for p in build_cuda.sources() if p.suffix == ".cu" and "sm90" not in p.name]
    for name in set(others) - {"encoder_cuda.cu"}:
        assert codes(compiler, name) == [*every, "compute_120,code=compute_120"], name
    assert codes(compiler, "registration_cuda.cpp") == []
    assert "-std=c++20" in compiler.compile and "-lineinfo" not in compiler.compile
    assert "-cudart=static" in compiler.link


def test_nvcc_that_knows_fewer_makes_fewer(toolkit):
    compiler = build_cuda.nvcc_compiler(toolkit("12.0", ("80", "86", "89", "90")))
    assert compiler.architectures == ("80", "86", "89", "90a")
    assert (compiler.ptx, compiler.release) == ("89", "12.0")


def test_named_architectures_are_all_that_is_made(toolkit):
    compiler = build_cuda.nvcc_compiler(toolkit(), ["90a"], "some-c++")
    assert (compiler.architectures, compiler.ptx) == (("90a",), "")
    assert compiler.compile[-2:] == ("-ccbin", "some-c++")
    with pytest.raises(build_cuda.BuildError, match="architectures=80,67, expected some of 75, 80"):
        build_cuda.nvcc_compiler(toolkit(), ["80", "67"])


def test_a_missing_or_old_toolkit_is_a_sentence(toolkit, tmp_path, monkeypatch):
    with pytest.raises(build_cuda.BuildError, match=r"nvcc is of release 11\.8, expected 12\.0"):
        build_cuda.nvcc_compiler(toolkit("11.8"))
    with pytest.raises(build_cuda.BuildError, match=f"nvcc was not found in {tmp_path}/bin at"):
        build_cuda.nvcc_compiler(str(tmp_path))
    with pytest.raises(build_cuda.BuildError, match=r"cuda_runtime_api\.h was not found in "):
        build_cuda.emulating_compiler(str(tmp_path))
    monkeypatch.setattr(build_cuda, "TOOLKIT", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build_cuda.BuildError, match=f"not found on PATH or in {tmp_path}/bin at"):
        build_cuda.nvcc_compiler()


def test_the_command_line_says_what_is_missing(tmp_path):
    command = [sys.executable, str(CHECKOUT / "csrc" / "cuda" / "build_cuda.py")]
    options = ["--out", str(tmp_path / "out"), "--cuda-home", str(tmp_path)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    assert done.stderr.startswith(f"build_cuda: nvcc was not found in {tmp_path}/bin at build time")


def test_a_build_compiles_what_has_changed(toolkit, tmp_path):
    pytest.importorskip("ninja")
    compiler = build_cuda.nvcc_compiler(toolkit())
    out, work, log = tmp_path / "out", tmp_path / "work", tmp_path / "log"

    def made():
        built = build_cuda.build(out, compiler, work=work, jobs=2)
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return built, [Path(line).name for line in lines]

    built, names = made()
    assert built.parent == out and re.fullmatch(r"_C_cuda\..*\.so", built.name)
    objects = [f"{str(p.relative_to(build_cuda.CSRC)).replace('/', '.')}.o" for p in
               build_cuda.sources()]  # fmt: skip
    assert sorted(names) == sorted([*objects, built.name])
    assert made()[1] == []
    header = tmp_path / "header.h"  # on which, by what nvcc wrote, all depend
    os.utime(header, (4e9, 4e9))
    assert len(made()[1]) == len(objects) + 1
    info = (work / "build_info.h").read_text()
    assert 'kBuildArchitectures[] = "80,86,89,90a,100,120"' in info
    assert f'kBuildSources[] = "{build_cuda.source_hash()}"' in info


def test_a_failing_build_is_a_sentence(toolkit, tmp_path):
    pytest.importorskip("ninja")
    compiler = build_cuda.nvcc_compiler(toolkit())
    (tmp_path / "cuda" / "bin" / "nvcc").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(build_cuda.BuildError, match=r"^compiling or linking the CUDA kernels fail"):
        build_cuda.build(tmp_path / "out", compiler)


@pytest.fixture
def setup_script(monkeypatch):
    """The names of setup.py, which builds nothing while it is read."""
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    monkeypatch.setenv("DYNABERT_NO_EXTENSION", "1")
    monkeypatch.syspath_prepend(str(CHECKOUT / "csrc" / "cuda"))
    return runpy.run_path(str(CHECKOUT / "setup.py"))


def test_the_build_is_recorded(setup_script, toolkit, tmp_path, monkeypatch):
    pytest.importorskip("ninja")
    command = SimpleNamespace(build_lib=str(tmp_path / "lib"), build_temp=str(tmp_path / "temp"))
    folder = tmp_path / "lib" / "dynabert_kernels"

    def record():
        found = setup_script["cuda_record"](command)
        setup_script["record_outcome"](command, "no compiler", found)
        assert json.loads((folder / "_build_record.json").read_text()) == found | {
            "extension_built": False,
            "reason": "no compiler",
        }
        return found

    monkeypatch.delenv("DYNABERT_CUDA_ARCHITECTURES", raising=False)
    monkeypatch.setenv("CUDA_HOME", toolkit())
    assert record() == {
        "cuda_built": True,
        "cuda_reason": None,
        "cuda_architectures": ["80", "86", "89", "90a", "100", "120"],
        "nvcc": "13.0",
    }
    assert len(list(folder.glob("_C_cuda.*.so"))) == 1
    monkeypatch.setenv("DYNABERT_CUDA_ARCHITECTURES", "80, 90a")
    assert record()["cuda_architectures"] == ["80", "90a"]
    monkeypatch.setenv("DYNABERT_CUDA_ARCHITECTURES", "none")
    assert record() == {
        "cuda_built": False,
        "cuda_reason": "DYNABERT_CUDA_ARCHITECTURES was none at build time",
    }
    monkeypatch.delenv("DYNABERT_CUDA_ARCHITECTURES")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert record()["cuda_reason"].startswith(f"nvcc was not found in {tmp_path}/bin at build")


def test_the_cpu_extension_leaves_the_cuda_module_out(setup_script):
    names = set(setup_script["SOURCES"])
    assert "csrc/registration_cpu.cpp" in names and "csrc/registration_cuda.cpp" not in names
