"""Sublayers of which only prepared forms are left: the same bits, and no other use."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dynabert_kernels import (
    PackedFFN,
    ReleasedWeightsError,
    attention,
    clear_prepared,
    ffn,
    invalidate,
    prepared_bytes,
    prepared_forms,
    release,
    use_backend,
)
from dynabert_kernels._extension import cpu_extension
from dynabert_kernels.ops import _cpu
from dynabert_kernels.ops.encoder import EncoderLayer, EncoderLayers, encoder
from dynabert_kernels.released import ReleasedWeight, is_released
from dynabert_kernels.testing import (
    converted,
    random_attention,
    random_ffn,
    random_hidden,
    tensors_of,
)
from dynabert_kernels.varlen import offsets_of

if _cpu.kernels_missing() is not None:
    pytest.skip(str(_cpu.kernels_missing()), allow_module_level=True)

OPS = ["attention", "ffn"]
FORMS = ["float32", "bfloat16", "int8"]
HIDDEN, HEADS, HEAD_DIM, NEURONS = 72, 3, 24, 600
WIDTHS = {"attention": [1, 3], "ffn": [1, 37, 384, 385, 600]}
# Few tokens share the weights of a product among threads, of many each thread has its own.
LENGTHS = {"few": [5, 1, 0, 7], "many": [1, 0, 63, 7, 130]}


@pytest.fixture(autouse=True)
def no_gradients(seeds_and_threads: None) -> Iterator[None]:
    torch.set_num_threads(1)  # forms are built by as many, and the bits of a result do not tell
    clear_prepared()
    with torch.no_grad():
        yield


def make(op: str, form: str = "float32", dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    quantization = "int8" if form == "int8" else None
    made: Any = (
        random_ffn(NEURONS, HIDDEN, dtype=dtype, seed=seed)
        if op == "ffn"
        else random_attention(HEADS, HEAD_DIM, HIDDEN, dtype=dtype, seed=seed)
    )
    return replace(made, quantization=quantization)


def run(weights: Any, width: Any, lengths: list[int], form: str = "float32") -> Tensor:
    """The op on random tokens, computed in a form by the dtype of these or the weights' own."""
    dtype = torch.bfloat16 if form == "bfloat16" else torch.float32
    hidden, offsets = random_hidden(sum(lengths), HIDDEN, dtype=dtype, seed=1), offsets_of(lengths)
    if isinstance(weights, PackedFFN):
        return ffn(hidden, weights, intermediate_size=width, cu_seqlens=offsets)
    return attention(
        hidden, weights, num_heads=width, cu_seqlens=offsets, max_seqlen=max(lengths, default=0)
    )


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("op", OPS)
def test_every_width_has_the_bits_of_before(op: str, form: str, lengths: list[int]) -> None:
    weights = make(op, form)
    widths = [*WIDTHS[op], torch.tensor(WIDTHS[op][-1:] * len(lengths), dtype=torch.int32)]
    widths[-1][1::2] = 1
    expected = [run(weights, width, lengths, form) for width in widths]
    left = release(weights, [form])
    del weights
    for width, before in zip(widths, expected, strict=True):
        assert torch.equal(run(left, width, lengths, form), before)
    assert not torch.equal(expected[0], expected[-2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_layers_in_one_call_have_the_bits_of_before(form: str, dtype: torch.dtype) -> None:
    layers = [
        EncoderLayer(
            make("attention", form, dtype, seed), make("ffn", form, dtype, seed + 9), *sizes
        )
        for seed, sizes in enumerate([(2, 523), (3, 37)])
    ]
    few = dtype if form == "int8" else getattr(torch, form)

    def run_all(of: list[EncoderLayer]) -> Tensor:
        hidden = random_hidden(13, HIDDEN, dtype=few, seed=1)
        made = EncoderLayers.of(of)
        assert made is not None
        result = encoder(hidden, made, cu_seqlens=offsets_of([6, 7]), max_seqlen=7)
        assert result is not None
        return result

    expected = run_all(layers)
    left = [
        layer._replace(attention=release(layer.attention, form), ffn=release(layer.ffn, [form]))
        for layer in layers
    ]
    del layers
    assert torch.equal(run_all(left), expected)


class Watch(TorchDispatchMode):
    """Looks at what operators are given, as debuggers do: at shapes, or at the numbers too."""

    def __init__(self, look: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.look = look
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += [self.look(a) for a in pytree.tree_leaves(args) if isinstance(a, Tensor)]
        return func(*args, **(kwargs or {}))


def test_who_watches_operators_meets_no_tensor_that_cannot_be_read() -> None:
    layer = EncoderLayer(make("attention"), make("ffn"), 2, 523)
    left = layer._replace(
        attention=release(layer.attention, "float32"), ffn=release(layer.ffn, "float32")
    )
    hidden, made = random_hidden(13, HIDDEN, seed=1), EncoderLayers.of([left])
    assert made is not None
    batch: Any = {"cu_seqlens": offsets_of([6, 7]), "max_seqlen": 7}
    expected = encoder(hidden, made, **batch)
    assert expected is not None
    with Watch(type) as shapes:
        watched = encoder(hidden, made, **batch)
    assert watched is not None
    assert torch.equal(watched, expected)
    assert shapes.seen.count(ReleasedWeight) == 12
    with pytest.raises(ReleasedWeightsError), Watch(torch.sum):
        encoder(hidden, made, **batch)


def test_stand_ins_look_like_the_weights_and_are_parameters() -> None:
    weights = make("ffn", dtype=torch.bfloat16)
    left = release(weights, ["int8", "float32"])
    assert is_released(left)
    assert not is_released(weights)
    for name, tensor in tensors_of(weights).items():
        stand_in = getattr(left, name)
        assert isinstance(stand_in, torch.nn.Parameter)
        assert (stand_in.shape, stand_in.dtype, stand_in.device, stand_in.requires_grad) == (
            tensor.shape,
            tensor.dtype,
            tensor.device,
            False,
        )
        assert name in repr(stand_in)
        assert "('int8', 'float32')" in repr(stand_in)
    assert left.validate() is left
    assert left.prefix(NEURONS) is left


def test_the_weights_of_whoever_holds_them_stay() -> None:
    weights = make("ffn")
    expected = run(weights, 37, [9])
    copies = converted(weights)
    left = release(weights, ["float32"])
    for name, tensor in tensors_of(weights).items():
        assert torch.equal(tensor, getattr(copies, name))
    weights.down_weight.zero_()
    assert not torch.equal(run(weights, 37, [9]), expected)
    assert torch.equal(run(left, 37, [9]), expected)


USES: dict[str, Callable[[Any], Any]] = {
    "gradients": lambda w: with_gradients(w),
    "reference": lambda w: forced(w, "reference"),
    "dropout": lambda w: ffn(random_hidden(3, HIDDEN), w, intermediate_size=5, dropout_p=0.1),
    "another-form": lambda w: run(w, 37, [9], "bfloat16"),
    "int8": lambda w: run(replace(w, quantization="int8"), 37, [9]),
    "prefix": lambda w: w.prefix(5),
    "permuted": lambda w: w.permuted(torch.arange(NEURONS)),
    "to_hf": lambda w: w.to_hf(),
    "release": lambda w: release(w, ["float32"]),
    "invalidate": invalidate,
    "converted": lambda w: converted(w, torch.bfloat16),
    "read": lambda w: float(w.up_weight[0, 0]),
    "sum": lambda w: w.up_weight.sum(),
    "numpy": lambda w: w.up_bias.numpy(),
    "list": lambda w: w.up_bias.tolist(),
    "clone": lambda w: w.up_bias.clone(),
    "data": lambda w: w.up_bias.data,
    "set-data": lambda w: setattr(w.up_bias, "data", torch.zeros(NEURONS)),
    "write": lambda w: w.up_bias.copy_(torch.zeros(NEURONS)),
    "fill": lambda w: torch.nn.init.zeros_(w.up_bias),
    "address": lambda w: w.up_bias.untyped_storage().data_ptr(),
    "dlpack": lambda w: torch.from_dlpack(w.up_bias),
    "pickle": lambda w: pickle.dumps(w.up_bias),
    "torch-save": lambda w: torch.save(w.up_bias, io.BytesIO()),
    "inference-mode": lambda w: in_inference_mode(w),
}


def with_gradients(weights: Any) -> Tensor:
    with torch.enable_grad():
        hidden = random_hidden(300, HIDDEN).requires_grad_()
        return ffn(hidden, weights, intermediate_size=37)


def forced(weights: Any, backend: str) -> Tensor:
    with use_backend(backend):
        return run(weights, 37, [9])


def in_inference_mode(weights: Any) -> Tensor:
    with torch.inference_mode():
        return torch.nn.functional.linear(torch.zeros(1, HIDDEN), weights.up_weight)


@pytest.mark.filterwarnings("ignore:ffn. running on the reference")
@pytest.mark.parametrize("use", USES)
def test_what_needs_the_numbers_is_refused(use: str) -> None:
    left = release(make("ffn"), ["float32"])
    expected = run(left, 37, [9])
    with pytest.raises(RuntimeError) as raised:
        USES[use](left)
    by_torch = use in ("numpy", "list", "address")  # whose own refusal of such tensors comes first
    assert isinstance(raised.value, ReleasedWeightsError) != by_torch
    if not by_torch:
        assert "oad the model again" in str(raised.value)
    assert torch.equal(run(left, 37, [9]), expected)


def test_settings_that_no_form_was_made_with_are_refused() -> None:
    left = release(make("ffn"), ["float32"])
    expected = run(left, 37, [9])
    for changed in ({"norm_eps": 0.5}, {"activation": "relu"}):
        with pytest.raises(ValueError, match=r"weights=released, expected a form and settings"):
            run(replace(left, **changed), 37, [9])
    other = release(make("ffn", seed=3), ["float32"])
    with pytest.raises(ValueError, match=r"weights=released, expected a form and settings"):
        run(replace(left, up_bias=other.up_bias), 37, [9])
    assert torch.equal(run(left, 37, [9]), expected)


def test_clearing_frees_only_what_can_be_built_again() -> None:
    weights, left = make("attention"), release(make("ffn"), ["float32"])
    held = prepared_forms()
    expected = run(left, 37, [9])
    run(weights, 2, [9])
    assert prepared_forms()["float32"] > held["float32"]
    clear_prepared()
    assert prepared_forms() == held
    assert torch.equal(run(left, 37, [9]), expected)


def test_copies_share_forms_and_the_last_one_takes_them_along() -> None:
    gc.collect()  # errors hold on to what was released in an earlier test
    builds = cpu_extension().prepared_stats()["builds"]
    left = release(make("ffn"), ["float32"])
    expected, held = run(left, 37, [9]), prepared_bytes()
    copied = copy.deepcopy(left)
    del left
    assert torch.equal(run(copied, 37, [9]), expected)
    assert isinstance(copied.up_weight, ReleasedWeight)
    assert prepared_bytes() == held > 0
    assert cpu_extension().prepared_stats()["builds"] == builds + 1
    del copied
    assert prepared_bytes() == 0


def test_memory_by_form() -> None:
    gc.collect()
    assert prepared_forms() == {}
    alone = {}
    for form in FORMS:
        left = release(make("ffn"), [form])
        alone[form] = prepared_bytes()
        assert prepared_forms() == {form: alone[form]}
        del left
    # 600 neurons fill two groups of 384, and 72 channels 5 panels of 16; units are whole there.
    numbers = 2 * 384 * (72 + 80)
    for form, size in zip(FORMS, (4, 2, 1), strict=True):
        floats = alone[form] - numbers * size
        assert 0 < floats < 4 * (2 * 768 + 4 * 80 + 1)
    left = release(make("ffn"), FORMS)
    assert prepared_forms() == alone
    assert prepared_bytes() == sum(alone.values())
    del left


@pytest.mark.parametrize(
    ("weights", "forms", "error", "message"),
    [
        (make("ffn"), ["int4"], ValueError, r"forms=\['int4'\], expected one or several of float"),
        (make("ffn"), [], ValueError, r"^release: forms=\[\], expected"),
        (torch.zeros(3), ["int8"], TypeError, "weights=Tensor, expected PackedAttention or Packed"),
        (
            make("ffn", dtype=torch.float64),
            ["float32"],
            NotImplementedError,
            "weights are torch.fl",
        ),
        (random_attention(2, 12, 24), ["int8"], NotImplementedError, "head_dim=12, expected a mul"),
        (replace(make("ffn"), up_bias=torch.zeros(3)), ["int8"], ValueError, "up_bias.shape"),
    ],
    ids=["form", "none", "type", "float64", "head-dim", "shape"],
)
def test_what_cannot_be_released(weights: Any, forms: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        release(weights, forms)


def test_int8_of_weights_that_are_not_finite_is_refused() -> None:
    weights = make("ffn")
    weights.down_weight[3, 5] = torch.inf
    with pytest.raises(ValueError, match="down_weight=a tensor with NaN or infinity"):
        release(weights, ["float32", "int8"])
    assert not is_released(weights)
    assert run(weights, 3, [9]).isfinite().all()  # reads no further than the prefix
