"""Scores of a grid against scores of each row run alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertTokenizer

from dynabert.data.collators import DynamicPadCollator
from dynabert.data.examples import Answer, Question, TaggedSentence, TaskSpec
from dynabert.data.question_rows import encode_questions
from dynabert.data.token_rows import encode_sentences
from dynabert.evaluation import GridRow, evaluate_grid, grid_mean
from dynabert.subnet import SubnetConfig, subnet_grid

Rows = list[dict[str, Any]]
Collate = Callable[[Rows], dict[str, Tensor]]

CLASSES = TaskSpec(
    "toy", "classification", ("text",), ("a", "b", "c"), ("accuracy", "f1_macro"), "accuracy"
)
SCORES = TaskSpec("toy", "regression", ("text",), (), ("pearson", "spearman"), "pearson")
GRID = subnet_grid(widths=(1.0, 0.5), depths=(1.0, 1 / 3))


class LastToken(nn.Module):
    """A stand-in whose logits are known: class ``last real token % 3``, score ``token * depth``."""

    def __init__(self, num_labels: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.inner = nn.Dropout(0.5)
        self.num_labels = num_labels
        self.calls: list[dict[str, Any]] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor, subnet: SubnetConfig) -> Any:
        self.calls.append(
            {
                "lengths": attention_mask.sum(1).tolist(),
                "subnet": subnet,
                "training": self.training or self.inner.training,
                "grad": torch.is_grad_enabled(),
                "autocast": torch.get_autocast_dtype("cpu")
                if torch.is_autocast_enabled("cpu")
                else None,
            }
        )
        last = input_ids.gather(1, attention_mask.sum(1, keepdim=True) - 1).squeeze(1)
        if self.num_labels == 1:
            logits = last[:, None] * subnet.depth_mult
        else:
            logits = nn.functional.one_hot(last % 3, 3).float()
        return SimpleNamespace(logits=self.inner(logits.float()) * self.weight)


def test_every_row_counts_as_if_run_alone(model: Any, rows: Rows, pad: Collate) -> None:
    got = evaluate_grid(model, rows, pad, CLASSES, GRID, batch_size=6, progress=False)
    assert [row.subnet for row in got] == GRID
    for subnet, row in zip(GRID, got, strict=True):
        hits = 0
        for example in rows:
            ids = torch.tensor([example["input_ids"]])
            with torch.no_grad():
                hits += int(model(ids, subnet=subnet).logits.argmax() == example["labels"])
        assert row.metrics["accuracy"] == row.primary == hits / len(rows)
        assert row.num_rows == len(rows)


def test_predictions_meet_their_own_labels_again(rows: Rows, pad: Collate) -> None:
    labelled = [{**row, "labels": row["input_ids"][-1] % 3} for row in rows]
    got = evaluate_grid(LastToken(), labelled, pad, CLASSES, GRID, batch_size=7, progress=False)
    assert [row.primary for row in got] == [1.0] * len(GRID)


def test_regression_scores_the_raw_output(rows: Rows, pad: Collate) -> None:
    labelled = [{**row, "labels": 2.0 * row["input_ids"][-1] - 5} for row in rows]
    got = evaluate_grid(LastToken(1), labelled, pad, SCORES, GRID, batch_size=7, progress=False)
    assert [row.primary for row in got] == pytest.approx([1.0] * len(GRID))
    assert set(got[0].metrics) == {"pearson", "spearman"}


class KnowsTheWord(nn.Module):
    """A stand-in that finds one word: as tag 1, and as start and end of the answer. Padding, and
    tokens before the context, look better still."""

    def __init__(self, word: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.word = word

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Any) -> Any:
        hit = (input_ids == self.word) * self.weight
        scores = hit + 2.0 * (input_ids == 2) + 3.0 * (attention_mask == 0)
        return SimpleNamespace(
            logits=torch.stack([0.5 - hit, hit], dim=-1), start_logits=scores, end_logits=scores
        )


@pytest.mark.parametrize("side", ["right", "left"])
def test_tags_and_answers_are_read_wherever_padding_is(side: str) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "great"]
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(words)})
    tokenizer.padding_side = side
    model, collator = KnowsTheWord(words.index("great")), DynamicPadCollator(tokenizer)

    texts = ["a great b", "great", "a b c great great c", "a b"]
    sentences = [
        TaggedSentence(tuple(text.split()), tuple(int(w == "great") for w in text.split()))
        for text in texts
    ]
    tags = TaskSpec("toy", "token-classification", ("t",), ("O", "B-X"), ("f1",), "f1")
    rows = encode_sentences(sentences, tokenizer, 6)
    (row,) = evaluate_grid(model, rows, collator, tags, GRID[:1], batch_size=3, progress=False)
    assert (row.primary, row.num_rows) == (1.0, 4)

    questions = [
        Question(str(n), "c a", text, (Answer("great", text.index("great")),))
        for n, text in enumerate(texts[:3])
    ]
    spec = TaskSpec("toy", "question-answering", ("q",), (), ("f1", "exact_match"), "f1")
    asked = encode_questions(questions, tokenizer, 9)
    (row,) = evaluate_grid(model, asked, collator, spec, GRID[:1], batch_size=2, progress=False)
    assert len(asked) > 3
    assert (row.metrics, row.num_rows) == ({"f1": 1.0, "exact_match": 1.0}, 3)


def test_batches_go_from_long_to_short_once_per_subnet(rows: Rows, pad: Collate) -> None:
    model, collated = LastToken(), []

    def collate(batch: Rows) -> dict[str, Tensor]:
        collated.append(len(batch))
        return pad(batch)

    evaluate_grid(model, rows, collate, CLASSES, GRID, batch_size=8, progress=False)
    assert collated == [8, 8, 8, 8, 8, 1]
    for subnet in GRID:
        seen = [n for call in model.calls if call["subnet"] is subnet for n in call["lengths"]]
        assert seen == sorted((len(row["input_ids"]) for row in rows), reverse=True)


def test_model_runs_in_eval_mode_without_gradients_and_gets_its_modes_back(
    rows: Rows,
    pad: Collate,
) -> None:
    model = LastToken().train()
    model.inner.eval()
    evaluate_grid(model, rows, pad, CLASSES, GRID, progress=False)
    assert not any(call["training"] or call["grad"] for call in model.calls)
    assert (model.training, model.inner.training) == (True, False)


def test_modes_come_back_after_an_error(rows: Rows, pad: Collate) -> None:
    model = LastToken().train()
    model.weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match=r"subnet w1-d1: .*NaN"):
        evaluate_grid(model, rows, pad, CLASSES, GRID, progress=False)
    assert model.training and model.inner.training


def test_model_can_still_be_trained(model: Any, rows: Rows, pad: Collate) -> None:
    evaluate_grid(model, rows, pad, CLASSES, GRID, progress=False)
    model(**pad(rows)).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_autocast_holds_for_every_call(rows: Rows, pad: Collate, dtype: Any) -> None:
    model = LastToken()
    evaluate_grid(model, rows, pad, CLASSES, GRID, autocast_dtype=dtype, progress=False)
    assert {call["autocast"] for call in model.calls} == {dtype}


def test_bfloat16_scores_a_real_model(model: Any, rows: Rows, pad: Collate) -> None:
    got = evaluate_grid(
        model, rows, pad, CLASSES, GRID, autocast_dtype=torch.bfloat16, progress=False
    )
    exact = evaluate_grid(model, rows, pad, CLASSES, GRID, progress=False)
    for half, full in zip(got, exact, strict=True):
        assert half.primary == pytest.approx(full.primary, abs=3 / len(rows))


def test_length_field_is_used_where_a_row_has_it(rows: Rows, pad: Collate) -> None:
    model = LastToken()
    by_hand = [{**row, "length": index} for index, row in enumerate(rows)]
    evaluate_grid(model, by_hand, pad, CLASSES, GRID[:1], batch_size=1, progress=False)
    assert [call["lengths"] for call in model.calls] == [
        [len(row["input_ids"])] for row in reversed(rows)
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": []}, "dataset rows=0"),
        ({"dataset": [{"input_ids": [1]}]}, "row 0 has no labels"),
        ({"subnets": []}, "subnets=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"spec": TaskSpec("plain", "none", ("text",))}, "spec.problem='none'"),
    ],
    ids=["no-rows", "no-labels", "no-subnets", "no-batch", "no-task"],
)
def test_nothing_to_evaluate_is_refused(
    rows: Rows, pad: Collate, changes: dict[str, Any], message: str
) -> None:
    model = LastToken()
    arguments: dict[str, Any] = {
        "dataset": rows,
        "collator": pad,
        "spec": CLASSES,
        "subnets": GRID,
        "progress": False,
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        evaluate_grid(model, **arguments)
    assert not model.calls


def test_grid_mean_is_the_mean_of_the_primary_metric() -> None:
    rows = [GridRow(SubnetConfig(), {"accuracy": s}, s, 1) for s in (0.5, 0.75, 1.0)]
    assert grid_mean(rows) == 0.75
    with pytest.raises(ValueError, match="at least one"):
        grid_mean([])
