"""Copies of a model keep the native calls: one for the embeddings, one for all layers."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dynabert import SubnetConfig
from dynabert_kernels.ops import _cpu

pytestmark = pytest.mark.skipif(
    _cpu.kernels_missing() is not None, reason=str(_cpu.kernels_missing())
)


class CountOps(TorchDispatchMode):
    """Counts the operators of this project that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func.namespace == "dynabert":
            self.counts[func._schema.name.removeprefix("dynabert::")] += 1
        return func(*args, **(kwargs or {}))


def native_calls(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, int]:
    with torch.no_grad(), CountOps() as ops:
        model(**batch)
    return {name: count for name, count in ops.counts.items() if name != "unpad"}


def with_new_list(model: Any) -> Any:
    """Only some layers, in a new list: what pruning code does."""
    encoder = model.dynabert.encoder
    encoder.layer = nn.ModuleList([copy.deepcopy(layer) for layer in encoder.layer][::2])
    model.config.num_hidden_layers = len(encoder.layer)
    return model


COPIES: dict[str, Callable[[Any], Any]] = {
    "itself": lambda model: model,
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "view": lambda model: model.with_subnet(SubnetConfig(0.5)),
    "new-list-of-layers": with_new_list,
}


@pytest.mark.parametrize("is_used_before", [False, True], ids=["unused", "used"])
@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_makes_the_same_native_calls(
    make_hf: Any, ours: Any, make_batch: Any, kind: str, is_used_before: bool
) -> None:
    model = ours(make_hf("bert"))
    batch = make_batch(model.config)
    if is_used_before:
        native_calls(model, batch)
    assert native_calls(COPIES[kind](model), batch) == {"embeddings": 1, "encoder": 1}


def test_a_hook_on_a_layer_ends_the_call_for_all(make_hf: Any, ours: Any, make_batch: Any) -> None:
    model = ours(make_hf("bert", num_hidden_layers=2))
    batch = make_batch(model.config)
    native_calls(model, batch)
    seen: list[int] = []
    model.dynabert.encoder.layer[1].register_forward_hook(lambda *_: seen.append(1))
    assert native_calls(model, batch) == {"embeddings": 1, "attention": 2, "ffn": 2}
    assert seen == [1]
