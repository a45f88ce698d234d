import math

import numpy as np
import pytest
import torch

from dynabert.data.examples import TaskSpec
from dynabert.data.glue import GLUE_TASKS
from dynabert.data.metrics import compute_metrics

BINARY = TaskSpec("t", "classification", ("text",), ("no", "yes"), ("accuracy", "f1", "mcc"))
THREE = TaskSpec("t", "classification", ("text",), ("a", "b", "c"), ("accuracy", "f1_macro", "mcc"))
ENTITIES = TaskSpec(
    *("t", "token-classification", ("tokens",), ("O", "B-X", "I-X")),
    metrics=("f1", "precision", "recall"),
    primary_metric="f1",
)
SPEECH = TaskSpec(
    *("t", "token-classification", ("tokens",), ("DT", "NN")),
    metrics=("accuracy", "f1_macro"),
    primary_metric="accuracy",
)
ANSWERS = TaskSpec(
    *("t", "question-answering", ("question", "context")),
    metrics=("f1", "exact_match"),
    primary_metric="f1",
)
SCORES = TaskSpec("t", "regression", ("text",), (), ("pearson", "spearman"))


def test_binary_metrics_against_the_confusion_matrix() -> None:
    # 5 true positives, 2 false positives, 1 false negative, 3 true negatives.
    labels = [1] * 5 + [0] * 2 + [1] + [0] * 3
    predictions = [1] * 5 + [1] * 2 + [0] + [0] * 3
    metrics = compute_metrics(BINARY, predictions, labels)
    assert list(metrics) == ["accuracy", "f1", "mcc"]
    assert metrics["accuracy"] == pytest.approx(8 / 11)
    assert metrics["f1"] == pytest.approx(10 / 13)
    assert metrics["mcc"] == pytest.approx((5 * 3 - 2 * 1) / math.sqrt(7 * 6 * 5 * 4))


def test_macro_f1_weighs_classes_alike() -> None:
    metrics = compute_metrics(THREE, [0, 0, 0, 1, 0], [0, 0, 0, 1, 2])
    assert metrics["accuracy"] == pytest.approx(0.8)
    assert metrics["f1_macro"] == pytest.approx((6 / 7 + 1 + 0) / 3)


def test_tags_are_scored_as_entities_or_word_by_word() -> None:
    found = compute_metrics(ENTITIES, [["B-X", "I-X"], ["B-X"]], [["B-X", "O"], ["B-X"]])
    assert found == pytest.approx({"f1": 0.5, "precision": 0.5, "recall": 0.5})
    found = compute_metrics(SPEECH, [["DT", "NN"], ["NN"]], [["DT", "DT"], ["NN"]])
    assert found == pytest.approx({"accuracy": 2 / 3, "f1_macro": 2 / 3})


def test_answers_are_scored_by_words() -> None:
    found = compute_metrics(ANSWERS, ["in France", "Spain"], [["France"], ["Rome", "Spain"]])
    assert list(found) == ["f1", "exact_match"]
    assert found == pytest.approx({"f1": (2 / 3 + 1) / 2, "exact_match": 0.5})


@pytest.mark.parametrize("spec", [ENTITIES, ANSWERS], ids=["entities", "answers"])
def test_as_many_predictions_as_labels(spec: TaskSpec) -> None:
    for predictions, labels in (([], []), ([["O"]], [["O"], ["O"]])):
        with pytest.raises(ValueError, match="expected one prediction for each of at least one"):
            compute_metrics(spec, predictions, labels)


def test_logits_are_taken_by_their_maximum() -> None:
    logits = torch.tensor([[0.1, 0.2, -1.0], [3.0, 2.0, 1.0], [0.0, 0.0, 0.5]])
    labels = torch.tensor([1, 0, 0])
    assert compute_metrics(THREE, logits, labels) == compute_metrics(THREE, [1, 0, 2], [1, 0, 0])


def test_correlations_against_their_definitions() -> None:
    generator = np.random.default_rng(0)
    labels = generator.uniform(0, 5, 63)
    predictions = np.exp(labels) + generator.uniform(0, 9, 63)
    metrics = compute_metrics(SCORES, predictions[:, None], labels)
    ranks = [np.argsort(np.argsort(values)) for values in (labels, predictions)]
    assert metrics["pearson"] == pytest.approx(np.corrcoef(labels, predictions)[0, 1])
    assert metrics["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])


@pytest.mark.parametrize(
    ("spec", "predictions", "labels", "expected"),
    [
        (BINARY, [0, 0, 0], [0, 1, 1], {"accuracy": 1 / 3, "f1": 0.0, "mcc": 0.0}),
        (BINARY, [0, 0], [0, 0], {"accuracy": 1.0, "f1": 0.0, "mcc": 0.0}),
        (SCORES, [2.5, 2.5, 2.5], [1.0, 2.0, 3.0], {"pearson": 0.0, "spearman": 0.0}),
        (SCORES, [1.0, 2.0], [3.0, 3.0], {"pearson": 0.0, "spearman": 0.0}),
        (SCORES, [1.0, 1.0 + 1e-15], [1.0, 2.0], {"pearson": 0.0, "spearman": 0.0}),
        (SCORES, [0.0, 0.0], [0.0, 1.0], {"pearson": 0.0, "spearman": 0.0}),
        (SCORES, [1.0], [1.0], {"pearson": 0.0, "spearman": 0.0}),
    ],
    ids=["one-class", "all-alike", "score", "label", "rounding", "zero", "one-row"],
)
def test_constant_predictions_are_defined(
    spec: TaskSpec, predictions: list[float], labels: list[float], expected: dict[str, float]
) -> None:
    assert compute_metrics(spec, predictions, labels) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        ([1.0, float("nan")], [1.0, 2.0], "hold NaN or infinity"),
        ([], [], r"labels \(0,\), expected one prediction"),
        ([1.0, 2.0], [1.0], r"predictions \(2,\) and labels \(1,\)"),
    ],
    ids=["nan", "empty", "lengths"],
)
def test_bad_predictions_are_refused(
    predictions: list[float], labels: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compute_metrics(SCORES, predictions, labels)


def test_every_official_metric_is_known() -> None:
    official = {
        "cola": ("mcc",),
        "mrpc": ("accuracy", "f1"),
        "qqp": ("accuracy", "f1"),
        "stsb": ("spearman", "pearson"),
    }
    for name, task in GLUE_TASKS.items():
        assert task.metrics == official.get(name, ("accuracy",))
        labels = [0, 1, 1] if task.label_names else [0.0, 1.0, 5.0]
        perfect = compute_metrics(task.spec(name), labels, labels)
        assert perfect == pytest.approx(dict.fromkeys(task.metrics, 1.0))


def test_task_without_labels_has_no_metrics() -> None:
    assert compute_metrics(TaskSpec("t", "none", ("text",)), [], []) == {}
