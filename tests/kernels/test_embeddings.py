"""Embeddings made by one native call, against float64 and against what they replace."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynabert import DynaBertConfig, DynaBertModel, SubnetConfig
from dynabert_kernels import use_backend
from dynabert_kernels._extension import cpu_extension, extension_error, has_kernel
from dynabert_kernels.ops.embeddings import EmbeddingTables, embeddings
from dynabert_kernels.testing import assert_as_accurate
from dynabert_kernels.varlen import Packing, unpad

pytestmark = pytest.mark.skipif(
    not has_kernel("dynabert::embeddings.cpu"), reason=str(extension_error())
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SUBNET = SubnetConfig(0.5, 0.5)


def make_tables(hidden_size: int, dtype: torch.dtype) -> EmbeddingTables:
    made = torch.Generator().manual_seed(3)
    shapes = (
        (50, hidden_size),
        (40, hidden_size),
        (2, hidden_size),
        (hidden_size,),
        (hidden_size,),
    )
    return EmbeddingTables(*(torch.randn(shape, generator=made).to(dtype) for shape in shapes))


def plain(packed_ids: list[Tensor], tables: EmbeddingTables, dtype: torch.dtype) -> Tensor:
    ids, positions, segments = packed_ids
    word, position, segment, weight, bias = (table.to(dtype) for table in tables)
    total = word[ids] + segment[segments] + position[positions]
    return F.layer_norm(total, total.shape[-1:], weight, bias, 1e-5)


@torch.no_grad()
def embed(ids: Tensor, packing: Packing, tables: EmbeddingTables, **changes: Any) -> Tensor:
    given = {"position_ids": None, "token_type_ids": None, "first_position": 0, **changes}
    made = embeddings(ids, packing=packing, tables=tables, norm_eps=1e-5, **given)
    assert made is not None
    return made


def isas() -> list[str]:
    return list(cpu_extension().supported_isas()) if extension_error() is None else []


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("hidden_size", [1, 16, 63, 96])
@pytest.mark.parametrize("padded", [False, True])
def test_embeddings_are_as_accurate_as_pytorch(
    isa: str, name: str, hidden_size: int, padded: bool
) -> None:
    tables = make_tables(hidden_size, DTYPES[name])
    ids = torch.randint(0, 50, (3, 37))
    positions = torch.randint(0, 40, (1, 37))
    segments = torch.randint(0, 2, (3, 37), dtype=torch.int32)
    mask = torch.rand(3, 37) > (0.4 if padded else -1.0)
    packing = unpad(mask)
    extension = cpu_extension()
    before = extension.isa_name()
    extension.force_isa(isa)
    try:
        actual = embed(ids, packing, tables, position_ids=positions, token_type_ids=segments)
    finally:
        extension.force_isa(before)
    real = [packing.pack(t.expand(3, 37)) for t in (ids, positions, segments.long())]
    truth = plain(real, tables, torch.float64)
    expected = plain(real, tables, DTYPES[name])
    assert_as_accurate("embeddings", actual, expected, truth)


def test_missing_ids_are_columns_and_zeros() -> None:
    tables, ids = make_tables(24, torch.float32), torch.randint(0, 50, (2, 7))
    packing = unpad(torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 0, 0]]))
    explicit = embed(
        ids,
        packing,
        tables,
        position_ids=torch.arange(3, 10)[None],
        token_type_ids=torch.zeros(2, 7, dtype=torch.long),
    )
    assert torch.equal(embed(ids, packing, tables, first_position=3), explicit)


def test_no_tokens_are_no_rows() -> None:
    tables = make_tables(24, torch.float32)
    none = torch.zeros(0, 7, dtype=torch.long)
    assert embed(none, Packing.dense(0, 7), tables).shape == (0, 24)
    ids = torch.ones(2, 7, dtype=torch.long)
    assert embed(ids, unpad(torch.zeros(2, 7)), tables).shape == (0, 24)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": [[1, 50]]}, "^embeddings: input_ids holds 50, expected 0 to 49. The tok"),
        ({"ids": [[-2, 1]]}, "input_ids holds -2, expected 0 to 49"),
        ({"position_ids": [[0, 40]]}, "position_ids holds 40, expected 0 to 39"),
        ({"token_type_ids": [[2, 0]]}, "token_type_ids holds 2, expected 0 to 1"),
        ({"first_position": 39}, "first_position=39, expected at most 38"),
        ({"position_ids": [[0, 1, 2]]}, "position_ids=.*expected int32 or int64"),
    ],
)
def test_wrong_ids_are_one_clear_error(changes: dict[str, Any], message: str) -> None:
    values = {n: torch.tensor(v) if isinstance(v, list) else v for n, v in changes.items()}
    ids = values.pop("ids", torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match=message):
        embed(ids, Packing.dense(1, 2), make_tables(8, torch.float32), **values)


def test_a_wrong_id_at_padding_is_found() -> None:
    packing = unpad(torch.tensor([[1, 0]]))
    with pytest.raises(ValueError, match="input_ids holds 50"):
        embed(torch.tensor([[1, 50]]), packing, make_tables(8, torch.float32))


def test_calls_for_pytorch_get_none() -> None:
    tables, ids = make_tables(8, torch.float32), torch.ones(1, 2, dtype=torch.long)

    def made(ids: Tensor = ids, tables: EmbeddingTables = tables) -> Tensor | None:
        dense = Packing.dense(1, 2)
        return embeddings(ids, None, None, dense, tables, first_position=0, norm_eps=1e-5)

    assert made() is None  # gradients may be needed
    with torch.no_grad():
        assert made() is not None
        assert made(ids=ids.short()) is None
        assert made(tables=make_tables(8, torch.float64)) is None
        with use_backend("reference"):
            assert made() is None
        with torch.autocast("cpu", torch.bfloat16):
            assert made() is None


@pytest.fixture
def model() -> DynaBertModel:
    torch.manual_seed(0)
    config = DynaBertConfig(
        vocab_size=50,
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=64,
        num_hidden_layers=4,
        max_position_embeddings=16,
    )
    model = DynaBertModel(config, add_pooling_layer=False)
    model.train(False)
    return model


@torch.no_grad()
def run(model: DynaBertModel) -> Tensor:
    output = model(torch.arange(24).view(2, 12), subnet=SUBNET)
    hidden: Tensor = output.last_hidden_state
    return hidden


def _module(model: DynaBertModel, name: str) -> nn.Module:
    return model.get_submodule(name)


MODULES = (
    "embeddings.norm",
    "embeddings.word_embeddings",
    "encoder.layer.1",
    "encoder.layer.1.ffn",
)


@pytest.mark.parametrize("name", MODULES)
def test_a_hook_registered_between_calls_is_called(model: DynaBertModel, name: str) -> None:
    run(model)
    seen: list[nn.Module] = []
    handle = _module(model, name).register_forward_hook(lambda module, *_: seen.append(module))
    run(model)
    assert seen == [_module(model, name)]
    handle.remove()
    run(model)
    assert len(seen) == 1


@pytest.mark.parametrize("name", MODULES)
def test_a_global_hook_is_called(model: DynaBertModel, name: str) -> None:
    run(model)
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        run(model)
    finally:
        handle.remove()
    assert _module(model, name) in seen


@pytest.mark.parametrize("name", MODULES)
def test_a_replaced_forward_is_called(model: DynaBertModel, name: str) -> None:
    run(model)
    module = _module(model, name)
    calls: list[int] = []
    original = module.forward

    def forward(*args: Any) -> Any:
        calls.append(1)
        return original(*args)

    module.forward = forward
    run(model)
    assert calls == [1]


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.embeddings.norm, "weight", nn.Parameter(torch.full((32,), 0.5))),
        lambda m: setattr(m.embeddings, "word_embeddings", nn.Embedding(50, 32).eval()),
        lambda m: m.embeddings.word_embeddings.weight.data.mul_(2),
        lambda m: setattr(m.encoder.layer[1].ffn, "up_bias", nn.Parameter(torch.ones(64))),
        lambda m: setattr(m.encoder.layer[3].ffn, "norm_eps", 0.5),
        lambda m: setattr(m.encoder.layer[3].ffn, "activation", "relu"),
        lambda m: m.encoder.layer.__setitem__(1, copy.deepcopy(m.encoder.layer[0])),
        lambda m: setattr(m.config, "depth_rule", "reference"),
        lambda m: m.quantize("int8"),
        lambda m: m.bfloat16(),
    ],
    ids=[
        *("norm", "table", "data", "bias", "eps"),
        *("activation", "layer", "depth_rule", "quantize", "dtype"),
    ],
)
def test_a_change_between_calls_takes_effect(model: DynaBertModel, change: Any) -> None:
    before = run(model)
    change(model)
    after = run(model)
    assert not torch.equal(after.float(), before)
    fresh = DynaBertModel(model.config, add_pooling_layer=False)
    for parameter in fresh.parameters():
        parameter.data = parameter.data.to(after.dtype)
    fresh.train(False)
    fresh.load_state_dict(model.state_dict())
    fresh.quantize(model.quantization)
    for kept, made in zip(model.encoder.layer, fresh.encoder.layer, strict=True):
        for name in ("norm_eps", "activation"):
            setattr(made.ffn, name, getattr(kept.ffn, name))
    assert torch.equal(after, run(fresh))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_watches_its_own_modules(model: DynaBertModel, how: Any) -> None:
    expected = run(model)
    twin = how(model)
    assert torch.equal(run(twin), expected)
    seen: list[int] = []
    twin.encoder.layer[1].register_forward_hook(lambda *_: seen.append(1))
    run(twin)
    run(model)
    assert seen == [1]
    twin.embeddings.norm.weight.data.zero_()
    assert not torch.equal(run(twin), expected)
    assert torch.equal(run(model), expected)


def test_dropout_of_a_part_in_training_is_drawn(model: DynaBertModel) -> None:
    expected = run(model)
    model.embeddings.dropout.train()
    assert not torch.equal(run(model), expected)


def test_tuples_hold_what_outputs_hold(model: DynaBertModel) -> None:
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
        parts = model(ids, output_hidden_states=True, return_dict=False)
    assert len(parts) == 2
    assert torch.equal(parts[0], output.last_hidden_state)
    assert all(map(torch.equal, parts[1], output.hidden_states))
