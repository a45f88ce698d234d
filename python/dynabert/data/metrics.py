"""The official metrics of GLUE, CoNLL and SQuAD, and the like for own files, as fractions."""

from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from dynabert.data.entities import entity_scores
from dynabert.data.examples import TaskSpec
from dynabert.data.squad import answer_scores

_Array = npt.NDArray[Any]


def compute_metrics(spec: TaskSpec, predictions: Any, labels: Any) -> dict[str, float]:
    """Every metric of a task.

    A correlation with constant predictions or labels is 0, and so is an F1 without true positives.

    Args:
        spec: The task; names the metrics.
        predictions: Arrays or CPU tensors. Classification: classes ``[N]`` or logits ``[N,
            num_labels]``; regression: scores ``[N]`` or ``[N, 1]``. Token classification: for each
            sentence the names of its words' tags. Question answering: texts.
        labels: Classes or scores, ``[N]``; tags like those predicted; for each question its right
            answers.

    Returns:
        The metrics by name, in the order of ``spec.metrics``; correlations from -1 to 1, the others
        from 0 to 1.

    Raises:
        ValueError: No rows, shapes that do not match, or predictions that are not finite.
        ModuleNotFoundError: scikit-learn is not installed.
    """
    if spec.problem == "none":
        return {}
    if spec.problem in ("token-classification", "question-answering"):
        if not 0 < len(labels) == len(predictions):
            raise _unmatched(len(predictions), len(labels))
        return _text_metrics(spec, predictions, labels)
    scores = np.asarray(predictions)
    truth = np.asarray(labels)
    if scores.ndim == 2:
        scores = scores.argmax(axis=1) if spec.problem == "classification" else scores[:, 0]
    if truth.ndim != 1 or len(truth) == 0 or scores.shape != truth.shape:
        raise _unmatched(np.shape(predictions), truth.shape)
    require_finite(predictions)
    return {name: _METRICS[name](truth, scores) for name in spec.metrics}


def require_finite(predictions: Any) -> None:
    """Refuse what a model predicts that has diverged.

    Args:
        predictions: Numbers, an array or a CPU tensor.

    Raises:
        ValueError: Some are NaN or infinite.
    """
    if not np.isfinite(np.asarray(predictions)).all():
        raise ValueError(
            "compute_metrics: predictions hold NaN or infinity, expected finite numbers. "
            "The model has diverged; lower the learning rate."
        )


def _unmatched(predictions: object, labels: object) -> ValueError:
    return ValueError(
        f"compute_metrics: predictions {predictions} and labels {labels}, "
        "expected one prediction for each of at least one label. Check the rows."
    )


def _text_metrics(
    spec: TaskSpec, predictions: Sequence[Any], labels: Sequence[Any]
) -> dict[str, float]:
    """Metrics of tags and answers, which are no numbers."""
    if spec.problem == "question-answering":
        return answer_scores(predictions, labels)
    if spec.primary_metric == "f1":
        return entity_scores(predictions, labels)
    scores, truth = (np.array(list(chain.from_iterable(tags))) for tags in (predictions, labels))
    return {name: _METRICS[name](truth, scores) for name in spec.metrics}


def _accuracy(truth: _Array, predicted: _Array) -> float:
    return float(np.mean(truth == predicted))


def _optional(module: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "compute_metrics: scikit-learn is not installed. "
            "Run pip install 'dynabert-kernels[train]'."
        ) from None


def _f1(truth: _Array, predicted: _Array) -> float:
    return float(_optional("sklearn.metrics").f1_score(truth, predicted, zero_division=0.0))


def _f1_macro(truth: _Array, predicted: _Array) -> float:
    f1_score = _optional("sklearn.metrics").f1_score
    return float(f1_score(truth, predicted, average="macro", zero_division=0.0))


def _mcc(truth: _Array, predicted: _Array) -> float:
    if _is_constant(truth) or _is_constant(predicted):
        return 0.0
    return float(_optional("sklearn.metrics").matthews_corrcoef(truth, predicted))


def _is_constant(values: _Array) -> bool:
    """Whether values differ by no more than rounding errors, which correlate with nothing."""
    return bool(np.ptp(values) <= 1e-12 * np.abs(values).max())


def _correlation(name: str) -> Callable[[_Array, _Array], float]:
    def correlation(truth: _Array, predicted: _Array) -> float:
        if _is_constant(truth) or _is_constant(predicted):
            return 0.0
        function = getattr(_optional("scipy.stats"), name)  # comes with scikit-learn
        return float(function(truth.astype(np.float64), predicted.astype(np.float64)).statistic)

    return correlation


_METRICS: dict[str, Callable[[_Array, _Array], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "f1_macro": _f1_macro,
    "mcc": _mcc,
    "pearson": _correlation("pearsonr"),
    "spearman": _correlation("spearmanr"),
}
