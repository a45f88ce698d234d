"""What Hugging Face's users do with any model: Auto classes, pipelines, checkpointing, autocast."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertTokenizer,
    pipeline,
)

import dynabert
from dynabert import DynaBertForSequenceClassification, SubnetConfig

TOLERANCE = {"atol": 1e-5, "rtol": 0.0}
HALF = SubnetConfig(0.5, 2 / 3)


@pytest.mark.parametrize(
    ("auto", "head"),
    [
        (AutoModel, "Model"),
        (AutoModelForSequenceClassification, "ForSequenceClassification"),
        (AutoModelForTokenClassification, "ForTokenClassification"),
        (AutoModelForQuestionAnswering, "ForQuestionAnswering"),
        (AutoModelForMaskedLM, "ForMaskedLM"),
    ],
)
def test_auto_classes_load_a_dynabert_directory(
    make_hf: Any, ours: Any, make_batch: Any, tmp_path: Path, auto: Any, head: str
) -> None:
    model = ours(make_hf("bert", head), head)
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is getattr(dynabert, f"DynaBert{head}")
    batch = make_batch(model.config)
    with torch.no_grad():
        for got, expected in zip(loaded(**batch).values(), model(**batch).values(), strict=True):
            assert torch.equal(got, expected)


@pytest.fixture
def saved_with_tokenizer(make_hf: Any, ours: Any, tmp_path: Path) -> Path:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a", "very"]
    tokenizer = BertTokenizer(vocab={word: place for place, word in enumerate(words)})
    folder = tmp_path / "saved"
    tokenizer.save_pretrained(folder)
    ours(make_hf("bert", num_labels=2)).save_pretrained(folder)
    return folder


def test_pipeline_runs_the_saved_model_and_a_view_of_it(saved_with_tokenizer: Path) -> None:
    classify = pipeline("text-classification", model=str(saved_with_tokenizer), device="cpu")
    texts = ["a very good film", "bad film", "very very very bad"]
    full = classify(texts, batch_size=2, top_k=None)
    assert classify.model.config.model_type == "dynabert"
    model = DynaBertForSequenceClassification.from_pretrained(saved_with_tokenizer)
    narrow = pipeline(
        "text-classification",
        model=model.with_subnet(HALF),
        tokenizer=classify.tokenizer,
        device="cpu",
    )
    half = narrow(texts, batch_size=3, top_k=None)
    for text, full_scores, half_scores in zip(texts, full, half, strict=True):
        inputs = classify.tokenizer(text, return_tensors="pt")
        for scores, subnet in ((full_scores, None), (half_scores, HALF)):
            with torch.no_grad():
                expected = model(**inputs, subnet=subnet).logits.softmax(-1)[0]
            by_label = {entry["label"]: entry["score"] for entry in scores}
            got = torch.tensor([by_label["LABEL_0"], by_label["LABEL_1"]])
            torch.testing.assert_close(got, expected, **TOLERANCE)
    assert full != half


def test_a_view_runs_its_subnet_and_leaves_the_model_alone(
    make_hf: Any, ours: Any, make_batch: Any, tmp_path: Path
) -> None:
    model = ours(make_hf("bert"))
    batch = make_batch(model.config)
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    view = model.with_subnet(HALF)
    with torch.no_grad():
        full, half = model(**batch).logits, model(**batch, subnet=HALF).logits
        assert torch.equal(view(**batch).logits, half)
        assert torch.equal(view(**batch, subnet=SubnetConfig()).logits, full)
        body = view.dynabert(**batch).last_hidden_state
        assert torch.equal(body, model.dynabert(**batch, subnet=HALF).last_hidden_state)
        narrower = view.with_subnet(SubnetConfig(0.25))
        assert torch.equal(
            narrower(**batch).logits, model(**batch, subnet=SubnetConfig(0.25)).logits
        )
        assert torch.equal(view(**batch).logits, half)
        assert torch.equal(view.with_subnet(None)(**batch).logits, full)
    assert type(view) is type(model)
    assert {name: id(parameter) for name, parameter in view.named_parameters()} == before
    calls = []
    view.register_forward_hook(lambda *_: calls.append(1))
    view.extra = torch.nn.Linear(1, 1)
    assert not hasattr(model, "extra")
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, full) and not calls
    with pytest.raises(ValueError, match=r"width_mult=0.3"):
        model.with_subnet(SubnetConfig(0.3))
    view.save_pretrained(tmp_path)
    loaded = DynaBertForSequenceClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, full)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_equal_gradients(
    make_hf: Any, ours: Any, make_batch: Any, architecture: str, reentrant: bool
) -> None:
    plain = ours(make_hf(architecture)).train()
    model = copy.deepcopy(plain)
    # transformers 5.23 renamed it, and warns of the old name.
    name = "activation_checkpointing"
    name = name if hasattr(model, f"{name}_enable") else "gradient_checkpointing"
    getattr(model, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": reentrant}})
    assert all(layer.gradient_checkpointing for layer in model.dynabert.encoder.layer)
    batch = make_batch(model.config)
    subnets: list[Any] = [None, HALF, SubnetConfig(0.25, 0.5)]
    for subnet in (None, HALF, subnets):
        for each in (plain, model):
            each.zero_grad(set_to_none=True)
            torch.manual_seed(3)  # dropout is on, and must be replayed
            each(**batch, subnet=subnet, labels=torch.tensor([0, 1, 2])).loss.backward()
        expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
        for name, parameter in model.named_parameters():
            if expected[name] is None:
                assert parameter.grad is None
            else:
                torch.testing.assert_close(parameter.grad, expected[name], **TOLERANCE)


def test_dropout_is_on_in_training_only_and_follows_the_config(
    make_hf: Any, ours: Any, make_batch: Any
) -> None:
    batch = None
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
        off = {
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "classifier_dropout": 0.0,
        }
        theirs = make_hf("bert", **{**off, name: 0.5})
        model = ours(theirs)
        batch = batch or make_batch(model.config)
        expected = model(**batch).logits
        assert torch.equal(model(**batch).logits, expected)
        model.train()
        assert not torch.equal(model(**batch).logits, model(**batch).logits), name
    model = ours(make_hf("bert", **off)).train()
    assert torch.equal(model(**batch).logits, model(**batch).logits)


def test_mean_of_dropped_out_states_is_hugging_faces(
    make_hf: Any, ours: Any, make_batch: Any
) -> None:
    theirs = make_hf("bert", num_hidden_layers=1, classifier_dropout=0.0)
    model, batch = ours(theirs).train(), make_batch(theirs.config, lengths=(9,))
    theirs.train()
    rows = {name: ids.expand(4000, -1) for name, ids in batch.items()}
    with torch.no_grad():
        got, expected = model(**rows).logits, theirs(**rows).logits
    error = (got.var(dim=0) + expected.var(dim=0)).div(4000).sqrt()
    assert ((got.mean(dim=0) - expected.mean(dim=0)).abs() < 5 * error).all()
    torch.testing.assert_close(got.std(dim=0), expected.std(dim=0), atol=0.0, rtol=0.08)


@pytest.mark.parametrize("subnet", [None, HALF, [None, HALF, SubnetConfig(0.25, 0.5)]])
def test_autocast_bfloat16_is_near_float32_and_trains(
    make_hf: Any, ours: Any, make_batch: Any, subnet: Any
) -> None:
    theirs = make_hf("bert")
    model, batch = ours(theirs), make_batch(theirs.config)
    labels = torch.tensor([0, 1, 2])
    exact = model(**batch, subnet=subnet).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch, subnet=subnet, labels=labels)
        their_logits = theirs(**batch).logits.float()
    output.loss.backward()
    their_error = (their_logits - theirs(**batch).logits).abs().max()
    # Bit for bit, two bfloat16 paths differ; neither may be further from float32 than the other.
    assert (output.logits.float() - exact).abs().max() <= 3 * their_error
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_run_whole(
    make_hf: Any, ours: Any, make_batch: Any, dtype: torch.dtype
) -> None:
    theirs = make_hf("bert")
    model, batch = ours(theirs), make_batch(theirs.config)
    with torch.no_grad():
        exact = model(**batch, subnet=HALF).logits
        got = model.to(dtype)(**batch, subnet=HALF, output_hidden_states=True)
    assert got.logits.dtype == dtype
    assert all(state.dtype == dtype for state in got.hidden_states)
    bound = {torch.bfloat16: 0.3, torch.float16: 0.04, torch.float64: 1e-5}[dtype]
    assert (got.logits - exact).abs().max() < bound


def test_tuples_in_the_place_of_output_objects(make_hf: Any, ours: Any, make_batch: Any) -> None:
    for head in ("Model", "ForSequenceClassification", "ForQuestionAnswering", "ForMaskedLM"):
        model = ours(make_hf("bert", head), head)
        batch = make_batch(model.config)
        with torch.no_grad():
            expected = model(**batch, output_hidden_states=True)
            got = model(**batch, output_hidden_states=True, return_dict=False)
            model.config.return_dict = False
            also = model(**batch, output_hidden_states=True)
        assert isinstance(got, tuple) and isinstance(also, tuple)
        assert len(got) == len(also) == len(expected.to_tuple())
        assert torch.equal(got[0], expected[0]) and len(got[-1]) == 7


def test_attention_probabilities_are_refused_and_unknown_arguments_named(
    make_hf: Any, ours: Any, make_batch: Any
) -> None:
    model = ours(make_hf("bert"))
    batch = make_batch(model.config)
    with pytest.raises(NotImplementedError, match=r"output_attentions=True.*hidden states"):
        model(**batch, output_attentions=True)
    with pytest.raises(TypeError, match=r"subnets=SubnetConfig.*Check its spelling"):
        model(**batch, subnets=HALF)
    with torch.no_grad():
        expected = model(**batch).logits
        harmless = {"output_attentions": False, "use_cache": False, "num_items_in_batch": 3}
        assert torch.equal(model(**batch, **harmless, head_mask=None).logits, expected)


def test_sentence_embedding_callers_pass_what_the_signature_lists(
    make_hf: Any, ours: Any, make_batch: Any
) -> None:
    model = ours(make_hf("bert", "Model"), "Model").with_subnet(HALF)
    accepted = set(inspect.signature(model.forward).parameters)
    batch = make_batch(model.config)
    assert set(batch) <= accepted
    with torch.no_grad():
        states = model(**batch, return_dict=False)[0]
    weights = batch["attention_mask"].unsqueeze(-1).float()
    mean = (states * weights).sum(dim=1) / weights.sum(dim=1)
    # Padding is zero, so the mask is only needed for the count.
    torch.testing.assert_close(mean, states.sum(dim=1) / weights.sum(dim=1))


def test_embeddings_can_be_resized_and_stay_tied(make_hf: Any, ours: Any, tmp_path: Path) -> None:
    model = ours(make_hf("bert", "ForMaskedLM"), "ForMaskedLM")
    words, decoder = model.get_input_embeddings(), model.get_output_embeddings()
    assert decoder.weight is words.weight
    old = words.weight.detach().clone()
    model.resize_token_embeddings(107, mean_resizing=False)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight[:101], old)
    ids = torch.tensor([[100, 106, 3]])
    assert model(input_ids=ids).logits.shape == (1, 3, 107)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


def test_a_model_can_be_copied_and_its_parameter_count_is_the_full_one(
    make_hf: Any, ours: Any, make_batch: Any
) -> None:
    theirs = make_hf("bert")
    model = ours(theirs)
    assert model.num_parameters() == theirs.num_parameters()
    assert model.with_subnet(HALF).num_parameters() == theirs.num_parameters()
    twin = copy.deepcopy(model.with_subnet(HALF))
    batch = make_batch(model.config)
    with torch.no_grad():
        expected = model(**batch, subnet=HALF).logits
        next(model.parameters()).zero_()
        assert torch.equal(twin(**batch).logits, expected)


def test_config_can_ask_for_hidden_states(make_hf: Any, ours: Any, make_batch: Any) -> None:
    model = ours(make_hf("bert"), output_hidden_states=True)
    batch = make_batch(model.config)
    assert len(model(**batch, subnet=HALF).hidden_states) == 5
    assert model(**batch, output_hidden_states=False).hidden_states is None
