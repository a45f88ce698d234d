"""Layers on Triton kernels past the ops: the same bits, or None where the ops have to decide."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

if find_spec("triton") is None:
    pytest.skip("the triton package is not installed", allow_module_level=True)

from dynabert_kernels import attention, ffn, use_backend
from dynabert_kernels.ops import _trust
from dynabert_kernels.ops.encoder import EncoderLayer, EncoderLayers, encoder
from dynabert_kernels.testing import nan_tails, random_attention, random_ffn, random_hidden
from dynabert_kernels.varlen import offsets_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [3, 0, 6]
WIDTHS = [(2, 20), (1, 33)]


@pytest.fixture
def layers() -> list[EncoderLayer]:
    made = []
    for seed, (heads, neurons) in enumerate(WIDTHS):
        for_heads = random_attention(3, 32, 48, seed=seed, device=DEVICE)
        for_neurons = random_ffn(40, 48, seed=seed, device=DEVICE)
        made.append(
            EncoderLayer(
                nan_tails(for_heads, heads), nan_tails(for_neurons, neurons), heads, neurons
            )
        )
    return made


def one_by_one(hidden: torch.Tensor, layers: list[EncoderLayer]) -> torch.Tensor:
    offsets = offsets_of(LENGTHS, DEVICE)
    for layer in layers:
        hidden = attention(
            hidden, layer.attention, num_heads=layer.num_heads, cu_seqlens=offsets, max_seqlen=6
        )
        hidden = ffn(hidden, layer.ffn, intermediate_size=layer.intermediate_size)
    return hidden


def at_once(hidden: torch.Tensor, layers: EncoderLayers | None) -> torch.Tensor | None:
    assert layers is not None
    return encoder(hidden, layers, cu_seqlens=offsets_of(LENGTHS, DEVICE), max_seqlen=6)


@pytest.fixture
def hidden(layers: list[EncoderLayer]) -> torch.Tensor:
    """Tokens of a call whose kinds are trusted already."""
    tokens = random_hidden(sum(LENGTHS), 48, device=DEVICE)
    with torch.no_grad(), use_backend("triton"), np.errstate(all="ignore"):
        one_by_one(tokens, layers)
    return tokens


def test_the_same_bits_as_the_ops_one_by_one(
    layers: list[EncoderLayer], hidden: torch.Tensor
) -> None:
    with torch.no_grad(), use_backend("triton"), np.errstate(all="ignore"):
        expected = one_by_one(hidden, layers)
        result = at_once(hidden, EncoderLayers.of(layers))
    assert result is not None
    assert torch.isfinite(result).all()
    assert torch.equal(result, expected)


@pytest.mark.parametrize("op", ["attention", "ffn"])
def test_what_is_not_trusted_is_left_to_the_ops(
    op: str, layers: list[EncoderLayer], hidden: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = {use for use in _trust.trusted if use[1] != op}
    monkeypatch.setattr(_trust, "trusted", others)
    with torch.no_grad(), use_backend("triton"):
        assert at_once(hidden, EncoderLayers.of(layers)) is None


def test_gradients_and_other_backends_are_left_to_the_ops(
    layers: list[EncoderLayer], hidden: torch.Tensor
) -> None:
    packed = EncoderLayers.of(layers)
    with use_backend("triton"):
        assert at_once(hidden, packed) is None
    with torch.no_grad(), use_backend("reference"):
        assert at_once(hidden, packed) is None


def test_fake_tensors_are_left_to_the_ops(layers: list[EncoderLayer], hidden: torch.Tensor) -> None:
    packed = EncoderLayers.of(layers)
    with torch.no_grad(), use_backend("triton"), FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert at_once(hidden, packed) is None
        inside = fake.from_tensor(hidden)
    with torch.no_grad(), use_backend("triton"):
        assert at_once(inside, packed) is None


def test_weights_that_the_kernels_cannot_read_are_left_to_the_ops(
    layers: list[EncoderLayer], hidden: torch.Tensor
) -> None:
    weights = layers[1].ffn
    transposed = weights.down_weight.t().contiguous().t()
    layers[1] = layers[1]._replace(ffn=replace(weights, down_weight=transposed))
    with torch.no_grad(), use_backend("triton"):
        assert at_once(hidden, EncoderLayers.of(layers)) is None
    elsewhere = weights.norm_bias.to("meta")
    layers[1] = layers[1]._replace(ffn=replace(weights, norm_bias=elsewhere))
    with torch.no_grad(), use_backend("triton"):
        assert at_once(hidden, EncoderLayers.of(layers)) is None
