"""Inference on Triton kernels runs all layers in one call, once their kinds of call are trusted."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from dynabert import DynaBertConfig, DynaBertModel, SubnetConfig
from dynabert import modeling_sublayers as sublayers
from dynabert_kernels import use_backend
from dynabert_kernels.ops import _trust

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.skipif(find_spec("triton") is None, reason="the triton package is not installed")
def test_a_second_call_asks_no_sublayer(monkeypatch: pytest.MonkeyPatch) -> None:
    config = DynaBertConfig(
        vocab_size=50,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
    )
    model = DynaBertModel(config, add_pooling_layer=False).to(DEVICE).eval()
    ids = torch.randint(50, (2, 5), device=DEVICE)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], device=DEVICE)

    def call(width: float) -> torch.Tensor:
        subnet = SubnetConfig(width_mult=width)
        with torch.no_grad(), use_backend("triton"), np.errstate(all="ignore"):
            output = model(ids, attention_mask=mask, subnet=subnet).last_hidden_state
        assert isinstance(output, torch.Tensor)
        return output

    monkeypatch.setattr(_trust, "trusted", set())
    first = call(1.0)  # by the ops, which trust their kind of call from then on

    def no_op(*_: object, **__: object) -> torch.Tensor:
        raise AssertionError("a sublayer was called")

    monkeypatch.setattr(sublayers, "attention", no_op)
    monkeypatch.setattr(sublayers, "ffn", no_op)
    assert torch.equal(call(1.0), first)
    assert not torch.equal(call(0.5), first)
    with pytest.raises(AssertionError, match="a sublayer was called"):
        model.train()
        call(1.0)
