"""All layers of a small batch in one launch, emulated: as accurate as the ops, at any width."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dynabert import DynaBertConfig, DynaBertModel, SubnetConfig
from dynabert.modeling_capture import StaticBatch
from dynabert_kernels import attention, ffn, use_backend
from dynabert_kernels.ops import _cuda, _cuda_encoder
from dynabert_kernels.ops.encoder import EncoderLayer, EncoderLayers
from dynabert_kernels.testing import (
    assert_as_accurate,
    converted,
    nan_tails,
    random_attention,
    random_ffn,
    random_hidden,
)
from dynabert_kernels.varlen import offsets_of
from tests.kernels.emulation import emulated_cuda

HIDDEN, HEADS, NEURONS = 128, 4, 96
LENGTHS = [5, 0, 20, 1]

pytestmark = pytest.mark.timeout(1200)  # the first test of all builds the kernels


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """Backend `cuda` in force on an emulated card with room for the fewest clusters."""
    with emulated_cuda(90, multiprocessors=64):
        monkeypatch.setattr(_cuda, "DEVICE", "cpu")
        monkeypatch.setattr(_cuda, "_MISSING", None)
        yield


def layers_of(widths, *, head_dim=32, hidden_size=HIDDEN, dtype=torch.bfloat16, **changes):
    """Layers with NaN beyond their widths."""
    made = []
    for seed, (heads, neurons) in enumerate(widths):
        of_heads = random_attention(HEADS, head_dim, hidden_size, dtype=dtype, seed=seed)
        of_neurons = random_ffn(NEURONS, hidden_size, dtype=dtype, seed=seed, **changes)
        tails = nan_tails(of_heads, heads), nan_tails(of_neurons, neurons)
        made.append(EncoderLayer(*tails, heads, neurons))
    return made


@torch.no_grad()
def one_by_one(hidden, layers, lengths=LENGTHS):
    """The ops of the reference, on the prefixes alone."""
    dtype, offsets = hidden.dtype, offsets_of(lengths)
    with use_backend("reference"):
        for of_heads, of_neurons, heads, neurons in layers:
            of_heads = converted(of_heads.prefix(heads), dtype)
            of_neurons = converted(of_neurons.prefix(neurons), dtype)
            hidden = attention(
                hidden, of_heads, num_heads=heads, cu_seqlens=offsets, max_seqlen=max(lengths)
            )
            hidden = ffn(hidden, of_neurons, intermediate_size=neurons)
    return hidden


@torch.no_grad()
def at_once(hidden, layers, lengths=LENGTHS, device_widths=None):
    made = EncoderLayers.of(layers, device_widths)
    return _cuda_encoder.run(hidden, made, offsets_of(lengths))


def check(hidden, layers, lengths=LENGTHS):
    actual = at_once(hidden, layers, lengths)
    plain = one_by_one(hidden, layers, lengths)
    assert_as_accurate("encoder", actual, plain, one_by_one(hidden.double(), layers, lengths))


@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize("widths", [[(4, 96), (1, 33)], [(3, 1)]], ids=["two", "one"])
def test_as_accurate_as_plain_pytorch(head_dim, widths):
    hidden = random_hidden(sum(LENGTHS), HIDDEN, dtype=torch.bfloat16)
    check(hidden, layers_of(widths, head_dim=head_dim))


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [[512], [1], [130, 200], [16] * 12], ids=str)
@pytest.mark.parametrize("hidden_size", [128, 384])
def test_lengths(lengths, hidden_size):
    hidden = random_hidden(sum(lengths), hidden_size, dtype=torch.bfloat16)
    check(hidden, layers_of([(2, 64)], head_dim=64, hidden_size=hidden_size), lengths)


def test_widths_on_the_device_give_the_bits_of_the_same_from_the_host():
    hidden = random_hidden(sum(LENGTHS), HIDDEN, dtype=torch.bfloat16)
    layers = layers_of([(3, 47)] * 2)
    widths = torch.tensor([[3], [47]], dtype=torch.int32)
    whole = [layer._replace(num_heads=HEADS, intermediate_size=NEURONS) for layer in layers]
    result = at_once(hidden, whole, device_widths=tuple(widths))
    assert torch.equal(result, at_once(hidden, layers))
    # The same tables, other widths: as a captured launch reads them.
    made = EncoderLayers.of(layers_of([(HEADS, NEURONS)]), tuple(widths))
    offsets = offsets_of(LENGTHS)
    with torch.no_grad():
        for heads, neurons in ((1, 5), (99, 1000), (-1, 0)):
            widths.copy_(torch.tensor([[heads], [neurons]]))
            clamped = min(max(heads, 1), HEADS), min(max(neurons, 1), NEURONS)
            expected = at_once(
                hidden,
                [
                    layers_of([(HEADS, NEURONS)])[0]._replace(
                        num_heads=clamped[0], intermediate_size=clamped[1]
                    )
                ],
            )
            assert torch.equal(_cuda_encoder.run(hidden, made, offsets), expected)


def test_rows_past_the_last_sequence_touch_nothing():
    hidden = random_hidden(sum(LENGTHS) + 9, HIDDEN, dtype=torch.bfloat16)
    hidden[sum(LENGTHS) :] = torch.nan
    layers = layers_of([(2, 40)] * 2)
    result = at_once(hidden, layers)[: sum(LENGTHS)]
    assert torch.equal(result, at_once(hidden[: sum(LENGTHS)].clone(), layers))


def test_a_repeat_gives_the_same_bits():
    hidden = random_hidden(sum(LENGTHS), HIDDEN, dtype=torch.bfloat16)
    layers = layers_of([(4, 96)])
    first = at_once(hidden, layers)
    assert all(torch.equal(first, at_once(hidden, layers)) for _ in range(3))


def test_moved_weights_are_found_where_they_are():
    hidden = random_hidden(sum(LENGTHS), HIDDEN, dtype=torch.bfloat16)
    (layer,) = layers_of([(HEADS, NEURONS)])
    made, offsets = EncoderLayers.of([layer]), offsets_of(LENGTHS)
    with torch.no_grad():
        before = _cuda_encoder.run(hidden, made, offsets)
        layer.ffn.up_weight.data = -layer.ffn.up_weight.data
        after = _cuda_encoder.run(hidden, made, offsets)
        layer.ffn.up_weight.data = layer.ffn.up_weight.data.float()
        assert _cuda_encoder.run(hidden, made, offsets) is None
    assert not torch.equal(before, after)
    layer.ffn.up_weight.data = layer.ffn.up_weight.data.bfloat16()
    assert torch.equal(after, at_once(hidden, [layer]))


@pytest.mark.parametrize(
    ("tokens", "dtype", "change"),
    [
        (513, torch.bfloat16, {}),
        (4, torch.float16, {}),
        (4, torch.bfloat16, {"activation": "relu"}),
        (4, torch.bfloat16, {"hidden_size": 64}),
        (4, torch.bfloat16, {"head_dim": 80}),
    ],
    ids=["tokens", "float16", "relu", "hidden_size", "head_dim"],
)
def test_what_the_kernel_is_not_made_for_is_left_to_the_ops(tokens, dtype, change):
    layers = layers_of([(2, 40)], dtype=dtype, **change)
    hidden = random_hidden(tokens, layers[0].ffn.hidden_size, dtype=dtype)
    assert at_once(hidden, layers, [tokens]) is None


def test_layers_with_two_epsilons_are_left_to_the_ops():
    (layer,) = layers_of([(2, 40)])
    layer = layer._replace(ffn=replace(layer.ffn, norm_eps=1e-3))
    assert at_once(random_hidden(4, HIDDEN, dtype=torch.bfloat16), [layer], [4]) is None


def test_calls_that_need_gradients_are_left_to_the_ops():
    hidden = random_hidden(4, HIDDEN, dtype=torch.bfloat16)
    made = EncoderLayers.of(layers_of([(2, 40)]))
    assert _cuda_encoder.run(hidden, made, offsets_of([4])) is None


@pytest.fixture
def model():
    config = DynaBertConfig(
        vocab_size=50,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=NEURONS,
    )
    torch.manual_seed(0)
    return DynaBertModel(config, add_pooling_layer=False).eval().bfloat16().requires_grad_(False)


def test_a_model_and_its_graph_take_one_launch_for_all_layers(model, monkeypatch):
    launches = []
    launch = _cuda_encoder.launch
    monkeypatch.setattr(
        _cuda_encoder, "launch", lambda *given: launches.append(given) or launch(*given)
    )
    ids = torch.arange(14).view(2, 7)
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 3:] = 0
    half = SubnetConfig(width_mult=0.5, depth_mult=0.5)
    static = StaticBatch(model, 2, 7)
    with torch.no_grad():
        for subnet in (None, half):
            actual = model(input_ids=ids, attention_mask=mask, subnet=subnet).last_hidden_state
            graph = static.run(static.load(ids, mask, subnet=subnet)).last_hidden_state
            with use_backend("reference"):
                expected = model(input_ids=ids, attention_mask=mask, subnet=subnet)
            for result in (actual, graph):
                torch.testing.assert_close(result, expected.last_hidden_state, atol=0.05, rtol=0.05)
            assert torch.equal(actual[mask.bool()], graph[mask.bool()])
    assert len(launches) == 4
