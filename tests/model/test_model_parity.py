"""Parity with Hugging Face: the full network, every subnet, losses and gradients, within 1e-5."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from dynabert import (
    DynaBertForSequenceClassification,
    DynaBertModel,
    SubnetConfig,
    SubnetShape,
    subnet_grid,
)
from dynabert.hf_checkpoint import to_hf_state_dict

TOLERANCE = {"atol": 1e-5, "rtol": 0.0}
HEADS = [
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMaskedLM",
]


def token_level(head: str) -> bool:
    return head != "ForSequenceClassification"


def logits_of(output: Any) -> Tensor:
    if hasattr(output, "start_logits"):
        return torch.stack((output.start_logits, output.end_logits), dim=-1)
    logits: Tensor = output.logits
    return logits


def labels_for(head: str, config: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    ids, mask = batch["input_ids"], batch["attention_mask"]
    if head == "ForQuestionAnswering":
        # The second answer was cut off with the text, and must not count.
        return {
            "start_positions": torch.tensor([1, ids.shape[1] + 5, 0]),
            "end_positions": torch.tensor([3, ids.shape[1] + 9, 2]),
        }
    if head == "ForSequenceClassification":
        return {"labels": torch.tensor([2, 0, 1])}
    limit = config.num_labels if head == "ForTokenClassification" else config.vocab_size
    labels = ids % limit
    return {"labels": labels.masked_fill((mask == 0) | (ids % 3 == 0), -100)}


@pytest.mark.parametrize("head", HEADS)
def test_full_network_equals_hugging_face(
    make_hf: Any, ours: Any, make_batch: Any, architecture: str, head: str
) -> None:
    theirs = make_hf(architecture, head)
    model = ours(theirs, head)
    batch = make_batch(theirs.config)
    labels = labels_for(head, theirs.config, batch)
    with torch.no_grad():
        got, expected = model(**batch, **labels), theirs(**batch, **labels)
    real = batch["attention_mask"].bool() if token_level(head) else slice(None)
    torch.testing.assert_close(logits_of(got)[real], logits_of(expected)[real], **TOLERANCE)
    if head != "ForQuestionAnswering":  # whose loss, there, depends on what padding holds
        torch.testing.assert_close(got.loss, expected.loss, **TOLERANCE)


def test_question_answering_never_answers_with_padding(
    make_hf: Any, ours: Any, make_batch: Any, architecture: str
) -> None:
    theirs = make_hf(architecture, "ForQuestionAnswering")
    model = ours(theirs, "ForQuestionAnswering")
    batch = make_batch(theirs.config, lengths=(8, 8, 8), extra=5)
    labels = {
        "start_positions": torch.tensor([1, 99, 0]),
        "end_positions": torch.tensor([3, 99, 2]),
    }
    text = {name: ids[:, :8] for name, ids in batch.items()}
    with torch.no_grad():
        got, expected = model(**batch, **labels), theirs(**text, **labels)
        assert int(model(**batch).start_logits.argmax(dim=1).max()) < 8
    torch.testing.assert_close(got.start_logits[:, :8], expected.start_logits, **TOLERANCE)
    torch.testing.assert_close(got.loss, expected.loss, **TOLERANCE)


def test_base_model_equals_hugging_face_state_by_state(
    make_hf: Any, ours: Any, make_batch: Any, architecture: str
) -> None:
    theirs = make_hf(architecture, "Model")
    model = ours(theirs, "Model")
    batch = make_batch(theirs.config)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        got = model(**batch, output_hidden_states=True)
        expected = theirs(**batch, output_hidden_states=True)
    assert len(got.hidden_states) == len(expected.hidden_states) == 7
    for ours_state, their_state in zip(got.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours_state[real], their_state[real], **TOLERANCE)
        assert not ours_state[~real].any()
    assert got.hidden_states[-1] is got.last_hidden_state
    torch.testing.assert_close(got.pooler_output, expected.pooler_output, **TOLERANCE)


@pytest.mark.parametrize("activation", ["gelu_new", "relu"])
def test_other_activations_equal_hugging_face(
    make_hf: Any, ours: Any, make_batch: Any, architecture: str, activation: str
) -> None:
    theirs = make_hf(architecture, "ForMaskedLM", hidden_act=activation)
    model, batch = ours(theirs, "ForMaskedLM"), make_batch(theirs.config)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        got, expected = model(**batch).logits[real], theirs(**batch).logits[real]
    torch.testing.assert_close(got, expected, **TOLERANCE)


def test_explicit_positions_and_embeddings_equal_hugging_face(
    make_hf: Any, ours: Any, make_batch: Any, architecture: str
) -> None:
    theirs = make_hf(architecture, "Model")
    model, batch = ours(theirs, "Model"), make_batch(theirs.config, lengths=(9, 9), extra=0)
    ids = batch.pop("input_ids")
    embeds = theirs.get_input_embeddings()(ids)
    positions = torch.arange(11, 2, -1).unsqueeze(0)
    with torch.no_grad():
        for changed in ({}, {"position_ids": positions}, {"position_ids": positions.expand(2, 9)}):
            got = model(inputs_embeds=embeds, **batch, **changed).last_hidden_state
            expected = theirs(inputs_embeds=embeds, **batch, **changed).last_hidden_state
            torch.testing.assert_close(got, expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("labels", "num_labels", "problem"),
    [
        (torch.tensor([0.5, -1.0, 2.0]), 1, None),
        (torch.tensor([[0.5], [-1.0], [2.0]]), 1, "regression"),
        (torch.tensor([[0.5, 1.0], [-1.0, 0.0], [2.0, 3.0]]), 2, "regression"),
        (torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]), 3, None),
        (torch.tensor([1, 0, 2], dtype=torch.int32), 3, None),
    ],
    ids=["regression", "regression-column", "two-targets", "multi-label", "int32"],
)
def test_sequence_losses_equal_hugging_face(
    make_hf: Any, ours: Any, make_batch: Any, labels: Tensor, num_labels: int, problem: str | None
) -> None:
    theirs = make_hf("bert", num_labels=num_labels, problem_type=problem)
    model, batch = ours(theirs), make_batch(theirs.config)
    with torch.no_grad():
        got = model(**batch, labels=labels).loss
        their_labels = labels.long() if labels.dtype == torch.int32 else labels
        expected = theirs(**batch, labels=their_labels).loss
    torch.testing.assert_close(got, expected, **TOLERANCE)
    assert model.config.problem_type == problem  # a call changes nothing on the model


def test_labels_of_the_wrong_shape_are_refused(make_hf: Any, ours: Any, make_batch: Any) -> None:
    model = ours(make_hf("bert", num_labels=1))
    with pytest.raises(ValueError, match=r"labels.shape=\[2\], expected \[3, 1\] for regression"):
        model(**make_batch(model.config), labels=torch.zeros(2))


@pytest.mark.parametrize("head", HEADS)
def test_gradients_equal_hugging_face(
    make_hf: Any, ours: Any, make_batch: Any, architecture: str, head: str
) -> None:
    theirs = make_hf(architecture, head)
    model = ours(theirs, head)
    is_qa = head == "ForQuestionAnswering"
    batch = make_batch(theirs.config, **({"lengths": (9, 9, 9), "extra": 0} if is_qa else {}))
    labels = labels_for(head, theirs.config, batch)
    theirs(**batch, **labels).loss.backward()
    model(**batch, **labels).loss.backward()
    ours_by_name = {name: p.grad for name, p in model.named_parameters()}
    if head == "ForMaskedLM":  # the tied decoder is listed once
        ours_by_name["lm_head.decoder.weight"] = model.lm_head.decoder.weight.grad
    got = to_hf_state_dict(ours_by_name, model.config)
    assert len(got) >= 80
    for name, parameter in theirs.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(
            got[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def sliced(theirs: nn.Module, layers: list[int], heads: list[int], neurons: list[int]) -> nn.Module:
    """A Hugging Face model cut down by hand to some layers, first heads and first neurons."""
    small = copy.deepcopy(theirs)
    encoder = getattr(small, small.base_model_prefix, small).encoder
    encoder.layer = nn.ModuleList([encoder.layer[index] for index in layers])
    for layer, num_heads, size in zip(encoder.layer, heads, neurons, strict=True):
        rows = num_heads * layer.attention.self.attention_head_size
        for linear in (
            layer.attention.self.query,
            layer.attention.self.key,
            layer.attention.self.value,
        ):
            linear.weight = nn.Parameter(linear.weight[:rows])
            linear.bias = nn.Parameter(linear.bias[:rows])
        out, up, down = layer.attention.output.dense, layer.intermediate.dense, layer.output.dense
        out.weight = nn.Parameter(out.weight[:, :rows])
        up.weight, up.bias = nn.Parameter(up.weight[:size]), nn.Parameter(up.bias[:size])
        down.weight = nn.Parameter(down.weight[:, :size])
    return small


KEPT = {
    (6, "paper"): {1.0: [0, 1, 2, 3, 4, 5], 2 / 3: [0, 2, 3, 5], 0.5: [1, 3, 5]},
    (6, "reference"): {1.0: [0, 1, 2, 3, 4, 5], 2 / 3: [0, 1, 3, 4], 0.5: [0, 2, 4]},
    (12, "paper"): {
        1.0: list(range(12)),
        0.75: [0, 1, 3, 4, 5, 7, 8, 9, 11],
        0.5: [1, 3, 5, 7, 9, 11],
    },
}


@pytest.mark.parametrize(("layers", "rule"), KEPT)
def test_every_subnet_equals_a_sliced_hugging_face_model(
    make_hf: Any, ours: Any, make_batch: Any, architecture: str, layers: int, rule: str
) -> None:
    theirs = make_hf(architecture, num_hidden_layers=layers)
    model = ours(theirs, depth_rule=rule)
    batch = make_batch(theirs.config)
    kept = KEPT[layers, rule]
    for subnet in subnet_grid((1.0, 0.75, 0.5, 0.25), tuple(kept)):
        indices = kept[subnet.depth_mult]
        heads = [round(12 * subnet.width_mult)] * len(indices)
        neurons = [round(84 * subnet.width_mult)] * len(indices)
        with torch.no_grad():
            expected = sliced(theirs, indices, heads, neurons)(**batch, output_hidden_states=True)
            got = model(**batch, subnet=subnet, output_hidden_states=True)
        torch.testing.assert_close(got.logits, expected.logits, **TOLERANCE)
        real = batch["attention_mask"].bool()
        assert len(got.hidden_states) == len(indices) + 1
        for state, expected_state in zip(got.hidden_states, expected.hidden_states, strict=True):
            torch.testing.assert_close(state[real], expected_state[real], **TOLERANCE)


def test_a_subnet_of_other_widths_in_every_layer_equals_a_sliced_model(
    make_hf: Any, ours: Any, make_batch: Any
) -> None:
    theirs = make_hf("bert")
    model, batch = ours(theirs), make_batch(theirs.config)
    layers, heads, neurons = [0, 4, 5], [1, 12, 7], [83, 1, 84]
    subnet = SubnetConfig(
        layers=tuple(layers), num_heads=tuple(heads), intermediate_size=tuple(neurons)
    )
    shape = model.subnet_shape(subnet)
    assert isinstance(shape, SubnetShape)
    with torch.no_grad():
        expected = sliced(theirs, layers, heads, neurons)(**batch).logits
        for given in (subnet, shape):
            torch.testing.assert_close(model(**batch, subnet=given).logits, expected, **TOLERANCE)


def test_nan_beyond_the_prefix_and_in_skipped_layers_changes_no_bit(
    make_hf: Any, ours: Any, make_batch: Any, architecture: str
) -> None:
    model = ours(make_hf(architecture))
    batch = make_batch(model.config)
    for subnet in subnet_grid((1.0, 0.75, 0.5, 0.25, 1 / 12), (1.0, 2 / 3, 0.5, 1 / 6)):
        poisoned = copy.deepcopy(model)
        shapes = {layer.index: layer for layer in model.subnet_shape(subnet).layers}
        with torch.no_grad():
            for index, layer in enumerate(poisoned.dynabert.encoder.layer):
                if index not in shapes:
                    for parameter in layer.parameters():
                        parameter.fill_(torch.nan)
                    continue
                heads, size = shapes[index].num_heads, shapes[index].intermediate_size
                for name in ("qkv_weight", "qkv_bias", "out_weight"):
                    getattr(layer.attention, name)[heads:] = torch.nan
                for name in ("up_weight", "up_bias", "down_weight"):
                    getattr(layer.ffn, name)[size:] = torch.nan
            expected = model(**batch, subnet=subnet, output_hidden_states=True)
            got = poisoned(**batch, subnet=subnet, output_hidden_states=True)
        assert torch.equal(got.logits, expected.logits), subnet.name
        assert expected.logits.isfinite().all()
        pairs = zip(got.hidden_states, expected.hidden_states, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), subnet.name


def test_nan_beyond_the_prefix_reaches_no_gradient(
    make_hf: Any, ours: Any, make_batch: Any
) -> None:
    model = ours(make_hf("bert"))
    batch = make_batch(model.config)
    with torch.no_grad():
        for layer in model.dynabert.encoder.layer:
            for name in ("qkv_weight", "qkv_bias", "out_weight"):
                getattr(layer.attention, name)[3:] = torch.nan
            for name in ("up_weight", "up_bias", "down_weight"):
                getattr(layer.ffn, name)[21:] = torch.nan
    loss = model(**batch, labels=torch.tensor([0, 1, 2]), subnet=SubnetConfig(0.25, 0.5)).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all(), name
    layer = model.dynabert.encoder.layer[1]
    assert not layer.attention.qkv_weight.grad[3:].any()
    assert layer.attention.qkv_weight.grad[:3].any()
    assert model.dynabert.encoder.layer[0].ffn.up_weight.grad is None


def test_the_packed_weights_are_the_parameters_themselves(make_hf: Any, ours: Any) -> None:
    model = ours(make_hf("bert"))
    layer = model.dynabert.encoder.layer[0]
    assert layer.attention.packed().qkv_weight is layer.attention.qkv_weight
    assert layer.ffn.packed().down_weight is layer.ffn.down_weight


def test_real_minilm_equals_hugging_face(minilm_dir: Path) -> None:
    theirs = transformers.AutoModel.from_pretrained(minilm_dir).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_dir)
    model = DynaBertModel.from_pretrained(minilm_dir)
    texts = [
        "Sorted by importance, every narrower subnet is a prefix of the full one.",
        "Yes.",
        "The padding of a short sentence must not change what it means.",
    ]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        got, expected = model(**batch), theirs(**batch)
    torch.testing.assert_close(
        got.last_hidden_state[real], expected.last_hidden_state[real], **TOLERANCE
    )
    torch.testing.assert_close(got.pooler_output, expected.pooler_output, **TOLERANCE)


def test_real_minilm_subnets_equal_sliced_hugging_face(minilm_dir: Path) -> None:
    torch.manual_seed(0)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(minilm_dir).eval()
    model = DynaBertForSequenceClassification.from_pretrained(minilm_dir)
    model.classifier.load_state_dict(theirs.classifier.state_dict())
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_dir)
    batch = tokenizer(["A short one.", "And one that is a little longer."], padding=True)
    inputs = {name: torch.tensor(values) for name, values in batch.items()}
    for subnet in subnet_grid((1.0, 0.75, 0.5, 0.25), (1.0, 2 / 3, 0.5)):
        indices = KEPT[6, "paper"][subnet.depth_mult]
        heads = [round(12 * subnet.width_mult)] * len(indices)
        neurons = [round(1536 * subnet.width_mult)] * len(indices)
        with torch.no_grad():
            expected = sliced(theirs, indices, heads, neurons)(**inputs).logits
            got = model(**inputs, subnet=subnet).logits
        torch.testing.assert_close(got, expected, **TOLERANCE)
