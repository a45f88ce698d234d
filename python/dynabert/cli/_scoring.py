"""Scores of subnets on examples of a task, and which of its examples a run learned from."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from dynabert.cli._place import ModelPlace
    from dynabert.data.examples import AnyExample, Problem, TaskData, TaskSpec
    from dynabert.evaluation import GridRow
    from dynabert.modeling_pretrained import DynaBertPreTrainedModel
    from dynabert.subnet import SubnetConfig

Scorer = Callable[[Sequence["SubnetConfig"]], "list[GridRow]"]


def scorer(
    model: DynaBertPreTrainedModel,
    where: ModelPlace,
    spec: TaskSpec,
    examples: Sequence[AnyExample],
    max_length: int,
    **how: Any,
) -> Scorer:
    """What scores subnets of a model on some examples of a task.

    Args:
        model: A model with a head for the task, or an encoder alone for pairs with a score.
        where: Where the model comes from, for its tokeniser.
        spec: The task.
        examples: Examples of the task.
        max_length: Tokens of the longest row.
        **how: Options that `evaluate_grid` and `evaluate_similarity` share.

    Raises:
        ValueError: The task is not one for this model.
    """
    from transformers import AutoTokenizer

    from dynabert.data.collators import DynamicPadCollator, encode
    from dynabert.data.examples import Example
    from dynabert.evaluation import evaluate_grid
    from dynabert.training.problems import MODEL_CLASSES, encode_examples
    from dynabert.training.task_agnostic import evaluate_similarity

    tokenizer = AutoTokenizer.from_pretrained(where.model_dir)
    collator = DynamicPadCollator(tokenizer)
    if isinstance(model, tuple(MODEL_CLASSES.values())):
        if not isinstance(model, MODEL_CLASSES.get(spec.problem, ())):
            raise ValueError(
                f"--task: {spec.name} is {spec.problem}, expected a task for "
                f"{type(model).__name__}. Was the model trained on this task?"
            )
        if model.config.num_labels != spec.num_labels:
            raise ValueError(
                f"--task: {spec.name} has {spec.num_labels} labels, expected "
                f"{model.config.num_labels} as the model has. Was it trained on this task?"
            )
        dataset = encode_examples(examples, spec.problem, tokenizer, max_length)
        return lambda subnets: evaluate_grid(model, dataset, collator, spec, subnets, **how)
    if spec.problem != "regression" or len(spec.text_fields) != 2:
        raise ValueError(
            f"--task: {spec.name}, expected pairs with a score such as stsb. "
            "The model is an encoder without a classifier."
        )
    pairs = [item for item in examples if isinstance(item, Example)]
    first, second = (
        encode([Example(text, None, None) for text in texts], tokenizer, max_length)
        for texts in ([item.text for item in pairs], [str(item.text_pair) for item in pairs])
    )
    scores = [float(item.label or 0.0) for item in pairs]
    # As the run that trained it pools; a model alone does not tell.
    how["pooling"] = (where.run or {"arguments": {}})["arguments"].get("pooling", "mean")
    return lambda subnets: evaluate_similarity(
        model, first, second, scores, collator, subnets, **how
    )


def problem_of_files(model: DynaBertPreTrainedModel) -> Literal["auto"] | Problem:
    """What own files have to hold for a model to be scored on them."""
    from dynabert import DynaBertForSequenceClassification
    from dynabert.training.problems import MODEL_CLASSES

    if isinstance(model, DynaBertForSequenceClassification):
        return "regression" if model.config.num_labels == 1 else "auto"
    known = (problem for problem, kind in MODEL_CLASSES.items() if isinstance(model, kind))
    return next(known, "regression")


def rows_like(
    examples: Sequence[AnyExample], others: Sequence[AnyExample], count: int, seed: int
) -> list[AnyExample]:
    """A seeded choice of `count` examples that are about as long as `others`, shuffled; all of them
    where there are fewer.

    Training rows can be much shorter than those a model is judged by (SST-2's are mostly parts of
    sentences), and what is best for them is not best for the others.
    """
    order = _shuffled(len(examples), seed)
    if len(examples) <= count:
        return [examples[index] for index in order]
    by_length = sorted((_length(examples[index]), place) for place, index in enumerate(order))
    lengths = [length for length, _ in by_length]
    wanted = sorted(map(_length, others))
    chosen, after = [], 0
    for number in range(count):
        target = wanted[number * len(wanted) // count]
        nearest = max(bisect_left(lengths, target), after)
        nearest = min(nearest, len(lengths) - (count - number))  # enough remain for the others
        chosen.append(by_length[nearest][1])
        after = nearest + 1
    return [examples[order[place]] for place in sorted(chosen)]


def _shuffled(count: int, seed: int) -> list[int]:
    """0 to ``count - 1``, ordered by a hash: the same with every version of Python."""
    return sorted(
        range(count), key=lambda index: hashlib.sha256(f"rows:{seed}:{index}".encode()).digest()
    )


def _length(example: AnyExample) -> int:
    """About how long a row is: in words of a tagged sentence, else in characters."""
    texts = {
        name: getattr(example, name, None) for name in ("words", "text", "text_pair", "context")
    }
    return sum(len(text) for text in texts.values() if text is not None)


def rows_not_learned(
    where: ModelPlace, train: Sequence[AnyExample], load: Callable[..., TaskData]
) -> list[AnyExample] | None:
    """The training rows that a run did not learn from; None where that cannot be told.

    They are those its choice of rows left out, and those it held out to score heads and neurons.

    Args:
        where: The run, or a model alone, of which nothing is known.
        train: All training rows of the task, as loaded.
        load: Loads the task again; takes ``max_train_rows``, ``balanced`` and ``seed``.
    """
    from dynabert.data.examples import holdout_split, subsample

    if where.run is None:
        return None
    arguments, data = where.run["arguments"], where.run["data"]
    seed, count = arguments["seed"], data["train_rows"]
    chosen: Sequence[AnyExample] | None = train if count == len(train) else None
    for balanced in (False, True) if chosen is None and count < len(train) else ():
        if balanced and not isinstance(getattr(train[0], "label", None), int):
            continue
        again = load(max_train_rows=count, balanced=balanced, seed=seed)
        if again.fingerprint == data["fingerprint"]:
            chosen = subsample(train, count, seed, balanced=balanced)
    if chosen is None:
        return None
    learned = chosen
    if arguments["importance_source"] == "holdout":
        most = max(1, len(chosen) // 10)
        learned, _ = holdout_split(chosen, min(arguments["importance_rows"] or most, most), seed)
    learned_from = set(map(id, learned))
    return [row for row in train if id(row) not in learned_from]
