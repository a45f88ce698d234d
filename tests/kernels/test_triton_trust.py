"""Which results of the Triton kernels are trusted: proofs, first-use checks, and stepping aside.

Without a card these tests name one: the CPU counts as sm_90, where the kernels run in Triton's
interpreter or a stand-in takes their place.
"""

from __future__ import annotations

import json
import random
import warnings
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

if find_spec("triton") is None:
    pytest.skip("the triton package is not installed", allow_module_level=True)

import dynabert_kernels
from dynabert_kernels import _env, attention, ffn, proof, prove, use_backend
from dynabert_kernels.doctor import doctor_report, format_report
from dynabert_kernels.ops import _op, _self_check, _trust, gpu_embeddings
from dynabert_kernels.ops.attention import ATTENTION
from dynabert_kernels.ops.attention._triton import KERNELS as FOR_HEADS
from dynabert_kernels.ops.ffn import FFN
from dynabert_kernels.ops.ffn._triton import KERNELS as FOR_NEURONS
from dynabert_kernels.proof import Path, Proof
from dynabert_kernels.testing import random_attention, random_ffn, random_hidden, random_lengths
from dynabert_kernels.triton import availability, launch_norm
from dynabert_kernels.varlen import offsets_of

CPU = torch.device("cpu")
CARD = "sm_90"
KERNELS = {"attention": FOR_HEADS, "ffn": FOR_NEURONS}
SMALL = {
    "attention": (
        _self_check.Problem((5, 0, 9), 40, 3, 2),
        _self_check.Problem((5, 3), 40, 3, (1, 3), dropout_p=0.3),
    ),
    "ffn": (
        _self_check.Problem((5, 0, 9), 40, 70, 33),
        _self_check.Problem((5, 3), 40, 70, (33, 70), dropout_p=0.3),
    ),
}

needs_interpreter = pytest.mark.skipif(
    not _env.triton_interpret(), reason="TRITON_INTERPRET is not set"
)
both_ops = pytest.mark.parametrize("op", ["attention", "ffn"])
both_directions = pytest.mark.parametrize("direction", ["forward", "backward"])


def path_of(op, direction="forward", dtype="float32"):
    return Path("triton", op, dtype, 32 if op == "attention" else None, direction, CARD)


class FakeCheck:
    """Stands for the comparison with the reference, and notes where it was asked for."""

    def __init__(self) -> None:
        self.error: str | None = None
        self.paths: list[Path] = []

    def __call__(self, kernels, path, device, problems):
        assert not torch.compiler.is_compiling() and not _trust.is_capturing(device)
        assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
        self.paths.append(path)
        return self.error


@pytest.fixture(autouse=True)
def fresh_trust(monkeypatch):
    """Nothing is known of any path, the CPU is a card, and the automatic choice takes `triton`."""
    monkeypatch.setattr(_trust, "trusted", set())
    monkeypatch.setattr(_trust, "_agreed", set())
    monkeypatch.setattr(_trust, "_differ", {})
    monkeypatch.setattr(_op, "_warned", set())
    monkeypatch.setattr(_op, "_strict", False)
    monkeypatch.setattr(gpu_embeddings, "_said", set())
    monkeypatch.setattr(availability, "OPT_IN", None)
    if not torch.cuda.is_available():
        monkeypatch.setattr(proof, "capability", lambda device: CARD)
        for op in (ATTENTION, FFN):
            (backend,) = [backend for backend in op.backends if backend.name == "triton"]
            monkeypatch.setattr(op, "backends", (replace(backend, unproven=None),))
    proof.proofs.cache_clear()
    proof._proven_here.cache_clear()
    yield
    proof.proofs.cache_clear()
    proof._proven_here.cache_clear()


@pytest.fixture
def check(monkeypatch):
    fake = FakeCheck()
    monkeypatch.setattr(_self_check, "difference", fake)
    return fake


@pytest.fixture
def launches(monkeypatch):
    """How often each op ran on the kernels, by their last launch."""
    found, norm = [], launch_norm.residual_norm
    monkeypatch.setattr(
        launch_norm, "residual_norm", lambda *a, **k: found.append(a) or norm(*a, **k)
    )
    return found


@pytest.fixture
def proven(tmp_path, monkeypatch):
    """The file of proofs, which does not exist yet."""
    monkeypatch.setattr(proof, "PROVEN", tmp_path / "proven.json")
    monkeypatch.setattr(proof, "triton_version", lambda: "3.6.0")
    return proof.PROVEN


def inputs(op, requires_grad=False):
    hidden = random_hidden(7, 40, seed=1).requires_grad_(requires_grad)
    return hidden, random_attention(3, 32, 40) if op == "attention" else random_ffn(70, 40)


def call(op, hidden, weights):
    if op == "ffn":
        return ffn(hidden, weights, intermediate_size=33)
    return attention(hidden, weights, num_heads=2, cu_seqlens=offsets_of([3, 4]), max_seqlen=4)


def reference_as_kernels(op):
    """Kernels that are right: they are the reference."""
    kernels = KERNELS[op]

    def forward(*arguments):
        return _op.OPS[op].reference(kernels.call_of(*arguments))

    def training(*arguments):
        kept = kernels.like_training(*arguments)[1:]
        return forward(*arguments), *kept[:-1], kept[-1].fill_(_self_check._SEED)

    def backward(gradient, *others):
        arguments = others[kernels.num_kept :]
        seed = int(others[kernels.num_kept - 1])
        return kernels.reference_gradients(gradient, arguments, seed=seed)[1]

    return replace(kernels, forward=forward, training=training, backward=backward)


@both_directions
@both_ops
def test_right_kernels_agree(op, direction):
    right, path = reference_as_kernels(op), path_of(op, direction)
    assert _self_check.difference(right, path, CPU, SMALL[op]) is None
    with torch.inference_mode(), torch.autocast("cpu"):
        assert _self_check.difference(right, path, CPU, SMALL[op]) is None


@both_ops
def test_a_kernel_that_computes_wrongly_is_found(op):
    right = reference_as_kernels(op)
    wrong = replace(right, forward=lambda *a: right.forward(*a) * 1.01)
    error = _self_check.difference(wrong, path_of(op), CPU, SMALL[op])
    assert error is not None and error.startswith("output: ")


@pytest.mark.parametrize("place", range(7))
@both_ops
def test_every_gradient_is_compared(op, place):
    right = reference_as_kernels(op)

    def backward(*arguments):
        found = list(right.backward(*arguments))
        found[place] = found[place] * 1.01
        return tuple(found)

    wrong = replace(right, backward=backward)
    error = _self_check.difference(wrong, path_of(op, "backward"), CPU, SMALL[op])
    assert error is not None and error.startswith("gradient of ")


def test_a_kernel_that_cannot_be_compiled_or_gives_nan_is_found():
    right, path = reference_as_kernels("ffn"), path_of("ffn")

    def fail(*arguments):
        raise RuntimeError("out of resource:\n shared memory")

    error = _self_check.difference(replace(right, forward=fail), path, CPU, SMALL["ffn"])
    assert error == "RuntimeError: out of resource: shared memory"
    blank = replace(right, forward=lambda *a: torch.full_like(a[0], torch.nan))
    assert "NaN" in _self_check.difference(blank, path, CPU, SMALL["ffn"])


def test_no_memory_says_nothing_of_a_path():
    def fail(*arguments):
        raise torch.cuda.OutOfMemoryError("no memory")

    full = replace(FOR_NEURONS, forward=fail)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        _self_check.difference(full, path_of("ffn"), CPU, SMALL["ffn"])


@needs_interpreter
@pytest.mark.slow
@both_directions
@both_ops
def test_the_kernels_agree_at_the_sizes_of_a_first_use(op, direction):
    path = path_of(op, direction)
    assert KERNELS[op].check(path, CPU) is None


@needs_interpreter
@both_directions
@both_ops
def test_the_kernels_agree(op, direction):
    path = path_of(op, direction)
    assert _self_check.difference(KERNELS[op], path, CPU, SMALL[op]) is None


@needs_interpreter
def test_the_embeddings_agree(monkeypatch):
    path = Path("triton", "embeddings", "float32", None, "forward", CARD)
    assert _self_check.embeddings_difference(path, CPU) is None
    from dynabert_kernels.triton import embeddings

    make = embeddings.embeddings
    monkeypatch.setattr(embeddings, "embeddings", lambda *a, **k: make(*a, **k) * 1.01)
    assert "embeddings: " in _self_check.embeddings_difference(path, CPU)


@needs_interpreter
@both_ops
def test_an_unproven_path_is_checked_once(op, check, launches):
    hidden, weights = inputs(op)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            call(op, hidden, weights)
    assert check.paths == [path_of(op)] and len(launches) == 3


@needs_interpreter
def test_each_direction_and_dtype_is_a_path_of_its_own(check, launches):
    hidden, weights = inputs("ffn", requires_grad=True)
    call("ffn", hidden, weights).sum().backward()
    with torch.no_grad():
        call("ffn", hidden, weights)
        call("ffn", hidden.half(), random_ffn(70, 40, dtype=torch.float16))
    expected = [path_of("ffn", "backward"), path_of("ffn"), path_of("ffn", dtype="float16")]
    assert check.paths == expected and len(launches) == 3


@needs_interpreter
@both_directions
@both_ops
def test_a_path_that_differs_steps_aside_with_one_warning(op, direction, check, launches):
    check.error = "output: largest error 1"
    trains = direction == "backward"
    hidden, weights = inputs(op, requires_grad=trains)
    with use_backend("reference"):
        expected = call(op, hidden, weights)
    with pytest.warns(RuntimeWarning) as caught:
        results = [call(op, hidden, weights) for _ in range(3)]
    sentence = f"{path_of(op, direction)} differs from the reference: {check.error}"
    assert [sentence in str(warning.message) for warning in caught] == [True]
    assert check.paths == [path_of(op, direction)] and launches == []
    assert all(torch.equal(result, expected) for result in results)
    assert all(result.requires_grad == trains for result in results)


@needs_interpreter
@both_ops
def test_a_forced_path_that_differs_raises(op, check, launches):
    check.error = "output: largest error 1"
    hidden, weights = inputs(op)
    for _ in range(2):
        with use_backend("triton"), pytest.raises(NotImplementedError) as raised:
            call(op, hidden, weights)
        assert f"  triton: {path_of(op)} differs from the reference: out" in str(raised.value)
    assert launches == []


@needs_interpreter
def test_strict_does_not_step_aside(check, monkeypatch):
    check.error = "output: largest error 1"
    monkeypatch.setattr(_op, "_strict", True)
    with pytest.raises(NotImplementedError, match="differs from the reference"):
        call("ffn", *inputs("ffn"))


@needs_interpreter
def test_nothing_is_checked_while_a_graph_is_captured(check, launches, monkeypatch):
    hidden, weights = inputs("ffn")
    monkeypatch.setattr(_trust, "is_capturing", lambda device: True)
    with pytest.warns(
        RuntimeWarning, match="ffn forward in float32 on sm_90 has not been compared"
    ):
        call("ffn", hidden, weights)
    with use_backend("triton"), pytest.raises(NotImplementedError, match="call once before"):
        call("ffn", hidden, weights)
    assert check.paths == [] and launches == []
    monkeypatch.setattr(_trust, "is_capturing", lambda device: False)
    call("ffn", hidden, weights)
    monkeypatch.setattr(_trust, "is_capturing", lambda device: True)
    call("ffn", hidden, weights)
    assert check.paths == [path_of("ffn")] and len(launches) == 2


@pytest.mark.parametrize("error", [None, "output: largest error 1"], ids=["agrees", "differs"])
@both_directions
@both_ops
@needs_interpreter
def test_a_compiled_call_is_checked_when_it_first_runs(op, direction, error, check, launches):
    check.error = error
    torch.compiler.reset()
    compiled = torch.compile(
        lambda hidden, weights: call(op, hidden, weights), fullgraph=True, backend="aot_eager"
    )
    hidden, weights = inputs(op, requires_grad=direction == "backward")
    with use_backend("reference"):
        expected = call(op, hidden, weights)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = [compiled(hidden, weights) for _ in range(2)]
    said = [w for w in caught if f"{path_of(op, direction)} differs" in str(w.message)]
    assert len(said) == (error is not None)
    assert check.paths == [path_of(op, direction)]
    assert len(launches) == (0 if error else 2)
    for result in results:
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    if direction == "backward":
        (plain,) = torch.autograd.grad(expected.square().sum(), hidden)
        (actual,) = torch.autograd.grad(results[0].square().sum(), hidden)
        torch.testing.assert_close(actual, plain, rtol=1e-3, atol=1e-4)
    if error is not None:
        with use_backend("triton"), pytest.raises(NotImplementedError, match="differs from"):
            compiled(hidden, weights)
    torch.compiler.reset()


@needs_interpreter
def test_the_reference_in_an_overload_skips_spare_rows(check):
    check.error = "output: largest error 1"
    hidden, weights = inputs("attention")
    spare = torch.cat([hidden, torch.full((5, 40), torch.nan)])
    arguments = [getattr(weights, name) for name in weights.__dataclass_fields__][:7]
    rest = (2, None, offsets_of([3, 4]), 4, 0.0, 0.0, None, "float32")
    overload = torch.ops.dynabert.attention.triton
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="differs"):
        result = overload(spare, *arguments, *rest)
    with use_backend("reference"):
        torch.testing.assert_close(result[:7], call("attention", hidden, weights))


@pytest.mark.parametrize("seed", [None, 5], ids=["drawn", "given"])
@needs_interpreter
def test_the_reference_in_an_overload_keeps_its_masks(seed, check):
    check.error = "output: largest error 1"
    hidden, weights = inputs("ffn")
    names = list(weights.__dataclass_fields__)[:8]
    arguments = [hidden, *(getattr(weights, name) for name in names)]
    arguments += [33, None, None, 0.5, seed, "float32"]
    overloads = torch.ops.dynabert.ffn
    with pytest.warns(RuntimeWarning, match="differs"):
        output, *kept = overloads.triton_training(*arguments)
    ones = torch.ones_like(output)
    gradients = overloads.triton_backward(ones, *kept, *arguments)
    arguments[-2] = int(kept[-1]) if seed is None else seed
    with use_backend("reference"):
        again, expected = FOR_NEURONS.reference_gradients(
            ones, tuple(arguments), seed=arguments[-2]
        )
    torch.testing.assert_close(output, again)
    for actual, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@needs_interpreter
def test_fake_tensors_check_nothing(check):
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        assert call("ffn", *inputs("ffn")).shape == (7, 40)
    assert check.paths == []


@needs_interpreter
def test_a_check_may_come_from_inside_a_backward_pass(launches, monkeypatch):
    """Reentrant checkpointing runs the first call with gradients in autograd's engine."""
    monkeypatch.setattr(_self_check, "FIRST_USE", {"triton": SMALL})
    hidden, weights = inputs("ffn", requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint(call, "ffn", hidden, weights, use_reentrant=True).sum().backward()
    assert hidden.grad is not None
    assert _trust._agreed == {path_of("ffn"), path_of("ffn", "backward")}


@needs_interpreter
def test_embeddings_that_differ_step_aside_or_raise(monkeypatch):
    word = torch.zeros(3, 8)
    monkeypatch.setattr(_self_check, "embeddings_difference", lambda *a: "embeddings: error 1")
    sentence = "embeddings forward in float32 on sm_90 differs from the reference: embeddings: err"
    with pytest.warns(RuntimeWarning, match=sentence) as caught:
        assert not gpu_embeddings._is_trusted(word) and not gpu_embeddings._is_trusted(word)
    assert len(caught) == 1
    with use_backend("triton"), pytest.raises(NotImplementedError, match=sentence):
        gpu_embeddings._is_trusted(word)


def proof_of(path, triton="3.6.0", date="2026-01-01"):
    return Proof(path, "Some card", "2.11.0", triton, date)


@needs_interpreter
def test_a_proven_path_is_not_checked(check, proven, launches):
    proof.write(proven, [proof_of(path_of("ffn"))])
    call("ffn", *inputs("ffn"))
    assert check.paths == [] and len(launches) == 1
    call("ffn", *inputs("ffn", requires_grad=True))
    assert check.paths == [path_of("ffn", "backward")]


def test_a_proof_holds_for_the_triton_that_it_names(proven, monkeypatch):
    proof.write(proven, [proof_of(path_of("ffn"), triton="3.6.1"), proof_of(path_of("attention"))])
    assert proof.is_proven(path_of("ffn"))
    proof._proven_here.cache_clear()
    monkeypatch.setattr(proof, "triton_version", lambda: "3.7.0")
    assert not proof.is_proven(path_of("ffn"))


def test_proofs_are_replaced_by_newer_ones_and_by_failures(proven):
    first, second = path_of("attention", "backward"), path_of("ffn")
    proof.write(proven, [proof_of(second), proof_of(first), proof_of(second, triton="3.5.0")])
    read = [(p.path, p.kernels) for p in proof.read(proven)]
    assert read == [(second, "3.5.0"), (first, "3.6.0"), (second, "3.6.0")]
    proof.write(proven, [proof_of(second, date="2026-02-02")], tried=[first, second])
    assert proof.read(proven) == (
        proof_of(second, triton="3.5.0"),
        proof_of(second, date="2026-02-02"),
    )
    assert list(json.loads(proven.read_text())[0]) == [
        *("backend", "op", "dtype", "head_dim", "direction", "capability"),
        *("card", "torch", "kernels", "date"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        '[{"op": ',
        '{"op": "ffn"}',
        "[1]",
        '[{"op": "ffn"}]',
        "3",
        '[{"backend": "triton", "op": "x", "dtype": "float32", "head_dim": null, '
        '"direction": "forward", "capability": "sm_90"}]',
    ],
    ids=["cut", "object", "number", "field", "scalar", "path"],
)
def test_a_damaged_file_proves_nothing_and_says_so_once(text, proven):
    proven.write_text(text)
    with pytest.warns(RuntimeWarning, match=r"no recorded proof can be read.*proven\.json is dam"):
        assert not proof.is_proven(path_of("ffn"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not proof.is_proven(path_of("ffn"))
    with pytest.raises(ValueError, match=r"proven\.json is damaged"):
        proof.write(proven, [])
    assert proven.read_text() == text


def test_a_missing_file_proves_nothing(proven):
    with pytest.warns(RuntimeWarning, match="no recorded proof can be read"):
        assert proof.proofs() == ()


def test_the_file_of_the_package_can_be_read():
    assert set(proof.read(proof.PROVEN)) == set(proof.proofs())


def test_doctor_lists_what_is_proven_and_what_will_check_itself(proven, monkeypatch):
    paths = proof.all_paths("triton", CARD)
    proof.write(proven, [proof_of(path) for path in paths if path.op != "attention"])
    properties = type("Properties", (), {"name": "H", "major": 9, "minor": 0, "total_memory": 0})
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(proof, "capability", lambda device: CARD)
    _trust._differ[path_of("attention")] = "attention forward differs"
    report = doctor_report()
    assert json.loads(json.dumps(report)) == report
    standing = report["triton"]["cards"][CARD]
    assert standing[str(path_of("ffn"))] == "proven"
    assert standing[str(path_of("attention", "backward"))] is None
    text = format_report(report)
    assert "triton     9 paths proven on Some card (sm_90), kernels 3.6.0, torch 2.11.0" in text
    assert "triton     on sm_90 here: 9 of 33 paths proven or checked\n" in text
    assert "at their first call: attention forward (11), attention backward (12)\n" in text
    assert text.endswith("triton     not used: attention forward differs")


def test_compilations_are_counted(monkeypatch):
    from dynabert_kernels.triton import dispatch

    monkeypatch.setattr(dispatch, "_compiled", {"kernel", "other"})
    assert dynabert_kernels.triton_compilations() == 2
    assert doctor_report()["triton"]["compilations"] == 2


def test_prove_writes_the_paths_that_agree(monkeypatch, proven, capsys):
    def differ(path, device):
        return "output: error 1" if path == path_of("ffn", "backward") else None

    monkeypatch.setattr(prove, "difference", differ)
    absent = {"cuda": "the kernels were not built", "triton": None}
    monkeypatch.setattr(prove, "missing", absent.get)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some card")
    monkeypatch.setattr(proof, "capability", lambda device: CARD)
    proof.write(proven, [proof_of(path_of("ffn", "backward"))])
    assert prove.main(["--out", str(proven), "--processes", "1"]) == 1
    written = {entry.path for entry in proof.read(proven)}
    assert written == set(proof.all_paths("triton", CARD)) - {path_of("ffn", "backward")}
    out, err = capsys.readouterr()
    assert err == "prove: cuda is left out: the kernels were not built\n"
    assert "triton  attention  backward  bfloat16  32 64 80 128\n" in out
    assert "triton  ffn        backward  float32   -\n" in out
    assert (
        "triton: ffn backward in float32 on sm_90: output: error 1\n32 of 33 paths proven in "
        in out
    )


def test_prove_needs_a_card(monkeypatch, proven, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert prove.main(["--out", str(proven)]) == 2
    assert "expected a CUDA device" in capsys.readouterr().err and not proven.exists()


@pytest.mark.gpu
def test_every_path_agrees_on_this_card(tmp_path, capsys):
    outcome = prove.main(["--out", str(tmp_path / "proven.json")])
    assert outcome == 0, capsys.readouterr().out


@pytest.mark.gpu
def test_mixed_calls_compile_nothing_after_warm_up():
    """10,000 calls of both ops: host and device widths, batches of 1 to 16, lengths up to 200."""
    draw, device = random.Random(0), torch.device("cuda")
    options = {"dtype": torch.bfloat16, "device": device}
    for_heads, for_neurons = (
        random_attention(12, 64, 768, **options),
        random_ffn(3072, 768, **options),
    )
    widths = [torch.tensor([n], dtype=torch.int32, device=device) for n in (3, 6, 9, 12)]
    neurons = [torch.tensor([n], dtype=torch.int32, device=device) for n in (768, 1536, 2304, 3072)]

    def one_call(batch_size, longest):
        lengths = random_lengths(batch_size, longest, seed=draw.randrange(2**30))
        hidden = torch.zeros(sum(lengths), 768, **options)
        offsets, on_device = offsets_of(lengths, device), draw.random() < 0.5
        heads = draw.choice(widths) if on_device else draw.randint(1, 12)
        size = draw.choice(neurons) if on_device else draw.randint(1, 3072)
        middle = attention(
            hidden, for_heads, num_heads=heads, cu_seqlens=offsets, max_seqlen=longest
        )
        ffn(middle, for_neurons, intermediate_size=size, cu_seqlens=offsets)

    with torch.no_grad(), use_backend("triton"):
        for _ in range(1500):
            one_call(draw.randint(1, 16), draw.randint(1, 200))
        before = dynabert_kernels.triton_compilations()
        for _ in range(5000):
            one_call(draw.randint(1, 16), draw.randint(1, 200))
    assert before > 0
    assert dynabert_kernels.triton_compilations() == before
