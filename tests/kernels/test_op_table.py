from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import dynabert_kernels
from dynabert_kernels import ffn, use_backend
from dynabert_kernels.ops import OPS, Backend, Op, _op, forced_backend
from dynabert_kernels.ops._op import Training
from dynabert_kernels.ops.attention import ATTENTION
from dynabert_kernels.ops.ffn import FFN
from dynabert_kernels.testing import random_ffn, random_hidden


class ScaleCall(NamedTuple):
    hidden: Tensor
    factor: float

    def arguments(self) -> tuple[Any, ...]:
        return (self.hidden, self.factor)

    def describe(self) -> str:
        return f"factor {self.factor}"


def scale_fake(hidden, factor):
    return torch.empty_like(hidden)


def scale_kernel(hidden, factor):
    return hidden.detach() * factor


def scale_backward(ctx, upstream):
    return upstream * ctx.factor, None


def scale_setup(ctx, inputs, output):
    ctx.factor = inputs[1]


def large(call):
    return f"factor={call.factor}, expected at most 10" if call.factor > 10 else None


def negative(call):
    return f"factor={call.factor}, expected at least 0" if call.factor < 0 else None


def make_op(name, backends=()):
    return Op(
        name,
        schema="(Tensor hidden, float factor) -> Tensor",
        fake=scale_fake,
        reference=lambda call: call.hidden * call.factor + 100,
        backends=backends,
    )


INFERENCE = Backend("inference", "cpu", run=scale_kernel, why_not=large)
TRAINING = Backend(
    "training",
    "cpu",
    run=scale_kernel,
    why_not=large,
    backward=scale_backward,
    setup_context=scale_setup,
)
ABSENT = Backend("absent", "cpu", unavailable=lambda: "the extension is not built")
ELSEWHERE = Backend("elsewhere", "cuda", run=scale_kernel)

NARROW = Backend("narrow", "cpu", run=scale_kernel, scope=negative, why_not=large)
OPT_IN = Backend("opt_in", "cpu", run=scale_kernel, why_not=large, unproven="no run proves it")
YIELDING = Backend(
    "yielding",
    "cpu",
    run=lambda hidden, factor: hidden + 7,
    why_not=lambda call: "the factor is huge" if call.factor > 1e6 else None,
    yields=lambda call: "another is faster" if call.factor != 5 else None,
)


class ProductCall(NamedTuple):
    hidden: Tensor
    scale: Tensor

    def arguments(self) -> tuple[Any, ...]:
        return (self.hidden, self.scale)

    def describe(self) -> str:
        return "a product"


PRODUCT = Backend(
    "product",
    "cpu",
    run=lambda hidden, scale: hidden * scale + 1,
    training=Training(
        kept=("doubled",),
        num_gradients=2,
        fake=lambda hidden, scale: (torch.empty_like(hidden), torch.empty_like(hidden)),
        run=lambda hidden, scale: (hidden * scale, hidden * 2),
        run_backward=lambda upstream, doubled, hidden, scale: (
            upstream * scale,
            upstream * doubled / 2,
        ),
    ),
)

# Operators live as long as the process, so the table of these tests is made once.
TOY = make_op("toy", (ABSENT, ELSEWHERE, INFERENCE, TRAINING))
TOY_INFERENCE = make_op("toy_inference", (INFERENCE,))
TOY_FOREIGN = make_op("toy_foreign", (ELSEWHERE,))
TOY_OPT_IN = make_op("toy_opt_in", (OPT_IN,))
TOY_OPT_IN_FIRST = make_op("toy_opt_in_first", (OPT_IN, INFERENCE))
TOY_NARROW = make_op("toy_narrow", (NARROW,))
TOY_YIELDING = make_op("toy_yielding", (YIELDING, INFERENCE))
TOY_TRAINED = Op(
    "toy_trained",
    schema="(Tensor hidden, Tensor scale) -> Tensor",
    fake=scale_fake,
    reference=lambda call: call.hidden,
    backends=(PRODUCT,),
)
TOYS = (
    TOY,
    TOY_INFERENCE,
    TOY_FOREIGN,
    TOY_NARROW,
    TOY_OPT_IN,
    TOY_OPT_IN_FIRST,
    TOY_YIELDING,
    TOY_TRAINED,
)
for toy in TOYS:
    del OPS[toy.name]


@pytest.fixture(autouse=True)
def fresh_table(monkeypatch):
    for toy in TOYS:
        monkeypatch.setitem(OPS, toy.name, toy)
    monkeypatch.setattr(_op, "_warned", set())
    monkeypatch.setattr(_op, "_strict", False)


def ones(requires_grad=False):
    return torch.ones(3, requires_grad=requires_grad)


def test_the_ops_are_in_the_table():
    assert OPS["attention"] is ATTENTION and OPS["ffn"] is FFN
    assert ATTENTION.backend_names[-1] == FFN.backend_names[-1] == "reference"


def test_the_first_backend_that_can_run_runs():
    assert TOY(ScaleCall(ones(), 2.0)).tolist() == [2, 2, 2]
    assert TOY.backend_names == ("absent", "elsewhere", "inference", "training", "reference")


def test_a_backend_without_backward_yields_where_gradients_are_needed():
    hidden = ones(requires_grad=True)
    result = TOY(ScaleCall(hidden, 2.0))
    result.sum().backward()
    assert hidden.grad.tolist() == [2, 2, 2]
    assert "no backward" in TOY.why_not("inference", ScaleCall(hidden, 2.0))
    with torch.no_grad():
        assert TOY.why_not("inference", ScaleCall(hidden, 2.0)) is None


def test_a_backend_may_train_in_python():
    hidden, scale = ones(requires_grad=True), (ones() * 3).requires_grad_()
    result = TOY_TRAINED(ProductCall(hidden, scale))
    assert result.tolist() == [3, 3, 3]
    first, second = torch.autograd.grad(result.sum(), (hidden, scale), create_graph=True)
    assert first.tolist() == [3, 3, 3] and second.tolist() == [1, 1, 1]
    with pytest.raises(NotImplementedError, match=r"^toy_trained: backend='product' in a second "):
        first.sum().backward()
    with torch.no_grad():
        assert TOY_TRAINED(ProductCall(hidden, scale)).tolist() == [4, 4, 4]
    torch.library.opcheck(torch.ops.dynabert.toy_trained.product_training, (hidden, scale))


def test_reasons_are_sentences():
    call = ScaleCall(ones(), 20.0)
    assert TOY.why_not("absent", call) == "the extension is not built"
    assert TOY.why_not("elsewhere", call) == "device=cpu, expected cuda"
    assert TOY.why_not("training", call) == "factor=20.0, expected at most 10"
    assert TOY.why_not("reference", call) is None
    with pytest.raises(ValueError, match=r"toy: backend='x', expected one of absent, "):
        TOY.why_not("x", call)


def test_status_lists_every_backend_of_a_device():
    assert TOY.status("cpu") == [
        ("absent", "the extension is not built"),
        ("elsewhere", "device=cpu, expected cuda"),
        ("inference", None),
        ("training", None),
        ("reference", None),
    ]
    assert dict(TOY.status("cuda"))["inference"] == "device=cuda, expected cpu"


def test_automatic_fall_back_warns_once_with_the_reasons():
    with pytest.warns(RuntimeWarning, match=r"toy: running on the reference.*absent: the ext.*"):
        assert TOY(ScaleCall(ones(), 20.0)).tolist() == [120, 120, 120]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TOY(ScaleCall(ones(), 30.0))


def test_no_warning_where_no_backend_is_for_the_device():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert TOY_FOREIGN(ScaleCall(ones(), 2.0)).tolist() == [102, 102, 102]


def test_strict_makes_the_fall_back_an_error(monkeypatch):
    monkeypatch.setattr(_op, "_strict", True)
    message = (
        r"^toy: no backend can run this call \(device cpu, float32, factor 20\.0\)\n"
        r"  absent: the extension is not built\n"
        r"  elsewhere: device=cpu, expected cuda\n"
        r"  inference: factor=20\.0, expected at most 10\n"
        r"  training: factor=20\.0, expected at most 10\n"
        r"  reference: switched off by DYNABERT_STRICT=1$"
    )
    with pytest.raises(NotImplementedError, match=message):
        TOY(ScaleCall(ones(), 20.0))
    assert TOY_FOREIGN(ScaleCall(ones(), 20.0)).tolist() == [120, 120, 120]


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_what_is_out_of_scope_runs_on_the_reference_in_silence(monkeypatch, strict):
    monkeypatch.setattr(_op, "_strict", strict)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert TOY_NARROW(ScaleCall(ones(), -2.0)).tolist() == [98, 98, 98]
        assert TOY_INFERENCE(ScaleCall(ones(requires_grad=True), 2.0)).tolist() == [102, 102, 102]
    with use_backend("narrow"), pytest.raises(NotImplementedError, match=r"narrow: factor=-2\.0, "):
        TOY_NARROW(ScaleCall(ones(), -2.0))


def test_what_is_in_scope_and_cannot_run_warns():
    with pytest.warns(RuntimeWarning, match=r"toy_narrow: running on the reference.*factor=20\.0"):
        TOY_NARROW(ScaleCall(ones(), 20.0))


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_only_use_backend_chooses_an_unproven_backend(monkeypatch, strict):
    monkeypatch.setattr(_op, "_strict", strict)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert TOY_OPT_IN(ScaleCall(ones(), 2.0)).tolist() == [102, 102, 102]
        with use_backend("opt_in"):
            assert TOY_OPT_IN(ScaleCall(ones(), 2.0)).tolist() == [2, 2, 2]
    assert TOY_OPT_IN.why_not("opt_in", ScaleCall(ones(), 2.0)) is None
    with use_backend("opt_in"), pytest.raises(NotImplementedError, match=r"opt_in: factor=20\.0, "):
        TOY_OPT_IN(ScaleCall(ones(), 20.0))


def test_an_unproven_backend_leaves_the_choice_to_those_after_it(monkeypatch):
    assert TOY_OPT_IN_FIRST(ScaleCall(ones(), 2.0)).tolist() == [2, 2, 2]
    with pytest.warns(RuntimeWarning, match=r"because opt_in: no run proves it; inference: fac"):
        TOY_OPT_IN_FIRST(ScaleCall(ones(), 20.0))
    monkeypatch.setattr(_op, "_strict", True)
    with pytest.raises(NotImplementedError, match=r"\n  opt_in: no run proves it\n  inference: "):
        TOY_OPT_IN_FIRST(ScaleCall(ones(), 20.0))


def test_a_backend_that_yields_runs_what_no_other_can(monkeypatch):
    monkeypatch.setattr(_op, "_strict", True)
    values = {
        factor: TOY_YIELDING(ScaleCall(ones(), factor)).tolist() for factor in (2.0, 5.0, 20.0)
    }
    assert values == {2.0: [2, 2, 2], 5.0: [8, 8, 8], 20.0: [8, 8, 8]}
    with use_backend("yielding"):
        assert TOY_YIELDING(ScaleCall(ones(), 2.0)).tolist() == [8, 8, 8]
    with pytest.raises(
        NotImplementedError, match=r"\n  inference: fac.*\n  yielding: the factor is"
    ):
        TOY_YIELDING(ScaleCall(ones(), 1e7))


def test_a_backend_that_yields_compiles_to_one_graph():
    compiled = torch.compile(
        lambda hidden, factor: TOY_YIELDING(ScaleCall(hidden, factor)),
        fullgraph=True,
        backend="eager",
        dynamic=False,
    )
    for factor in (2.0, 5.0, 20.0):
        assert torch.equal(compiled(ones(), factor), TOY_YIELDING(ScaleCall(ones(), factor)))


def test_a_forced_backend_runs():
    with use_backend("reference"):
        assert TOY(ScaleCall(ones(), 2.0)).tolist() == [102, 102, 102]
    with use_backend("training"):
        assert TOY(ScaleCall(ones(), 2.0)).tolist() == [2, 2, 2]


def test_a_forced_backend_never_falls_through():
    with use_backend("inference"), pytest.raises(NotImplementedError) as raised:
        TOY(ScaleCall(ones(requires_grad=True), 2.0))
    lines = str(raised.value).splitlines()
    assert lines[3].startswith("  inference: the call needs gradients, and this backend")
    assert lines[4] == "  training: not used while 'inference' is forced"
    assert lines[5] == "  reference: not used while 'inference' is forced"


def test_a_forced_backend_that_an_op_lacks_is_an_error():
    with (
        use_backend("training"),
        pytest.raises(NotImplementedError, match="training: the op has no such backend"),
    ):
        TOY_INFERENCE(ScaleCall(ones(), 2.0))


def test_use_backend_as_a_call_holds_until_changed():
    use_backend("training")
    assert forced_backend() == "training"
    use_backend(None)
    assert forced_backend() is None


def test_use_backend_restores_after_an_exception_and_nests():
    with pytest.raises(KeyError), use_backend("training"):
        with use_backend("reference"):
            assert forced_backend() == "reference"
        assert forced_backend() == "training"
        raise KeyError
    assert forced_backend() is None


def test_use_backend_holds_for_all_threads():
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(forced_backend()))
        thread.start()
        thread.join()
    assert seen == ["reference"]


def test_use_backend_refuses_an_unknown_name():
    with pytest.raises(ValueError, match=r"use_backend: name='tritn', expected None or one of .*"):
        use_backend("tritn")
    assert forced_backend() is None


@pytest.mark.parametrize(
    "hidden",
    [ones(), torch.ones(0), torch.ones(2, 5).T],
    ids=["vector", "empty", "transposed"],
)
def test_a_native_backend_passes_opcheck(hidden):
    torch.library.opcheck(torch.ops.dynabert.toy.training, (hidden.requires_grad_(), 2.0))
    torch.library.opcheck(torch.ops.dynabert.toy.inference, (hidden.detach(), 2.0))


def test_a_native_backend_compiles_and_exports():
    def function(hidden):
        return TOY(ScaleCall(hidden, 2.0)) + 1

    class Module(torch.nn.Module):
        def forward(self, hidden):
            return function(hidden)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    hidden = ones(requires_grad=True)
    compiled(hidden).sum().backward()
    assert hidden.grad.tolist() == [2, 2, 2]
    with use_backend("inference"):
        program = torch.export.export(Module(), (ones(),))
    assert "dynabert.toy.inference" in program.graph_module.code
    assert program.module()(ones()).tolist() == [3, 3, 3]


@pytest.mark.parametrize("strict", [False, True], ids=["nonstrict", "strict"])
def test_exporters_get_the_reference_unless_one_is_forced(strict):
    class Module(torch.nn.Module):
        def forward(self, hidden):
            return TOY(ScaleCall(hidden, 2.0))

    program = torch.export.export(Module(), (ones(),), strict=strict)
    assert "dynabert" not in program.graph_module.code
    assert program.module()(ones()).tolist() == [102, 102, 102]


def test_the_compiled_choice_follows_use_backend():
    def function(hidden):
        return TOY(ScaleCall(hidden, 2.0))

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert compiled(ones()).tolist() == [2, 2, 2]
    with use_backend("reference"):
        assert compiled(ones()).tolist() == [102, 102, 102]
    assert compiled(ones()).tolist() == [2, 2, 2]


def test_a_compiled_fall_back_is_silent():
    def function(hidden):
        return TOY(ScaleCall(hidden, 20.0))

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert compiled(ones()).tolist() == [120, 120, 120]


def test_the_schema_of_each_op_takes_its_arguments():
    name = "ffn_signature"
    kernel = Backend("kernel", "cpu", run=lambda *arguments: arguments[0] + 1)
    twin = Op(name, schema=FFN.schema, fake=FFN.fake, reference=FFN.reference, backends=(kernel,))
    try:
        hidden, seen = random_hidden(3, 8), []
        original = FFN.reference
        FFN.reference = lambda call: seen.append(call) or original(call)
        with torch.no_grad(), use_backend("reference"):
            ffn(hidden, random_ffn(4, 8), intermediate_size=2)
        with torch.no_grad():
            assert torch.equal(twin(seen[0]), hidden + 1)
    finally:
        FFN.reference = original
        del OPS[name]


def run_python(code, **variables):
    environment = {**os.environ, **variables}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_environment_forces_a_backend():
    code = "from dynabert_kernels.ops import forced_backend; print(forced_backend())"
    assert run_python(code, DYNABERT_BACKEND="reference").stdout == "reference\n"


def test_environment_with_an_unknown_backend_is_refused_by_the_first_call():
    code = (
        "import torch\n"
        "from dynabert_kernels import ffn\n"
        "from dynabert_kernels.testing import random_ffn\n"
        "ffn(torch.zeros(1, 8), random_ffn(4, 8), intermediate_size=2)"
    )
    done = run_python(code, DYNABERT_BACKEND="fastest")
    assert done.returncode != 0
    assert "\n  fastest: the op has no such backend\n" in done.stderr


def test_doctor_says_that_the_environment_names_no_backend():
    code = "from dynabert_kernels.doctor import *; print(format_report(doctor_report()))"
    done = run_python(code, DYNABERT_BACKEND="fastest")
    assert "backend    fastest: no op has it, every call will be refused\n" in done.stdout


def test_import_needs_torch_alone():
    code = (
        "import sys, dynabert_kernels\n"
        "heavy = ('transformers', 'numpy.testing', 'triton', 'torch._dynamo', 'torch._inductor')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = run_python(code)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_version_is_a_string():
    assert dynabert_kernels.__version__[0].isdigit()
