"""Wrong arguments of both ops: each is refused before any work, with one clear sentence."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from dynabert_kernels import attention, ffn
from dynabert_kernels.testing import random_attention, random_ffn, random_hidden
from dynabert_kernels.varlen import offsets_of

HEADS, HEAD_DIM, NEURONS, HIDDEN = 5, 32, 150, 72


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


ATTENTION_GOOD = {
    "hidden": random_hidden(12, HIDDEN),
    "weights": random_attention(HEADS, HEAD_DIM, HIDDEN),
    "num_heads": 3,
    "cu_seqlens": offsets_of([5, 7]),
    "max_seqlen": 7,
}
ATTENTION_EQUAL = {"cu_seqlens": offsets_of([6, 6]), "max_seqlen": 6}


ATTENTION_WRONG = {
    "hidden_list": ({"hidden": [[1.0]]}, TypeError, "hidden=list"),
    "hidden_int": ({"hidden": torch.ones(12, HIDDEN).int()}, TypeError, "hidden.dtype"),
    "hidden_complex": ({"hidden": torch.ones(12, HIDDEN) + 0j}, TypeError, "hidden.dtype"),
    "hidden_padded": ({"hidden": torch.ones(2, 6, HIDDEN)}, ValueError, "hidden.shape"),
    "hidden_narrow": ({"hidden": torch.ones(12, 71)}, ValueError, "hidden.shape"),
    "hidden_double": ({"hidden": torch.ones(12, HIDDEN).double()}, ValueError, "hidden.dtype"),
    "hidden_meta": ({"hidden": torch.ones(12, HIDDEN, device="meta")}, ValueError, "hidden.device"),
    "half_weights": (
        {"weights": random_attention(HEADS, HEAD_DIM, HIDDEN, dtype=torch.bfloat16)},
        ValueError,
        "hidden.dtype",
    ),
    "weights_dict": ({"weights": {}}, TypeError, "weights=dict"),
    "heads_zero": ({"num_heads": 0}, ValueError, "num_heads=0"),
    "heads_negative": ({"num_heads": -3}, ValueError, "num_heads=-3"),
    "heads_many": ({"num_heads": 6}, ValueError, "num_heads=6"),
    "heads_float": ({"num_heads": 2.5}, TypeError, r"num_heads=2\.5"),
    "heads_whole_float": ({"num_heads": 3.0}, TypeError, r"num_heads=3\.0"),
    "heads_bool": ({"num_heads": True}, TypeError, "num_heads=True"),
    "heads_none": ({"num_heads": None}, TypeError, "num_heads=None"),
    "heads_list": ({"num_heads": [3, 3]}, TypeError, "num_heads="),
    "each_int64": ({"num_heads": torch.tensor([3, 3])}, TypeError, "num_heads.dtype"),
    "each_none": ({"num_heads": int32()}, ValueError, "num_heads.shape"),
    "each_column": ({"num_heads": int32(3, 3)[:, None]}, ValueError, "num_heads.shape"),
    "one_many": ({"num_heads": int32(6)}, ValueError, r"num_heads\[0\]=6"),
    "each_long": ({"num_heads": int32(3, 3, 3)}, ValueError, "num_heads.shape"),
    "each_scalar": ({"num_heads": torch.tensor(3).int()}, ValueError, "num_heads.shape"),
    "each_zero": ({"num_heads": int32(3, 0)}, ValueError, r"num_heads\[1\]=0"),
    "each_many": ({"num_heads": int32(6, 1)}, ValueError, r"num_heads\[0\]=6"),
    "each_meta": ({"num_heads": int32(3, 3).to("meta")}, ValueError, "num_heads.device"),
    "offsets_int64": ({"cu_seqlens": torch.tensor([0, 5, 12])}, TypeError, "cu_seqlens="),
    "offsets_list": ({"cu_seqlens": [0, 5, 12]}, TypeError, "cu_seqlens=list"),
    "offsets_none": ({"cu_seqlens": None}, TypeError, "cu_seqlens=NoneType"),
    "offsets_2d": ({"cu_seqlens": int32(0, 5, 12)[None]}, ValueError, "cu_seqlens.shape"),
    "offsets_empty": ({"cu_seqlens": int32()}, ValueError, "cu_seqlens.shape"),
    "offsets_start": ({"cu_seqlens": int32(1, 5, 12)}, ValueError, "cu_seqlens runs"),
    "offsets_end": ({"cu_seqlens": int32(0, 5, 11)}, ValueError, "cu_seqlens runs"),
    "offsets_fall": ({"cu_seqlens": int32(0, 7, 5, 12)}, ValueError, r"cu_seqlens\[2\]=5"),
    "offsets_meta": ({"cu_seqlens": int32(0, 12).to("meta")}, ValueError, "cu_seqlens.device"),
    "longest_short": ({"max_seqlen": 6}, ValueError, "max_seqlen=6"),
    "longest_negative": ({"max_seqlen": -1}, ValueError, "max_seqlen=-1"),
    "longest_float": ({"max_seqlen": 7.0}, TypeError, "max_seqlen="),
    "longest_tensor": ({"max_seqlen": torch.tensor(7)}, TypeError, "max_seqlen="),
    "dropout_one": ({"dropout_p": 1.0}, ValueError, "dropout_p=1.0"),
    "dropout_negative": ({"dropout_p": -0.1}, ValueError, "dropout_p=-0.1"),
    "dropout_nan": ({"dropout_p": math.nan}, ValueError, "dropout_p=nan"),
    "dropout_text": ({"dropout_p": "0.1"}, TypeError, "dropout_p='0.1'"),
    "inner_dropout": ({"attention_dropout_p": 2}, ValueError, "attention_dropout_p=2"),
    "seed_float": ({"seed": 1.5}, TypeError, "seed=1.5"),
    "seed_negative": ({"seed": -1}, ValueError, "seed=-1"),
    "seed_large": ({"seed": 2**63}, ValueError, "seed=9223372036854775808"),
    "mask_ragged": ({"attn_mask": torch.ones(2, 1, 7, 7).bool()}, ValueError, "attn_mask with 12"),
    "mask_2d": (
        {**ATTENTION_EQUAL, "attn_mask": torch.ones(2, 6).bool()},
        ValueError,
        "attn_mask.shape",
    ),
    "mask_heads": (
        {**ATTENTION_EQUAL, "attn_mask": torch.ones(2, 2, 6, 6)},
        ValueError,
        "attn_mask.shape",
    ),
    "mask_batch": (
        {**ATTENTION_EQUAL, "attn_mask": torch.ones(3, 1, 6, 6)},
        ValueError,
        "attn_mask.shape",
    ),
    "mask_keys": (
        {**ATTENTION_EQUAL, "attn_mask": torch.ones(2, 1, 6, 5)},
        ValueError,
        "attn_mask.shape",
    ),
    "mask_int": (
        {**ATTENTION_EQUAL, "attn_mask": torch.ones(2, 1, 6, 6).int()},
        TypeError,
        "attn_mask=",
    ),
    "mask_list": ({**ATTENTION_EQUAL, "attn_mask": [[True]]}, TypeError, "attn_mask=list"),
}


@pytest.mark.parametrize(
    ("changes", "error", "message"), ATTENTION_WRONG.values(), ids=ATTENTION_WRONG.keys()
)
def test_attention_names_what_is_wrong(changes, error, message):
    with pytest.raises(error, match=rf"^attention: {message}.*expected.*\. \w"):
        attention(**{**ATTENTION_GOOD, **changes})


def test_attention_accepts_what_the_wrong_cases_start_from():
    assert attention(**ATTENTION_GOOD).isfinite().all()
    assert attention(**{**ATTENTION_GOOD, **ATTENTION_EQUAL}).isfinite().all()


FFN_GOOD = {
    "hidden": random_hidden(12, HIDDEN),
    "weights": random_ffn(NEURONS, HIDDEN),
    "intermediate_size": 37,
}
FFN_OFFSETS = offsets_of([5, 7])
FFN_EACH = {"intermediate_size": int32(37, 9)}
FFN_WRONG = {
    "hidden_none": ({"hidden": None}, TypeError, "hidden=NoneType"),
    "hidden_int": ({"hidden": torch.ones(12, HIDDEN).int()}, TypeError, "hidden.dtype"),
    "hidden_3d": ({"hidden": torch.ones(2, 6, HIDDEN)}, ValueError, "hidden.shape"),
    "hidden_1d": ({"hidden": torch.ones(HIDDEN)}, ValueError, "hidden.shape"),
    "hidden_wide": ({"hidden": torch.ones(12, 73)}, ValueError, "hidden.shape"),
    "hidden_double": ({"hidden": torch.ones(12, HIDDEN).double()}, ValueError, "hidden.dtype"),
    "hidden_meta": ({"hidden": torch.ones(12, HIDDEN, device="meta")}, ValueError, "hidden.device"),
    "weights_none": ({"weights": None}, TypeError, "weights=NoneType"),
    "size_zero": ({"intermediate_size": 0}, ValueError, "intermediate_size=0"),
    "size_negative": ({"intermediate_size": -1}, ValueError, "intermediate_size=-1"),
    "size_many": ({"intermediate_size": 151}, ValueError, "intermediate_size=151"),
    "size_float": ({"intermediate_size": 0.5}, TypeError, r"intermediate_size=0\.5"),
    "size_bool": ({"intermediate_size": True}, TypeError, "intermediate_size=True"),
    "size_list": ({"intermediate_size": [37, 9]}, TypeError, "intermediate_size="),
    "each_no_offsets": (FFN_EACH, ValueError, "cu_seqlens=None"),
    "each_int64": (
        {"intermediate_size": torch.tensor([3, 3]), "cu_seqlens": FFN_OFFSETS},
        TypeError,
        "intermediate_size.dtype",
    ),
    "each_long": (
        {"intermediate_size": int32(37, 9, 9), "cu_seqlens": FFN_OFFSETS},
        ValueError,
        "intermediate_size.shape",
    ),
    "one_no_offsets": ({"intermediate_size": int32(37)}, ValueError, "cu_seqlens=None"),
    "one_zero": (
        {"intermediate_size": int32(0), "cu_seqlens": FFN_OFFSETS},
        ValueError,
        r"intermediate_size\[0\]=0",
    ),
    "each_zero": (
        {"intermediate_size": int32(37, 0), "cu_seqlens": FFN_OFFSETS},
        ValueError,
        r"intermediate_size\[1\]=0",
    ),
    "each_many": (
        {"intermediate_size": int32(999, 1), "cu_seqlens": FFN_OFFSETS},
        ValueError,
        r"intermediate_size\[0\]=999",
    ),
    "offsets_int64": ({**FFN_EACH, "cu_seqlens": FFN_OFFSETS.long()}, TypeError, "cu_seqlens="),
    "offsets_end": ({**FFN_EACH, "cu_seqlens": int32(0, 5, 13)}, ValueError, "cu_seqlens runs"),
    "offsets_fall": (
        {**FFN_EACH, "cu_seqlens": int32(0, 13, 12)},
        ValueError,
        r"cu_seqlens\[2\]=12",
    ),
    "offsets_unused": ({"cu_seqlens": int32(0, 5)}, ValueError, "cu_seqlens runs"),
    "dropout_one": ({"dropout_p": 1}, ValueError, "dropout_p=1"),
    "dropout_none": ({"dropout_p": None}, TypeError, "dropout_p=None"),
    "seed_text": ({"seed": "1"}, TypeError, "seed='1'"),
    "seed_bool": ({"seed": True}, TypeError, "seed=True"),
    "seed_negative": ({"seed": -5}, ValueError, "seed=-5"),
}


@pytest.mark.parametrize(("changes", "error", "message"), FFN_WRONG.values(), ids=FFN_WRONG.keys())
def test_ffn_names_what_is_wrong(changes, error, message):
    with pytest.raises(error, match=rf"^ffn: {message}.*expected.*\. \w"):
        ffn(**{**FFN_GOOD, **changes})


def test_wrong_weights_are_named_by_the_op():
    broken = replace(FFN_GOOD["weights"], activation="swish")
    with pytest.raises(ValueError, match=r"^PackedFFN: activation='swish', expected one of"):
        ffn(**{**FFN_GOOD, "weights": broken})
