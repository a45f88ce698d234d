"""What the C++ kernels owe whatever they are given: accuracy for any sizes and strides, bits that
depend on nothing but a sequence and its width, and prepared weights that are never stale."""

from __future__ import annotations

import copy
import gc
import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynabert import DynaBertConfig, DynaBertForSequenceClassification, SubnetConfig
from dynabert_kernels import (
    PackedAttention,
    PackedFFN,
    _extension,
    attention,
    clear_prepared,
    ffn,
    invalidate,
    prepared_bytes,
    use_backend,
)
from dynabert_kernels._extension import cpu_extension
from dynabert_kernels.layout import ACTIVATIONS
from dynabert_kernels.ops import _cpu
from dynabert_kernels.ops.encoder import EncoderLayer, EncoderLayers, encoder
from dynabert_kernels.testing import (
    assert_as_accurate,
    converted,
    nan_tails,
    random_attention,
    random_ffn,
    random_hidden,
    tensors_of,
)
from dynabert_kernels.varlen import offsets_of

if _cpu.kernels_missing() is not None:
    pytest.skip(str(_cpu.kernels_missing()), allow_module_level=True)

Weights = PackedAttention | PackedFFN
OPS = ["attention", "ffn"]
FORMS = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "autocast": (torch.float32, torch.float32),
    "int8": (torch.float32, torch.float32),
    "int8_bfloat16": (torch.bfloat16, torch.float32),
}
"""Dtype of the tokens and of the weights."""
COMPUTE = ["float32", "bfloat16", "int8"]
# Few tokens share the weights of a product among the threads; of many, each thread has its own. A
# long sequence has more keys than a block.
LENGTHS = {"few": [5, 1, 0, 7], "many": [1, 0, 63, 7, 130], "long": [520, 3]}
HIDDEN, HEADS, HEAD_DIM, NEURONS = 72, 3, 24, 600


@pytest.fixture(autouse=True)
def cpu_backend() -> Iterator[None]:
    with use_backend("cpu"), torch.no_grad():
        yield


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def in_form(form: str, weights: Any) -> Any:
    return replace(weights, quantization="int8" if form.startswith("int8") else None)


def make(op: str, form: str = "float32", seed: int = 0) -> Any:
    dtype = FORMS[form][1]
    if op == "ffn":
        return in_form(form, random_ffn(NEURONS, HIDDEN, dtype=dtype, seed=seed))
    return in_form(form, random_attention(HEADS, HEAD_DIM, HIDDEN, dtype=dtype, seed=seed))


def make_layers(form: str, widths: list[tuple[int, int]]) -> list[EncoderLayer]:
    return [
        EncoderLayer(make("attention", form, seed), make("ffn", form, seed + 50), *width)
        for seed, width in enumerate(widths)
    ]


def run(
    hidden: Tensor, weights: Weights, width: int | Tensor, lengths: list[int], backend: str = "cpu"
) -> Tensor:
    offsets = offsets_of(lengths)
    with use_backend(backend):
        if isinstance(weights, PackedFFN):
            return ffn(hidden, weights, intermediate_size=width, cu_seqlens=offsets)
        longest = max(lengths, default=0)
        return attention(hidden, weights, num_heads=width, cu_seqlens=offsets, max_seqlen=longest)


def at_once(layers: list[EncoderLayer]) -> EncoderLayers:
    made = EncoderLayers.of(layers)
    assert made is not None
    return made


def run_layers(hidden: Tensor, layers: EncoderLayers, lengths: list[int]) -> Tensor:
    result = encoder(
        hidden, layers, cu_seqlens=offsets_of(lengths), max_seqlen=max(lengths, default=0)
    )
    assert result is not None
    return result


def one_by_one(hidden: Tensor, layers: list[EncoderLayer], lengths: list[int]) -> Tensor:
    for layer in layers:
        hidden = run(hidden, layer.attention, layer.num_heads, lengths)
        hidden = run(hidden, layer.ffn, layer.intermediate_size, lengths)
    return hidden


def call_of(what: str, form: str, lengths: list[int]) -> Callable[[Tensor], Tensor]:
    """One op, or two layers, on some weights, as a function of the tokens."""
    if what == "encoder":
        layers = at_once(make_layers(form, [(2, 523), (3, 37)]))
        return lambda hidden: run_layers(hidden, layers, lengths)
    weights = make(what, form)
    return lambda hidden: run(hidden, weights, 2 if what == "attention" else 523, lengths)


def tokens_for(form: str, lengths: list[int]) -> Tensor:
    return random_hidden(sum(lengths), HIDDEN, dtype=FORMS[form][0], seed=1)


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: `kind` of view, `offset` elements into its storage."""

    kind: str
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """The same numbers there, NaN all around them."""
        *outer, inner = tensor.shape
        if self.kind == "padded":
            view = self._nan(tensor, [*outer, inner + 5])[..., 2 : 2 + inner]
        elif self.kind == "transposed":
            view = self._nan(tensor, [inner, *outer[::-1]]).permute(*range(tensor.dim())[::-1])
        elif self.kind == "every_second":
            view = self._nan(tensor, [2 * tensor.shape[0], *tensor.shape[1:]])[::2]
        else:
            view = self._nan(tensor, [*outer, inner])
        return view.copy_(tensor)

    def _nan(self, like: Tensor, shape: list[int]) -> Tensor:
        size = torch.Size(shape).numel()
        storage = torch.full((self.offset + size,), torch.nan, dtype=like.dtype)
        return storage[self.offset :].view(shape)


PLACES = st.builds(
    Place,
    st.sampled_from(["dense", "padded", "transposed", "every_second"]),
    st.sampled_from([0, 1, 3, 16]),
)


@dataclass(frozen=True)
class Case:
    """A call of one op."""

    form: str
    hidden_size: int
    norm_eps: float
    limit: int
    head_dim: int
    activation: str
    lengths: tuple[int, ...]
    widths: int | tuple[int, ...]
    hidden_place: Place
    weight_places: tuple[Place, ...]

    def weights(self, op: str) -> Any:
        dtype = FORMS[self.form][1]
        if op == "attention":
            made: Any = random_attention(self.limit, self.head_dim, self.hidden_size, dtype=dtype)
        else:
            size = (self.limit, self.hidden_size)
            made = random_ffn(*size, dtype=dtype, activation=self.activation)
        return in_form(self.form, replace(made, norm_eps=self.norm_eps))

    def hidden(self) -> Tensor:
        size = (sum(self.lengths), self.hidden_size)
        return random_hidden(*size, dtype=FORMS[self.form][0], seed=1)

    def width(self) -> int | Tensor:
        return self.widths if isinstance(self.widths, int) else int32(*self.widths)

    def independent_numbers(self, op: str) -> int:
        """A narrow sublayer spreads the error of each neuron over a whole token."""
        each = [self.widths] * len(self.lengths) if isinstance(self.widths, int) else self.widths
        size = self.head_dim if op == "attention" else 1
        pairs = zip(self.lengths, each, strict=True)
        return sum(length * min(width * size, self.hidden_size) for length, width in pairs)


@st.composite
def cases(draw: st.DrawFn, op: str) -> Case:
    # Up to three blocks of neurons; sizes from less than a vector to some panels and a bit.
    limit = draw(st.integers(1, 6) if op == "attention" else st.integers(1, 900))
    length = st.integers(0, 40) | st.sampled_from([63, 130, 515])
    lengths = draw(st.lists(length, max_size=4))
    width = st.integers(1, limit)
    each = st.tuples(*[width for _ in lengths])
    hidden_size = draw(st.integers(1, 20) | st.integers(21, 200) | st.sampled_from([96, 256]))
    return Case(
        form=draw(st.sampled_from(list(FORMS))),
        hidden_size=hidden_size,
        # LayerNorm of a few numbers that happen to be alike magnifies any error.
        norm_eps=draw(st.sampled_from([1e-12, 1e-5])) if hidden_size >= 8 else 0.1,
        limit=limit,
        head_dim=8 * draw(st.integers(1, 17)),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        lengths=tuple(lengths),
        widths=draw(width | each),
        hidden_place=draw(PLACES),
        weight_places=draw(st.tuples(*[PLACES for _ in range(6)])),
    )


def check_accuracy(op: str, case: Case) -> None:
    """The float64 truth, by the error that PyTorch makes; and the same bits wherever tensors lie.

    Of few numbers PyTorch may get each right by luck, so there its error says less.
    """
    hidden, weights, lengths = case.hidden(), case.weights(op), list(case.lengths)
    names = tensors_of(weights).items()
    changes = {n: p.of(t) for (n, t), p in zip(names, case.weight_places, strict=True)}
    moved: Any = replace(weights, **changes)
    width = case.width()
    autocast = torch.autocast("cpu", torch.bfloat16) if case.form == "autocast" else nullcontext()
    with autocast:
        actual = run(case.hidden_place.of(hidden), moved, width, lengths)
        dense = run(hidden, weights, width, lengths)
        plain = run(hidden, weights, width, lengths, "reference")
    wide = replace(converted(weights, torch.float64), quantization=None)
    truth = run(hidden.double(), wide, width, lengths, "reference")
    factor = 2.0 if case.independent_numbers(op) >= 1000 else 8.0
    assert_as_accurate(op, actual, plain, truth, factor=factor)
    assert torch.equal(actual, dense)


@pytest.mark.parametrize("op", OPS)
@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_size_and_stride(op: str, data: st.DataObject) -> None:
    check_accuracy(op, data.draw(cases(op)))


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
@settings(max_examples=1000, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_size_and_stride_1000(op: str, data: st.DataObject) -> None:
    check_accuracy(op, data.draw(cases(op)))


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("form", COMPUTE)
@pytest.mark.parametrize("what", [*OPS, "encoder"])
def test_bits_are_the_same_each_time_on_any_threads(
    what: str, form: str, lengths: list[int]
) -> None:
    hidden, call = tokens_for(form, lengths), call_of(what, form, lengths)
    first = call(hidden)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for _ in range(250 if threads == 2 and len(hidden) < 500 else 5):
            torch.full(first.shape, torch.nan, dtype=first.dtype)  # so that recycled memory shows
            assert torch.equal(call(hidden), first)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    form=st.sampled_from(list(FORMS)),
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=4),
    widths=st.lists(
        st.tuples(st.integers(1, HEADS), st.integers(1, NEURONS)), min_size=1, max_size=3
    ),
    threads=st.integers(1, 3),
)
def test_encoder_is_the_ops_one_after_the_other(
    form: str, lengths: list[int], widths: list[tuple[int, int]], threads: int
) -> None:
    torch.set_num_threads(threads)
    hidden, layers = tokens_for(form, lengths), make_layers(form, widths)
    with torch.autocast("cpu", torch.bfloat16) if form == "autocast" else nullcontext():
        together = run_layers(hidden, at_once(layers), lengths)
        assert torch.equal(together, one_by_one(hidden, layers, lengths))
    assert together.isfinite().all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    op=st.sampled_from(OPS),
    form=st.sampled_from(COMPUTE),
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=5),
    data=st.data(),
)
def test_mixed_widths_are_each_sequence_alone(
    op: str, form: str, lengths: list[int], data: st.DataObject
) -> None:
    hidden, weights = tokens_for(form, lengths), make(op, form)
    limit = HEADS if op == "attention" else NEURONS
    widths = [data.draw(st.integers(1, limit)) for _ in lengths]
    mixed = run(hidden, weights, int32(*widths), lengths)
    parts = zip(hidden.split(lengths), widths, strict=True)
    alone = [run(part, weights, width, [len(part)]) for part, width in parts]
    assert torch.equal(mixed, torch.cat(alone))


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("form", COMPUTE)
@pytest.mark.parametrize("what", [*OPS, "encoder"])
def test_nan_in_a_sequence_reaches_no_other(what: str, form: str, lengths: list[int]) -> None:
    hidden, call = tokens_for(form, lengths), call_of(what, form, lengths)
    clean = call(hidden)
    for number, length in enumerate(lengths):
        first = sum(lengths[:number])
        own = torch.zeros(len(hidden), dtype=torch.bool)
        own[first : first + length] = True
        poisoned = hidden.clone()
        poisoned[own] = torch.nan
        dirty = call(poisoned)
        assert torch.equal(dirty[~own], clean[~own])
        assert dirty[own].isnan().all()


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("form", ["float32", "bfloat16", "autocast"])
def test_nan_beyond_the_prefixes_of_layers_changes_no_bit(form: str, lengths: list[int]) -> None:
    """Int8 has no form for such weights."""
    hidden, layers = tokens_for(form, lengths), make_layers(form, [(2, 523), (1, 37), (3, 1)])
    dirty = [
        layer._replace(
            attention=nan_tails(layer.attention, layer.num_heads),
            ffn=nan_tails(layer.ffn, layer.intermediate_size),
        )
        for layer in layers
    ]
    with torch.autocast("cpu", torch.bfloat16) if form == "autocast" else nullcontext():
        clean = run_layers(hidden, at_once(layers), lengths)
        assert torch.equal(run_layers(hidden, at_once(dirty), lengths), clean)
        assert torch.equal(one_by_one(hidden, dirty, lengths), clean)


@pytest.mark.parametrize(
    "num_calls", [200, pytest.param(10_000, marks=pytest.mark.slow)], ids="{}".format
)
@pytest.mark.timeout(1800)
def test_threads_sharing_models_get_no_wrong_bit(num_calls: int) -> None:
    """Eight threads; each call draws a precision, a width and depth or several, and a batch."""
    torch.manual_seed(0)
    config = DynaBertConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=40,
        initializer_range=0.2,
    )
    model: Any = DynaBertForSequenceClassification(config)
    model.eval()
    models = [model, copy.deepcopy(model).bfloat16(), copy.deepcopy(model).quantize("int8")]
    grid = [SubnetConfig(width, depth) for width in (1.0, 0.75, 0.5, 0.25) for depth in (1.0, 0.5)]
    subnets: list[Any] = [*grid, [grid[-1], grid[0]], [grid[2], grid[5]]]
    batches = []
    for length in (3, 31):
        ids = torch.randint(0, 40, (2, length))
        mask = torch.ones_like(ids)
        mask[1, length // 2 :] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    choices = [(m, s, b) for m in models for s in subnets for b in batches]

    def logits(choice: int) -> Tensor:
        chosen, subnet, batch = choices[choice]
        result: Tensor = chosen(**batch, subnet=subnet).logits
        return result

    def work(seed: int) -> int:
        draw = random.Random(seed)
        with torch.inference_mode():
            drawn = (draw.randrange(len(choices)) for _ in range(num_calls))
            return sum(not torch.equal(logits(choice), expected[choice]) for choice in drawn)

    with torch.inference_mode():
        expected = [logits(choice) for choice in range(len(choices))]
    assert len({tuple(found.float().flatten().tolist()) for found in expected}) == len(expected)
    clear_prepared()  # so that the threads race to build it too
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(work, range(8))) == 0


@pytest.fixture
def builds() -> Iterator[Callable[[], int]]:
    """How many prepared forms were built since the last time it was asked."""
    module = _extension.cpu_extension()
    clear_prepared()
    before = module.prepared_stats()["builds"]

    def since() -> int:
        nonlocal before
        now = module.prepared_stats()["builds"]
        number, before = now - before, now
        return int(number)

    yield since
    clear_prepared()


@pytest.mark.parametrize("form", COMPUTE)
@pytest.mark.parametrize("op", OPS)
def test_one_prepared_form_serves_every_width(
    builds: Callable[[], int], op: str, form: str
) -> None:
    weights = in_form(form, random_attention(12, 8, HIDDEN) if op == "attention" else make("ffn"))
    hidden = random_hidden(9, HIDDEN, dtype=FORMS[form][0])
    held = set()
    with torch.autocast("cpu", torch.bfloat16, enabled=form == "bfloat16"):
        for step in range(1, 13):
            width = step if op == "attention" else 50 * step
            run(hidden, weights, width, [2, 7])
            run(hidden, weights, int32(width, 1), [2, 7])
            held.add(prepared_bytes())
    assert builds() == 1
    (size,) = held
    numbers = sum(tensor.numel() for tensor in weights.elastic())
    assert size >= numbers * {"float32": 4, "bfloat16": 2, "int8": 1}[form]


@pytest.mark.parametrize("op", OPS)
def test_a_write_that_torch_counts_builds_anew(builds: Callable[[], int], op: str) -> None:
    weights, hidden = make(op), tokens_for("float32", [9])
    former = run(hidden, weights, 2, [9])
    size = prepared_bytes()
    assert builds() == 1
    for tensor in tensors_of(weights).values():
        tensor.mul_(1.5)
        result = run(hidden, weights, 2, [9])
        assert (builds(), prepared_bytes()) == (1, size)
        assert not torch.equal(result, former)
        assert torch.equal(result, run(hidden, converted(weights), 2, [9]))
        assert (builds(), prepared_bytes()) == (1, size)  # of the copy, which is gone
        former = result


@pytest.mark.parametrize("kind", ["inference", "data"])
@pytest.mark.parametrize("op", OPS)
def test_invalidate_follows_a_write_that_torch_does_not_count(
    builds: Callable[[], int], op: str, kind: str
) -> None:
    hidden = tokens_for("float32", [9])
    with torch.inference_mode(kind == "inference"):
        weights = make(op)
        run(hidden, weights, 2, [9])
        matrix = weights.elastic()[0]
        assert matrix.is_inference() == (kind == "inference")
        (matrix if kind == "inference" else matrix.data).mul_(1.5)
        assert invalidate(matrix) == 1
        assert invalidate(matrix) == 0
        assert prepared_bytes() == 0
        assert torch.equal(run(hidden, weights, 2, [9]), run(hidden, converted(weights), 2, [9]))
    assert builds() == 3


@pytest.mark.parametrize("op", OPS)
def test_prepared_forms_go_with_their_weights(builds: Callable[[], int], op: str) -> None:
    hidden = tokens_for("float32", [9])
    kept, gone = make(op), make(op, seed=3)
    run(hidden, kept, 2, [9])
    size = prepared_bytes()
    run(hidden, gone, 2, [9])
    run(hidden, replace(gone, quantization="int8"), 2, [9])
    assert prepared_bytes() > 2 * size
    del gone
    gc.collect()
    assert prepared_bytes() == size
    assert builds() == 3


@pytest.mark.parametrize("form", COMPUTE)
def test_threads_that_need_a_form_at_once_build_it_once(
    builds: Callable[[], int], form: str
) -> None:
    hidden, layers = tokens_for(form, [9]), at_once(make_layers(form, [(2, 523), (3, 37)]))

    def work(_: int) -> Tensor:
        with torch.no_grad():
            return run_layers(hidden, layers, [9])

    for _ in range(10):
        with ThreadPoolExecutor(8) as pool:
            first, *others = pool.map(work, range(16))
        assert all(torch.equal(other, first) for other in others)
        assert builds() == 4
        clear_prepared()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc/self/statm")
@pytest.mark.parametrize("lengths", [LENGTHS["few"], LENGTHS["many"]], ids=["few", "many"])
@pytest.mark.parametrize("what", [*OPS, "encoder"])
def test_steady_calls_take_no_memory(what: str, lengths: list[int]) -> None:
    """If each call kept as much as its output, it would be twice what is allowed, or more."""
    if "-fsanitize" in cpu_extension().build_info()["flags"]:
        pytest.skip("the address sanitizer holds freed memory back")

    def resident_bytes() -> int:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    hidden, call = tokens_for("float32", lengths), call_of(what, "float32", lengths)
    for _ in range(30):
        call(hidden)
    gc.collect()
    before = resident_bytes()
    for _ in range(300):
        call(hidden)
    assert resident_bytes() - before < (1 << 19)
