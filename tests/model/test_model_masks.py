"""Masks: padding anywhere changes no real token, and every mask gives defined values."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from dynabert import SubnetConfig

TOLERANCE = {"atol": 1e-5, "rtol": 0.0}
SUBNETS = [None, SubnetConfig(0.5, 2 / 3)]


@pytest.mark.parametrize("subnet", SUBNETS, ids=["full", "half"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_equals_unpadded_on_real_tokens(
    make_hf: Any, ours: Any, make_batch: Any, architecture: str, side: str, subnet: Any
) -> None:
    model = ours(make_hf(architecture, "Model"), "Model")
    lengths = (17, 1, 6, 19)
    batch = make_batch(model.config, lengths=lengths, side=side, extra=3)
    with torch.no_grad():
        got = model(**batch, subnet=subnet)
    real = batch["attention_mask"].bool()
    assert not got.last_hidden_state[~real].any()
    for row, length in enumerate(lengths):
        one = {name: ids[row : row + 1, real[row]] for name, ids in batch.items()}
        # BERT numbers positions from the first column, padding or not, as Hugging Face does.
        positions = real[row].nonzero().T if architecture == "bert" else None
        with torch.no_grad():
            alone = model(**one, position_ids=positions, subnet=subnet)
        torch.testing.assert_close(
            got.last_hidden_state[row, real[row]], alone.last_hidden_state[0], **TOLERANCE
        )
        # The pooler reads the first real token, wherever padding is.
        torch.testing.assert_close(got.pooler_output[row], alone.pooler_output[0], **TOLERANCE)
        assert length == int(real[row].sum())


@pytest.mark.parametrize("side", ["right", "left", "holes"])
def test_masks_equal_hugging_face_on_real_tokens(
    make_hf: Any, ours: Any, make_batch: Any, architecture: str, side: str
) -> None:
    theirs = make_hf(architecture, "Model")
    model = ours(theirs, "Model")
    batch = make_batch(theirs.config, side="right" if side == "holes" else side)
    if side == "holes":  # without pad tokens there: only the mask says so
        batch["attention_mask"] = (batch["input_ids"] % 4 != 1).long()
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        got, expected = model(**batch), theirs(**batch)
    torch.testing.assert_close(
        got.last_hidden_state[real], expected.last_hidden_state[real], **TOLERANCE
    )
    assert not got.last_hidden_state[~real].any()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_any_dtype_of_mask_means_the_same(
    make_hf: Any, ours: Any, make_batch: Any, dtype: torch.dtype
) -> None:
    model = ours(make_hf("bert"))
    batch = make_batch(model.config)
    with torch.no_grad():
        expected = model(**batch).logits
        batch["attention_mask"] = batch["attention_mask"].to(dtype)
        assert torch.equal(model(**batch).logits, expected)


def test_no_mask_equals_a_mask_of_ones(
    make_hf: Any, ours: Any, make_batch: Any, architecture: str
) -> None:
    model = ours(make_hf(architecture))
    batch = make_batch(model.config, lengths=(9, 9), extra=0)
    with torch.no_grad():
        expected = model(**batch).logits
        del batch["attention_mask"]
        assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("side", ["right", "left"])
def test_pad_tokens_without_a_mask_are_read_as_hugging_face_reads_them(
    make_hf: Any, ours: Any, make_batch: Any, architecture: str, side: str
) -> None:
    theirs = make_hf(architecture, "Model")
    model, batch = ours(theirs, "Model"), make_batch(theirs.config, side=side)
    del batch["attention_mask"]
    with torch.no_grad():
        got, expected = model(**batch), theirs(**batch)
    torch.testing.assert_close(got.last_hidden_state, expected.last_hidden_state, **TOLERANCE)


def test_a_fully_masked_sequence_gives_zeros_and_disturbs_nobody(
    make_hf: Any, ours: Any, make_batch: Any, architecture: str
) -> None:
    model = ours(make_hf(architecture, "Model"), "Model")
    batch = make_batch(model.config)
    expected = model(**batch).last_hidden_state
    batch["attention_mask"][1] = 0
    output = model(**batch, output_hidden_states=True)
    assert all(not state[1].any() for state in output.hidden_states)
    assert torch.equal(
        output.pooler_output[1], torch.tanh(model.pooler.dense.bias)
    )  # that of a zero token
    kept = [0, 2]
    torch.testing.assert_close(output.last_hidden_state[kept], expected[kept], **TOLERANCE)
    output.pooler_output.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_batch_without_any_real_token_is_defined(
    make_hf: Any, ours: Any, make_batch: Any
) -> None:
    model = ours(make_hf("bert"))
    batch = make_batch(model.config)
    batch["attention_mask"].zero_()
    logits = model(**batch, subnet=SubnetConfig(0.5)).logits
    assert logits.isfinite().all() and torch.equal(logits[0], logits[2])


def test_an_empty_batch_is_defined(make_hf: Any, ours: Any) -> None:
    model = ours(make_hf("bert"))
    ids = torch.zeros(0, 7, dtype=torch.long)
    for mask in (None, torch.ones(0, 7, dtype=torch.long)):
        output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        assert output.logits.shape == (0, 3)
        assert [state.shape for state in output.hidden_states] == [(0, 7, 96)] * 7
    assert model(input_ids=ids, subnet=[]).logits.shape == (0, 3)


def test_nan_in_a_padded_embedding_reaches_no_real_token(
    make_hf: Any, ours: Any, make_batch: Any
) -> None:
    model = ours(make_hf("bert", "Model"), "Model")
    batch = make_batch(model.config)
    embeds = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = model(inputs_embeds=embeds, **batch)
        embeds[~real] = torch.nan
        got = model(inputs_embeds=embeds, **batch)
    assert torch.equal(got.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(got.pooler_output, expected.pooler_output)


def test_nan_in_a_real_token_stays_in_its_sequence(
    make_hf: Any, ours: Any, make_batch: Any
) -> None:
    model = ours(make_hf("bert", "Model"), "Model")
    batch = make_batch(model.config)
    embeds = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    with torch.no_grad():
        expected = model(inputs_embeds=embeds, **batch).last_hidden_state
        embeds[0, 3] = torch.nan
        got = model(inputs_embeds=embeds, **batch).last_hidden_state
    assert got[0, :17].isnan().all()
    assert torch.equal(got[1:], expected[1:])


def causal(batch: dict[str, Tensor]) -> Tensor:
    seq_len = batch["input_ids"].shape[1]
    visible = torch.ones(seq_len, seq_len, dtype=torch.bool).tril()
    return visible & batch["attention_mask"].bool()[:, None, :]


@pytest.mark.parametrize("form", ["3d", "4d-bool", "4d-int", "4d-additive", "4d-heads"])
@pytest.mark.parametrize("subnet", SUBNETS, ids=["full", "half"])
def test_masks_over_pairs_of_tokens_equal_hugging_face(
    make_hf: Any, ours: Any, make_batch: Any, form: str, subnet: Any
) -> None:
    theirs = make_hf("bert", "Model")
    model, batch = ours(theirs, "Model"), make_batch(theirs.config)
    visible = causal(batch)
    additive = torch.zeros(visible.shape).masked_fill(~visible, float("-inf")).unsqueeze(1)
    mask = {
        "3d": visible.long(),
        "4d-bool": visible.unsqueeze(1),
        "4d-int": visible.unsqueeze(1).long(),
        "4d-additive": additive,
        "4d-heads": additive.expand(-1, 12, -1, -1),
    }[form]
    with pytest.warns(UserWarning, match="runs on the reference backend"), torch.no_grad():
        got = model(**{**batch, "attention_mask": mask}, subnet=subnet).last_hidden_state
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        if subnet is None:
            expected = theirs(**{**batch, "attention_mask": additive}).last_hidden_state
            torch.testing.assert_close(got[real], expected[real], **TOLERANCE)
        # A causal token sees only what is before it, so a shorter text gives the same states.
        short = {name: ids[:, :5] for name, ids in batch.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            short["attention_mask"] = mask[..., :5, :5]
            start = model(**short, subnet=subnet).last_hidden_state
    keep = real[:, :5]
    torch.testing.assert_close(got[:, :5][keep], start[keep], **TOLERANCE)


def test_the_warning_about_pairs_is_said_once(make_hf: Any, ours: Any, make_batch: Any) -> None:
    model = ours(make_hf("bert"))
    batch = make_batch(model.config)
    batch["attention_mask"] = causal(batch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            model(**batch)
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"attention_mask": torch.ones(3, 5)}, ValueError, r"attention_mask.shape=\[3, 5\]"),
        ({"attention_mask": torch.ones(19)}, ValueError, r"attention_mask.shape=\[19\]"),
        ({"attention_mask": torch.ones(3, 19, 5)}, ValueError, r"shape=\[3, 19, 5\]"),
        ({"attention_mask": [[1] * 19] * 3}, TypeError, "attention_mask=list"),
        ({"input_ids": torch.ones(3, 19)}, TypeError, "input_ids=torch.float32"),
        ({"input_ids": torch.ones(19, dtype=torch.long)}, ValueError, r"input_ids.shape=\[19\]"),
        ({"input_ids": [[1, 2]]}, TypeError, r"input_ids=\[\[1, 2\]\], expected an integer"),
        ({"input_ids": None}, ValueError, "neither of input_ids and inputs_embeds"),
        ({"inputs_embeds": torch.ones(3, 19, 96)}, ValueError, "both of input_ids"),
        (
            {"input_ids": None, "inputs_embeds": torch.ones(3, 19, 59)},
            ValueError,
            r"expected \[batch_size, seq_len, 96\]",
        ),
        ({"token_type_ids": torch.ones(3, 19)}, TypeError, "token_type_ids=torch.float32"),
        (
            {"position_ids": torch.ones(2, 19, dtype=torch.long)},
            ValueError,
            r"position_ids.shape=\[2, 19\], expected \[3, 19\]",
        ),
        (
            {"input_ids": torch.full((3, 19), 101)},
            ValueError,
            "input_ids holds 101, expected 0 to 100",
        ),
        (
            {"input_ids": torch.full((3, 19), -1)},
            ValueError,
            "input_ids holds -1, expected 0 to 100",
        ),
        (
            {"token_type_ids": torch.full((3, 19), 2)},
            ValueError,
            "token_type_ids holds 2, expected 0 to 1",
        ),
        (
            {"position_ids": torch.full((1, 19), 40)},
            ValueError,
            "position_ids holds 40, expected 0 to 39",
        ),
        (
            {"input_ids": torch.ones(1, 41, dtype=torch.long)},
            ValueError,
            "seq_len=41, expected 1 to 40",
        ),
        (
            {"input_ids": torch.ones(3, 0, dtype=torch.long)},
            ValueError,
            "seq_len=0, expected 1 to 40",
        ),
    ],
)
def test_wrong_inputs_are_one_clear_error(
    make_hf: Any,
    ours: Any,
    make_batch: Any,
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    model = ours(make_hf("bert"))
    with pytest.raises(error, match=message):
        model(**{**make_batch(model.config), **changes})
