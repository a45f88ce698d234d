from __future__ import annotations

import random
from itertools import product

import pytest
import torch
from torch.export import Dim

from dynabert_kernels import PackedAttention, PackedFFN, attention, ffn, use_backend
from dynabert_kernels.testing import random_attention, random_ffn, random_hidden, tensors_of
from dynabert_kernels.varlen import offsets_of

HEADS, NEURONS, HIDDEN = 17, 68, 24
HEAD_WEIGHTS = random_attention(HEADS, 4, HIDDEN)
NEURON_WEIGHTS = random_ffn(NEURONS, HIDDEN)
LENGTHS = {"equal": [7, 7, 7], "ragged": [5, 3, 7]}


def layer(hidden, heads_of, neurons_of, offsets, longest, heads, neurons, seed=None):
    p = 0.0 if seed is None else 0.25
    options = {"dropout_p": p, "seed": seed}
    middle = attention(
        hidden,
        heads_of,
        num_heads=heads,
        cu_seqlens=offsets,
        max_seqlen=longest,
        attention_dropout_p=p,
        **options,
    )
    return ffn(middle, neurons_of, intermediate_size=neurons, cu_seqlens=offsets, **options)


class GraphCounter:
    """A compiler that runs graphs as they are and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, module, example_inputs):
        self.graphs += 1
        return module


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    with use_backend("reference"):
        yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("order", "dynamic", "kind"),
    [
        ("falling", None, "equal"),
        ("rising", None, "ragged"),
        ("shuffled", None, "ragged"),
        ("shuffled", True, "equal"),
    ],
    ids=["falling", "rising", "shuffled", "dynamic"],
)
def test_sixteen_widths_need_two_graphs(order, dynamic, kind):
    lengths = LENGTHS[kind]
    widths = list(range(2, HEADS + 1))
    if order == "falling":
        widths.reverse()
    if order == "shuffled":
        random.Random(0).shuffle(widths)
    assert len(widths) == 16
    counter = GraphCounter()
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=counter)
    hidden, offsets = random_hidden(sum(lengths), HIDDEN), offsets_of(lengths)
    for width in widths:
        arguments = (hidden, HEAD_WEIGHTS, NEURON_WEIGHTS, offsets, 7, width, 4 * width)
        assert torch.equal(compiled(*arguments), layer(*arguments))
    assert counter.graphs <= 2


def test_width_one_needs_one_graph_more():
    counter = GraphCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    hidden, offsets = random_hidden(21, HIDDEN), offsets_of([7, 7, 7])
    for width in (17, 3, 1, 2, 16, 1):
        arguments = (hidden, HEAD_WEIGHTS, NEURON_WEIGHTS, offsets, 7, width, 4 * width)
        assert torch.equal(compiled(*arguments), layer(*arguments))
    assert counter.graphs <= 3


def test_batches_of_other_shapes_need_no_graph_of_their_own():
    counter = GraphCounter()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    shapes = ([5, 3, 7], [4, 9], [2, 3, 4, 5, 6], [11, 2])
    for lengths, width in product(shapes, (2, 9, 17)):
        hidden, offsets = random_hidden(sum(lengths), HIDDEN), offsets_of(lengths)
        longest = max(lengths)
        arguments = (hidden, HEAD_WEIGHTS, NEURON_WEIGHTS, offsets, longest, width, 4 * width)
        assert torch.equal(compiled(*arguments), layer(*arguments))
    assert counter.graphs <= 2


class Layer(torch.nn.Module):
    """A module that owns parameters and bundles them at each call, as a model does."""

    def __init__(self):
        super().__init__()
        for name, tensor in (
            *tensors_of(HEAD_WEIGHTS).items(),
            *tensors_of(NEURON_WEIGHTS).items(),
        ):
            prefix = "ffn_" if hasattr(self, name) else ""
            self.register_parameter(prefix + name, torch.nn.Parameter(tensor.clone()))

    def forward(self, hidden, offsets, longest: int, heads: int, neurons: int):
        heads_of = PackedAttention(
            self.qkv_weight,
            self.qkv_bias,
            self.out_weight,
            self.out_bias,
            self.norm_weight,
            self.norm_bias,
        )
        neurons_of = PackedFFN(
            self.up_weight,
            self.up_bias,
            self.down_weight,
            self.down_bias,
            self.ffn_norm_weight,
            self.ffn_norm_bias,
        )
        return layer(hidden, heads_of, neurons_of, offsets, longest, heads, neurons)


def test_a_compiled_module_has_the_same_gradients():
    eager, compiled = Layer(), Layer()
    function = torch.compile(compiled, fullgraph=True, dynamic=True, backend="aot_eager")
    hidden, offsets = random_hidden(15, HIDDEN), offsets_of([5, 3, 7])
    for width in (3, 9):
        eager(hidden, offsets, 7, width, 4 * width).square().sum().backward()
        function(hidden, offsets, 7, width, 4 * width).square().sum().backward()
    for name, parameter in eager.named_parameters():
        torch.testing.assert_close(compiled.get_parameter(name).grad, parameter.grad, msg=name)


def test_autocast_compiles():
    hidden, offsets = random_hidden(15, HIDDEN), offsets_of([5, 3, 7])
    arguments = (hidden, HEAD_WEIGHTS, NEURON_WEIGHTS, offsets, 7, 3, 12)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(*arguments), layer(*arguments))


def test_seeded_dropout_compiles_once_for_all_seeds():
    counter = GraphCounter()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    hidden, offsets = random_hidden(15, HIDDEN), offsets_of([5, 3, 7])
    for seed in (5, 2**40 + 1, 9):
        arguments = (hidden, HEAD_WEIGHTS, NEURON_WEIGHTS, offsets, 7, 3, 12, seed)
        assert torch.equal(compiled(*arguments), layer(*arguments))
    assert counter.graphs <= 2


def test_one_width_per_sequence_runs_eagerly_inside_a_compiled_function():
    hidden, offsets = random_hidden(15, HIDDEN), offsets_of([5, 3, 7])
    widths = torch.tensor([2, 9, 2], dtype=torch.int32)
    arguments = (hidden, HEAD_WEIGHTS, NEURON_WEIGHTS, offsets, 7, widths, widths)
    compiled = torch.compile(layer, backend="eager")
    assert torch.equal(compiled(*arguments), layer(*arguments))


def test_one_width_per_sequence_cannot_be_one_graph():
    hidden, offsets = random_hidden(15, HIDDEN), offsets_of([5, 3, 7])
    widths = torch.tensor([2, 9, 2], dtype=torch.int32)
    arguments = (hidden, HEAD_WEIGHTS, NEURON_WEIGHTS, offsets, 7, widths, widths)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"num_heads is a tensor inside torch\.compile"):
        compiled(*arguments)


@pytest.mark.parametrize("strict", [False, True], ids=["nonstrict", "strict"])
def test_export_takes_packed_weights_as_inputs(strict):
    class Function(torch.nn.Module):
        def forward(self, hidden, heads_of, neurons_of, offsets):
            return layer(hidden, heads_of, neurons_of, offsets, 7, 3, 12)

    hidden, offsets = random_hidden(15, HIDDEN), offsets_of([5, 3, 7])
    program = torch.export.export(
        Function(), (hidden, HEAD_WEIGHTS, NEURON_WEIGHTS, offsets), strict=strict
    )
    others = random_attention(HEADS, 4, HIDDEN, seed=8), random_ffn(NEURONS, HIDDEN, seed=9)
    expected = layer(hidden, *others, offsets, 7, 3, 12)
    torch.testing.assert_close(program.module()(hidden, *others, offsets), expected)


def test_export_keeps_tokens_and_width_dynamic():
    hidden, offsets = random_hidden(15, HIDDEN), offsets_of([5, 3, 7])
    module = Layer().eval()
    dynamic = ({0: Dim.DYNAMIC}, None, Dim.DYNAMIC, Dim.DYNAMIC, Dim.DYNAMIC)
    program = torch.export.export(module, (hidden, offsets, 7, 3, 12), dynamic_shapes=dynamic)
    for lengths, width in (([9, 2, 6], 5), ([1, 8, 3], HEADS)):
        tokens = random_hidden(sum(lengths), HIDDEN, seed=4)
        arguments = (tokens, offsets_of(lengths), max(lengths), width, 4 * width)
        torch.testing.assert_close(program.module()(*arguments), module(*arguments))


# Inductor itself still uses torch.jit.
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.slow
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("seed", [None, 7], ids=["plain", "dropout"])
def test_inductor_gives_the_same_numbers(seed, lengths):
    compiled = torch.compile(layer, fullgraph=True)
    hidden, offsets = random_hidden(sum(lengths), HIDDEN), offsets_of(lengths)
    for width in (17, 3, 9):
        arguments = (hidden, HEAD_WEIGHTS, NEURON_WEIGHTS, offsets, 7, width, 4 * width, seed)
        torch.testing.assert_close(compiled(*arguments), layer(*arguments))
