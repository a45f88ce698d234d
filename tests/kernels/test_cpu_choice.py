"""When backend ``cpu`` is chosen, what it refuses and how loudly, and its prepared weights."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

from dynabert_kernels import (
    attention,
    clear_prepared,
    ffn,
    invalidate,
    prepared,
    prepared_bytes,
    use_backend,
)
from dynabert_kernels.ops import _cpu, _op
from dynabert_kernels.ops.attention import ATTENTION
from dynabert_kernels.ops.ffn import FFN
from dynabert_kernels.quantization import NEURON_GROUP
from dynabert_kernels.testing import (
    converted,
    random_attention,
    random_ffn,
    random_hidden,
    tensors_of,
)
from dynabert_kernels.varlen import offsets_of

HIDDEN = 64
OPS = {"attention": ATTENTION, "ffn": FFN}


@pytest.fixture(autouse=True)
def nothing_warned(monkeypatch):
    monkeypatch.setattr(_op, "_warned", set())
    monkeypatch.setattr(_op, "_strict", False)


@pytest.fixture
def chosen(monkeypatch):
    """The backends that calls are given to, which then do no work: `cpu` counts as built."""
    names = []
    monkeypatch.setattr(_cpu, "_MISSING", None)
    for op in OPS.values():

        def note(call, op=op):
            backend = op._choose(call, False)
            names.append("reference" if backend is None else backend.name)
            return call.hidden

        monkeypatch.setattr(op, "__call__", note, raising=False)
    monkeypatch.setattr(_op.Op, "__call__", lambda op, call: vars(op)["__call__"](call))
    return names


def call(op, hidden=None, weights=None, *, head_dim=32, dtype=torch.float32, **more):
    hidden = random_hidden(6, HIDDEN, dtype=dtype) if hidden is None else hidden
    if op == "ffn":
        weights = random_ffn(40, HIDDEN, dtype=dtype) if weights is None else weights
        return ffn(hidden, weights, **{"intermediate_size": 9} | more)
    weights = random_attention(2, head_dim, HIDDEN, dtype=dtype) if weights is None else weights
    batch = {"num_heads": 1, "cu_seqlens": offsets_of([6]), "max_seqlen": 6}
    return attention(hidden, weights, **batch | more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_cpu_is_chosen_for_inference(chosen, op, dtype):
    call(op, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        call(op, dtype=dtype)
    assert chosen == ["cpu", "cpu"]


@pytest.mark.parametrize("op", OPS)
def test_cpu_is_chosen_for_quantised_weights(chosen, op):
    weights = random_ffn(40, HIDDEN) if op == "ffn" else random_attention(2, 32, HIDDEN)
    with torch.autocast("cpu", torch.float16):
        call(op, weights=replace(weights, quantization="int8"))
    assert chosen == ["cpu"]


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize("missing", [False, True], ids=["", "missing"])
@pytest.mark.parametrize(
    "out_of_scope",
    [
        {"hidden": random_hidden(6, HIDDEN).requires_grad_()},
        {"dtype": torch.float64},
        {"dropout_p": 0.1},
        {"attention_dropout_p": 0.1},
        {"attn_mask": torch.ones(1, 1, 1, 6, dtype=torch.bool)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_it_is_not_made_for_runs_on_the_reference_in_silence(
    chosen, monkeypatch, out_of_scope, missing, strict
):
    monkeypatch.setattr(_op, "_strict", strict)
    monkeypatch.setattr(_cpu, "_MISSING", "not built" if missing else None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call("attention", **out_of_scope)
    assert chosen == ["reference"]


CANNOT = {
    "head_dim": ({"head_dim": 20}, "cpu: head_dim=20, expected a multiple of 8"),
    "float16": ({"dtype": torch.float16}, "cpu: it would compute in float16, expected one of "),
    "weights": (
        {
            "hidden": random_hidden(6, HIDDEN, dtype=torch.bfloat16),
            "weights": converted(random_attention(2, 32, HIDDEN), torch.float16),
        },
        "cpu: the weights are torch.float16, expected float32 or bfloat16",
    ),
}


@pytest.mark.parametrize(("change", "reason"), CANNOT.values(), ids=CANNOT)
def test_what_it_cannot_run_warns_once_with_the_reason(chosen, monkeypatch, change, reason):
    def run():
        # Only autocast lets tokens of one half precision meet weights of the other.
        with torch.autocast("cpu", torch.bfloat16, enabled="weights" in change):
            call("attention", **change)

    with pytest.warns(RuntimeWarning, match=rf"^attention: running on the reference.*{reason}"):
        run()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run()
    assert chosen == ["reference", "reference"]
    monkeypatch.setattr(_op, "_strict", True)
    with pytest.raises(NotImplementedError, match=reason):
        run()


def test_a_missing_extension_warns_with_its_sentence(chosen, monkeypatch):
    monkeypatch.setattr(_cpu, "_MISSING", "extension not built: no compiler")
    with pytest.warns(RuntimeWarning, match=r"ffn: .* cpu: extension not built: no compiler; "):
        call("ffn")
    assert chosen == ["reference"]


@pytest.mark.parametrize("op", OPS)
def test_a_forced_cpu_says_what_is_out_of_scope(monkeypatch, op):
    monkeypatch.setattr(_cpu, "_MISSING", None)
    with use_backend("cpu"):
        with pytest.raises(NotImplementedError, match="  cpu: dropout is not part of this backend"):
            call(op, dropout_p=0.1)
        with pytest.raises(NotImplementedError, match=r"  cpu: hidden is torch\.float64, expected"):
            call(op, dtype=torch.float64)


class Sublayers(torch.nn.Module):
    """Both ops, on weights that exist before a tool records them."""

    def __init__(self):
        super().__init__()
        self.heads, self.neurons = random_attention(2, 32, HIDDEN), random_ffn(40, HIDDEN)
        self.offsets = offsets_of([6])

    def forward(self, hidden):
        batch = {"num_heads": 1, "cu_seqlens": self.offsets, "max_seqlen": 6}
        return ffn(attention(hidden, self.heads, **batch), self.neurons, intermediate_size=9)


@pytest.mark.parametrize("strict", [False, True], ids=["nonstrict", "strict"])
def test_exporters_see_through_the_ops(monkeypatch, strict):
    monkeypatch.setattr(_cpu, "_MISSING", None)
    hidden, sublayers = random_hidden(6, HIDDEN, seed=1), Sublayers()
    with torch.no_grad():
        program = torch.export.export(sublayers, (hidden,), strict=strict)
        assert "dynabert" not in program.graph_module.code
        with use_backend("reference"):
            torch.testing.assert_close(program.module()(hidden), sublayers(hidden))


@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning"
)
def test_a_trace_sees_through_the_ops(monkeypatch):
    monkeypatch.setattr(_cpu, "_MISSING", None)
    with torch.no_grad():
        traced = torch.jit.trace(Sublayers(), (random_hidden(6, HIDDEN, seed=1),))
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert "aten::layer_norm" in kinds
    assert not any(kind.startswith("dynabert") for kind in kinds)


class Module:
    """A stand-in for the extension that notes what it is asked for."""

    def __init__(self):
        self.asked = []

    def prepared_stats(self):
        return {"entries": 2, "bytes": 96, "hits": 5, "builds": 2}

    def clear_prepared(self):
        self.asked.append("clear")

    def invalidate_prepared(self, tensor):
        self.asked.append(tensor)
        return 2 if tensor.dim() > 1 else 0


def test_prepared_weights_of_the_extension(monkeypatch):
    module = Module()
    monkeypatch.setattr(prepared, "_module", lambda: module)
    assert prepared_bytes() == 96
    clear_prepared()
    assert module.asked == ["clear"]
    weights = random_ffn(4, 8)
    assert invalidate(weights.up_weight) == 2
    assert module.asked[-1] is weights.up_weight
    assert invalidate(weights) == 4
    assert len(module.asked) == 2 + 6


def test_prepared_weights_without_an_extension(monkeypatch):
    monkeypatch.setattr(_cpu, "_MISSING", "extension not built")
    clear_prepared()
    assert prepared_bytes() == invalidate(random_ffn(4, 8)) == 0


def test_invalidate_refuses_what_is_no_weight():
    with pytest.raises(TypeError, match=r"^invalidate: weights=Linear, expected PackedAttention"):
        invalidate(torch.nn.Linear(2, 2))


@pytest.fixture
def extension():
    if _cpu.kernels_missing() is not None:
        pytest.skip(_cpu.kernels_missing())


def test_a_write_that_torch_does_not_count_needs_invalidate(extension):
    weights, hidden = random_ffn(40, HIDDEN), random_hidden(6, HIDDEN)
    clear_prepared()
    with use_backend("cpu"), torch.no_grad():
        before = call("ffn", hidden, weights)
        held = prepared_bytes()
        assert held > 0
        weights.down_weight.mul_(2)
        counted = call("ffn", hidden, weights)
        assert not torch.equal(counted, before)
        weights.down_weight.data.mul_(2)
        assert invalidate(weights) > 0
        with use_backend("reference"):
            expected = call("ffn", hidden, weights)
        torch.testing.assert_close(call("ffn", hidden, weights), expected)
    clear_prepared()
    assert prepared_bytes() == 0


def test_the_extension_has_the_same_neuron_group(extension):
    assert prepared._module().neuron_group() == NEURON_GROUP


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_weights_are_prepared_again_after_an_optimiser_step(fused):
    """A fused step writes without raising the version of its parameters."""
    weights = converted(random_ffn(24, 16), requires_grad=True)
    optimizer = torch.optim.AdamW(tensors_of(weights).values(), lr=0.1, fused=fused)
    hidden = random_hidden(9, 16, seed=1)

    def outputs():
        with torch.no_grad(), use_backend("cpu"):
            actual = ffn(hidden, weights, intermediate_size=20)
        with torch.no_grad(), use_backend("reference"):
            return actual, ffn(hidden, weights, intermediate_size=20)

    before, _ = outputs()
    ffn(hidden, weights, intermediate_size=20).square().sum().backward()
    optimizer.step()
    after, expected = outputs()
    assert not torch.allclose(before, after, atol=1e-2)
    torch.testing.assert_close(after, expected)
