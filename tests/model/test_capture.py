"""The body of a captured graph against ordinary calls; the graphs themselves need a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dynabert import ForEach, SubnetConfig, subnet_grid
from dynabert.modeling_capture import StaticBatch

TOLERANCE = {"atol": 1e-5, "rtol": 0.0}
HEADS = (
    "Model",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMaskedLM",
)
MIXES: dict[str, Any] = {
    "ungrouped": [SubnetConfig(0.25), None, SubnetConfig(0.25), SubnetConfig(0.75)],
    "grouped": [SubnetConfig(0.5), SubnetConfig(0.5), None, None],
    "half-deep": [SubnetConfig(width, 0.5) for width in (0.25, 1.0, 0.25, 0.5)],
    "per-layer": [
        SubnetConfig(num_heads=(1, 12, 3, 7, 2, 5), intermediate_size=(84, 1, 7, 21, 3, 40)),
        SubnetConfig(num_heads=5),
        None,
        SubnetConfig(intermediate_size=17),
    ],
}


def assert_same(got: Any, expected: Any, rows: int, columns: int) -> None:
    assert type(got) is type(expected)
    assert list(got) == list(expected)
    for name, value in expected.items():
        pairs = zip(got[name], value, strict=True) if name == "hidden_states" else [(None, None)]
        for one, other in pairs:
            one, other = (got[name], value) if one is None else (one, other)
            is_per_token = other.dim() > 1 and other.shape[1] == columns
            one = one[:rows, :columns] if is_per_token else one[:rows]
            torch.testing.assert_close(one, other, **TOLERANCE)


@pytest.mark.parametrize("side", ["right", "left", "none"])
@pytest.mark.parametrize("head", HEADS)
def test_body_equals_the_call_at_every_subnet(
    make_hf: Any, ours: Any, make_batch: Any, architecture: str, head: str, side: str
) -> None:
    model = ours(make_hf(architecture, head), head)
    lengths = (9, 9, 9, 9) if side == "none" else (17, 1, 6, 11)
    batch = make_batch(model.config, lengths=lengths, side=side, extra=0)
    if side == "none":
        del batch["attention_mask"]
    rows, columns = batch["input_ids"].shape
    static = StaticBatch(model, rows, columns, output_hidden_states=True)
    with torch.no_grad():
        for subnet in subnet_grid((1.0, 0.5, 1 / 12), (1.0, 0.5)):
            key = static.load(**batch, subnet=subnet)
            assert key.dense == (side == "none") and not key.per_row
            expected = model(**batch, subnet=subnet, output_hidden_states=True)
            assert_same(static.run(key), expected, rows, columns)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("side", ["right", "left", "none"])
def test_body_equals_the_call_at_mixed_widths(
    make_hf: Any, ours: Any, make_batch: Any, mix: str, side: str
) -> None:
    model = ours(make_hf("bert"))
    batch = make_batch(model.config, lengths=(5, 13, 0, 8), side="right", extra=0)
    if side == "none":
        del batch["attention_mask"]
    rows, columns = batch["input_ids"].shape
    static = StaticBatch(model, rows, columns, output_hidden_states=True)
    with torch.no_grad():
        key = static.load(**batch, subnet=MIXES[mix])
        assert key.per_row
        expected = model(**batch, subnet=MIXES[mix], output_hidden_states=True)
        assert_same(static.run(key), expected, rows, columns)


@pytest.mark.parametrize("subnet", [SubnetConfig(0.5), MIXES["per-layer"][0], "mixed"], ids=str)
def test_smaller_batches_leave_no_trace_of_larger_ones(
    make_hf: Any, ours: Any, make_batch: Any, architecture: str, subnet: Any
) -> None:
    model = ours(make_hf(architecture))
    static = StaticBatch(model, 5, 20)
    for number, lengths in enumerate(((17, 20, 6, 11, 3), (4, 9), (2,), (7, 12, 12), (20,) * 5)):
        batch = make_batch(model.config, lengths=lengths, extra=0, seed=number)
        if number % 2:
            del batch["token_type_ids"]
        if number == 3:
            del batch["attention_mask"]
        rows, columns = batch["input_ids"].shape
        widths = [SubnetConfig(width) for width in (0.25, 0.75, 0.25, 1.0, 0.5)]
        chosen = widths[:rows] if subnet == "mixed" else subnet
        with torch.no_grad():
            key = static.load(**batch, subnet=chosen)
            assert_same(static.run(key), model(**batch, subnet=chosen), rows, columns)


def test_weights_written_to_are_read_by_the_next_run(
    make_hf: Any, ours: Any, make_batch: Any
) -> None:
    model = ours(make_hf("bert"))
    batch = make_batch(model.config)
    static = StaticBatch(model, *batch["input_ids"].shape)
    with torch.no_grad():
        before = static.run(static.load(**batch)).logits.clone()
        model.dynabert.encoder.layer[0].ffn.up_weight.mul_(2)
        after = static.run(static.load(**batch)).logits
        torch.testing.assert_close(after, model(**batch).logits, **TOLERANCE)
    assert not torch.equal(before, after)


def test_views_run_their_own_subnet(make_hf: Any, ours: Any, make_batch: Any) -> None:
    model = ours(make_hf("bert"))
    batch = make_batch(model.config)
    view = model.with_subnet(SubnetConfig(0.25, 0.5))
    static = StaticBatch(view, *batch["input_ids"].shape)
    with torch.no_grad():
        got = static.run(static.load(**batch)).logits
        torch.testing.assert_close(got, view(**batch).logits, **TOLERANCE)


def test_what_does_not_fit_is_named(make_hf: Any, ours: Any) -> None:
    static = StaticBatch(ours(make_hf("bert")), 2, 8)
    ids = torch.ones(2, 8, dtype=torch.long)
    for change, kind, message in (
        ({"input_ids": ids.repeat(2, 1)}, ValueError, "1 to 2 sequences of at most 8"),
        ({"input_ids": ids.repeat(1, 2)}, ValueError, "Capture a larger batch"),
        ({"input_ids": ids[:0]}, ValueError, "1 to 2 sequences"),
        ({"input_ids": ids.float()}, TypeError, "an integer Tensor"),
        ({"attention_mask": ids[:, :4]}, ValueError, "attention_mask.shape"),
        ({"attention_mask": [1]}, TypeError, "attention_mask=list"),
        ({"token_type_ids": ids[:, :4]}, ValueError, "token_type_ids.shape"),
        ({"subnet": [None]}, ValueError, "one per sequence"),
        ({"subnet": [None, SubnetConfig(1, 0.5)]}, ValueError, "2 sets of layers"),
        ({"subnet": ForEach((SubnetConfig(),))}, TypeError, "expected a SubnetConfig"),
    ):
        with pytest.raises(kind, match=message):
            static.load(**{"input_ids": ids, **change})


def test_capture_without_a_gpu_says_so(make_hf: Any, ours: Any) -> None:
    with pytest.raises(ValueError, match=r"capture: device=cpu, expected a CUDA device"):
        ours(make_hf("bert")).capture(2, 8)
