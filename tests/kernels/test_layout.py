from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils import _pytree

from dynabert_kernels import PackedAttention, PackedFFN
from dynabert_kernels.testing import (
    converted,
    extracted,
    nan_tails,
    random_attention,
    random_ffn,
    tensors_of,
)

ELASTIC = {
    PackedAttention: ("qkv_weight", "qkv_bias", "out_weight"),
    PackedFFN: ("up_weight", "up_bias", "down_weight"),
}


def attention_roles(num_heads=4, head_dim=6, hidden=10):
    rows = num_heads * head_dim
    names = ("query", "key", "value")
    roles = {f"{name}_weight": torch.randn(rows, hidden) for name in names}
    roles |= {f"{name}_bias": torch.randn(rows) for name in names}
    roles |= {"out_weight": torch.randn(hidden, rows), "out_bias": torch.randn(hidden)}
    return roles | {"norm_weight": torch.randn(hidden), "norm_bias": torch.randn(hidden)}


def ffn_roles(intermediate=14, hidden=10):
    return {
        "up_weight": torch.randn(intermediate, hidden),
        "up_bias": torch.randn(intermediate),
        "down_weight": torch.randn(hidden, intermediate),
        "down_bias": torch.randn(hidden),
        "norm_weight": torch.randn(hidden),
        "norm_bias": torch.randn(hidden),
    }


def test_from_hf_places_every_head_of_attention():
    roles = attention_roles()
    packed = PackedAttention.from_hf(**roles, num_heads=4, norm_eps=1e-5)
    assert packed.qkv_weight.shape == (4, 3, 6, 10)
    assert (packed.num_heads, packed.head_dim, packed.hidden_size) == (4, 6, 10)
    assert packed.norm_eps == 1e-5
    for head in range(4):
        rows = slice(6 * head, 6 * head + 6)
        for index, name in enumerate(("query", "key", "value")):
            assert torch.equal(packed.qkv_weight[head, index], roles[f"{name}_weight"][rows])
            assert torch.equal(packed.qkv_bias[head, index], roles[f"{name}_bias"][rows])
        assert torch.equal(packed.out_weight[head], roles["out_weight"][:, rows].T)


def test_from_hf_transposes_the_second_matrix_of_ffn():
    roles = ffn_roles()
    packed = PackedFFN.from_hf(**roles, activation="relu")
    assert (packed.intermediate_size, packed.hidden_size) == (14, 10)
    assert packed.activation == "relu"
    assert torch.equal(packed.up_weight, roles["up_weight"])
    assert torch.equal(packed.down_weight, roles["down_weight"].T)
    assert packed.down_weight.is_contiguous()


def test_to_hf_undoes_from_hf_for_attention():
    roles = attention_roles()
    back = PackedAttention.from_hf(**roles, num_heads=4).to_hf()
    assert back.keys() == roles.keys()
    assert all(torch.equal(back[name], roles[name]) for name in roles)


def test_to_hf_undoes_from_hf_for_ffn():
    roles = ffn_roles()
    back = PackedFFN.from_hf(**roles).to_hf()
    assert back.keys() == roles.keys()
    assert all(torch.equal(back[name], roles[name]) for name in roles)


@pytest.mark.parametrize(
    "packed", [random_attention(5, 4, 8), random_ffn(5, 8)], ids=["attention", "ffn"]
)
class TestBoth:
    def test_prefix_is_a_contiguous_view(self, packed):
        for width in range(1, 6):
            prefix = packed.prefix(width)
            for name, tensor in tensors_of(prefix).items():
                whole = getattr(packed, name)
                assert tensor.data_ptr() == whole.data_ptr()
                assert tensor.is_contiguous()
                rows = width if name in ELASTIC[type(packed)] else whole.shape[0]
                assert torch.equal(tensor, whole[:rows])

    def test_prefixes_nest(self, packed):
        for name, tensor in tensors_of(packed.prefix(4).prefix(2)).items():
            assert torch.equal(tensor, getattr(packed.prefix(2), name))

    def test_prefix_keeps_gradients_of_the_whole(self, packed):
        whole = converted(packed, requires_grad=True)
        sum(t.sum() for t in tensors_of(whole.prefix(2)).values()).backward()
        for name in ELASTIC[type(packed)]:
            grad = getattr(whole, name).grad
            assert grad[:2].eq(1).all() and grad[2:].eq(0).all()

    def test_permuted_moves_rows_of_elastic_tensors_only(self, packed):
        order = torch.tensor([3, 0, 4, 2, 1])
        moved = packed.permuted(order)
        for name, tensor in tensors_of(moved).items():
            whole = getattr(packed, name)
            expected = whole[order] if name in ELASTIC[type(packed)] else whole
            assert torch.equal(tensor, expected)

    def test_permuted_back_is_the_original(self, packed):
        order = torch.randperm(5)
        back = packed.permuted(order).permuted(order.argsort())
        assert all(torch.equal(t, getattr(packed, n)) for n, t in tensors_of(back).items())

    def test_extracted_shares_no_memory(self, packed):
        for name, tensor in tensors_of(extracted(packed, 3)).items():
            assert tensor.data_ptr() != getattr(packed, name).data_ptr()
            assert torch.equal(tensor, getattr(packed.prefix(3), name))

    def test_nan_tails_touch_only_the_tail(self, packed):
        poisoned = nan_tails(packed, 3)
        for name, tensor in tensors_of(poisoned).items():
            if name in ELASTIC[type(packed)]:
                assert tensor[3:].isnan().all()
                assert torch.equal(tensor[:3], getattr(packed, name)[:3])
            else:
                assert torch.equal(tensor, getattr(packed, name))

    def test_is_frozen(self, packed):
        with pytest.raises(AttributeError):
            packed.norm_eps = 1.0

    def test_is_a_pytree(self, packed):
        leaves, spec = _pytree.tree_flatten(packed)
        again = _pytree.tree_unflatten(leaves, spec)
        assert type(again) is type(packed)
        assert all(torch.equal(t, getattr(packed, n)) for n, t in tensors_of(again).items())

    def test_validate_returns_self(self, packed):
        assert packed.validate() is packed

    @pytest.mark.parametrize("width", [0, -1, 6])
    def test_prefix_refuses_a_width_out_of_range(self, packed, width):
        with pytest.raises(ValueError, match=rf"={width}, expected 1 to 5\."):
            packed.prefix(width)

    @pytest.mark.parametrize("width", [2.0, "2", True, None])
    def test_prefix_refuses_what_is_no_int(self, packed, width):
        with pytest.raises(TypeError, match="expected an int"):
            packed.prefix(width)

    @pytest.mark.parametrize(
        ("order", "error"),
        [
            (torch.tensor([0, 1, 2, 3, 3]), ValueError),
            (torch.tensor([0, 1, 2, 3]), ValueError),
            (torch.tensor([1, 2, 3, 4, 5]), ValueError),
            (torch.zeros(5, 1, dtype=torch.int64), ValueError),
            (torch.zeros(5), TypeError),
            (torch.zeros(5, dtype=torch.bool), TypeError),
            ([0, 1, 2, 3, 4], TypeError),
        ],
        ids=["twice", "short", "shifted", "2d", "float", "bool", "list"],
    )
    def test_permuted_refuses_what_is_no_permutation(self, packed, order, error):
        with pytest.raises(error, match=r"permuted: order.*expected"):
            packed.permuted(order)


def wrong_attention():
    good = random_attention(4, 6, 10)
    yield "qkv_3d", replace(good, qkv_weight=good.qkv_weight[0]), ValueError, "qkv_weight"
    yield "qkv_not_3", replace(good, qkv_weight=good.qkv_weight[:, :2]), ValueError, "qkv_weight"
    yield "qkv_none", replace(good, qkv_weight=None), TypeError, "qkv_weight"
    integers = good.qkv_weight.long()
    yield "qkv_int", replace(good, qkv_weight=integers), TypeError, "qkv_weight.dtype"
    yield "qkv_bias", replace(good, qkv_bias=good.qkv_bias[:3]), ValueError, "qkv_bias.shape"
    yield "out_hf", replace(good, out_weight=good.out_bias), ValueError, "out_weight.shape"
    yield "out_short", replace(good, out_weight=good.out_weight[:2]), ValueError, "out_weight"
    yield "out_bias", replace(good, out_bias=good.out_bias[:9]), ValueError, "out_bias.shape"
    yield "dtype", replace(good, out_weight=good.out_weight.double()), ValueError, "out_weight"
    yield "device", replace(good, out_bias=good.out_bias.to("meta")), ValueError, "out_bias.device"
    yield "norm", replace(good, norm_weight=torch.ones(9)), ValueError, "norm_weight.shape"
    yield "norm_int", replace(good, norm_bias=torch.ones(10).int()), TypeError, "norm_bias.dtype"
    yield "eps_negative", replace(good, norm_eps=-1.0), ValueError, "norm_eps"
    yield "eps_text", replace(good, norm_eps="1e-12"), ValueError, "norm_eps"
    yield "quantization", replace(good, quantization="int4"), ValueError, "quantization='int4'"


def wrong_ffn():
    good = random_ffn(14, 10)
    yield "up_1d", replace(good, up_weight=good.up_bias), ValueError, "up_weight.shape"
    yield "up_list", replace(good, up_weight=[[1.0]]), TypeError, "up_weight"
    yield "up_bias", replace(good, up_bias=good.up_bias[:5]), ValueError, "up_bias.shape"
    transposed = good.down_weight.T
    yield "down_hf", replace(good, down_weight=transposed), ValueError, "down_weight.shape"
    yield "down_bias", replace(good, down_bias=good.up_bias), ValueError, "down_bias.shape"
    yield "dtype", replace(good, up_bias=good.up_bias.half()), ValueError, "up_bias.dtype"
    yield "norm", replace(good, norm_bias=torch.ones(1)), ValueError, "norm_bias.shape"
    yield "activation", replace(good, activation="swish"), ValueError, "activation='swish'"
    yield "quantization", replace(good, quantization=8), ValueError, "quantization=8"
    yield "activation_none", replace(good, activation=None), ValueError, "activation=None"


@pytest.mark.parametrize(
    ("packed", "error", "message"),
    [pytest.param(*case, id=f"{who}-{name}") for who, cases in
     (("attention", wrong_attention()), ("ffn", wrong_ffn())) for name, *case in cases],
)  # fmt: skip
def test_validate_names_what_is_wrong(packed, error, message):
    with pytest.raises(error, match=rf"^Packed\w+: {message}.*expected"):
        packed.validate()


@pytest.mark.parametrize("packed", [random_attention(4, 6, 10), random_ffn(4, 10)], ids=["a", "f"])
def test_quantization_is_kept(packed):
    packed = replace(packed, quantization="int8").validate()
    leaves, structure = _pytree.tree_flatten(packed)
    for other in (
        packed.prefix(2),
        packed.permuted(torch.arange(4).flip(0)),
        packed.with_elastic(packed.elastic()),
        converted(packed),
        _pytree.tree_unflatten(leaves, structure),
    ):
        assert other.quantization == "int8"


def test_layernorm_may_stay_float32_beside_half_precision():
    packed = converted(random_ffn(6, 4), torch.bfloat16)
    wide = replace(packed, norm_weight=torch.ones(4), norm_bias=torch.zeros(4))
    assert wide.validate() is wide


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "num_heads=5"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"num_heads": 2.0}, "num_heads=2.0"),
        ({"query_weight": torch.randn(24)}, "query_weight.shape"),
        ({"key_weight": torch.randn(18, 10)}, "key_weight.shape"),
        ({"value_bias": torch.randn(23)}, "value_bias.shape"),
        ({"out_weight": torch.randn(24, 10)}, "out_weight.shape"),
        ({"key_weight": torch.randn(24, 10).double()}, "key_weight.dtype"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_from_hf_names_what_is_wrong_with_attention(changes, message):
    arguments = {**attention_roles(), "num_heads": 4, **changes}
    with pytest.raises(ValueError, match=rf"^PackedAttention.from_hf: {message}.*expected"):
        PackedAttention.from_hf(**arguments)


def test_from_hf_names_what_is_wrong_with_ffn():
    with pytest.raises(ValueError, match=r"^PackedFFN.from_hf: down_weight.shape=\[14, 10\]"):
        PackedFFN.from_hf(**{**ffn_roles(), "down_weight": torch.randn(14, 10)})


def test_from_hf_keeps_gradients():
    weight = nn.Parameter(torch.randn(14, 10))
    packed = PackedFFN.from_hf(**{**ffn_roles(), "up_weight": weight})
    packed.prefix(3).up_weight.sum().backward()
    assert weight.grad[:3].eq(1).all() and weight.grad[3:].eq(0).all()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    num_heads=st.integers(1, 7),
    head_dim=st.integers(1, 9),
    hidden=st.integers(1, 11),
    data=st.data(),
)
def test_from_hf_then_permuted_then_prefix_is_row_selection(num_heads, head_dim, hidden, data):
    roles = attention_roles(num_heads, head_dim, hidden)
    order = data.draw(st.permutations(range(num_heads)))
    width = data.draw(st.integers(1, num_heads))
    packed = PackedAttention.from_hf(**roles, num_heads=num_heads)
    back = packed.permuted(torch.tensor(order)).prefix(width).to_hf()
    kept = torch.arange(num_heads * head_dim).view(num_heads, head_dim)[order[:width]].flatten()
    assert torch.equal(back["value_weight"], roles["value_weight"][kept])
    assert torch.equal(back["query_bias"], roles["query_bias"][kept])
    assert torch.equal(back["out_weight"], roles["out_weight"][:, kept])
