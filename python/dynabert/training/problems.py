"""What differs from one kind of problem to another: a task's rows as tokens, its models and their
scores.

`stages` trains whatever is prepared here, in one loop for every problem.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dynabert.configuration_dynabert import DynaBertConfig
from dynabert.data.collators import DynamicPadCollator, EncodedDataset, encode
from dynabert.data.examples import AnyExample, Problem, TaskData, TaskSpec, holdout_split
from dynabert.data.question_rows import encode_questions
from dynabert.data.token_rows import encode_sentences
from dynabert.evaluation import GridRow, evaluate_grid
from dynabert.importance import LossFunction
from dynabert.modeling_dynabert import DynaBertModel
from dynabert.modeling_heads import (
    DynaBertForQuestionAnswering,
    DynaBertForSequenceClassification,
    DynaBertForTokenClassification,
)
from dynabert.modeling_pretrained import DynaBertPreTrainedModel
from dynabert.subnet import SubnetConfig
from dynabert.training.arguments import FULL, LABEL_FREE_STAGES, RunArguments
from dynabert.training.augmentation.training_rows import add_augmented
from dynabert.training.task_agnostic import FIDELITY, contrastive_loss, embed, evaluate_fidelity

MODEL_CLASSES: dict[Problem, type[DynaBertPreTrainedModel]] = {
    "classification": DynaBertForSequenceClassification,
    "regression": DynaBertForSequenceClassification,
    "token-classification": DynaBertForTokenClassification,
    "question-answering": DynaBertForQuestionAnswering,
}
"""Models with a head, by the problem it is for."""
_ROW_LENGTH = 128
_ROW_LENGTH_OF: dict[Problem, int] = {"question-answering": 384}


def row_length(max_length: int | None, problem: Problem, config: DynaBertConfig) -> int:
    """Tokens of the longest row: `max_length`, or for None what suits the problem and the model.

    Raises:
        ValueError: More than the model has positions.
    """
    longest = config.max_seq_len
    if max_length is None:
        return min(longest, _ROW_LENGTH_OF.get(problem, _ROW_LENGTH))
    if max_length > longest:
        raise ValueError(
            f"row_length: max_length={max_length}, expected at most {longest}. The model has no "
            "more positions."
        )
    return max_length


def encode_examples(
    examples: Sequence[Any],
    problem: Problem,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    longest: int | None = None,
    file: Path | None = None,
) -> EncodedDataset:
    """Tokenise examples as their problem needs it.

    Long sentences of token classification and long contexts of question answering become several
    rows, so that only texts are ever cut; `longest` and `file` are for them, see
    `dynabert.data.collators.encode`.

    Raises:
        ValueError: Examples cannot be tokenised.
    """
    if problem == "token-classification":
        return encode_sentences(examples, tokenizer, max_length)
    if problem == "question-answering":
        return encode_questions(examples, tokenizer, max_length)
    return encode(examples, tokenizer, max_length, longest=longest, file=file)


class PreparedTask:
    """A task made ready for the models of one run.

    Attributes:
        collator: Makes a batch of rows.
        train_collator: The same for training, padding to `max_length` if padding is learned from.
        train_rows: What the stages learn from, tokenised.
        taught_rows: What stages with a teacher learn from: the same, and the augmented file.
        importance_rows: What heads and neurons are scored on, tokenised.
        validation_rows: What subnets are scored on, tokenised.
    """

    def __init__(
        self,
        model_path: str,
        data: TaskData,
        tokenizer: PreTrainedTokenizerBase,
        run: RunArguments,
    ) -> None:
        """Tokenise the examples of `data` as `run` says; `model_path` is what the run starts from.

        Raises:
            ValueError: Examples cannot be tokenised for this model.
        """
        self._model_path = model_path
        self._spec = data.spec
        self._run = run
        config = DynaBertConfig.from_pretrained(model_path)
        max_length = row_length(run.max_length, data.spec.problem, config)
        self.collator = DynamicPadCollator(tokenizer)
        self.train_collator = self.collator
        if run.hidden_padding:
            self.train_collator = DynamicPadCollator(tokenizer, max_length)
        train, held_out = data.train, data.validation[: run.importance_rows]
        if run.importance_source == "holdout":
            count = max(1, len(train) // 10)
            count = min(run.importance_rows or count, count)
            train, held_out = holdout_split(train, count, run.seed)

        def encoded(examples: Sequence[AnyExample], file: Path | None) -> EncodedDataset:
            refused = run.long_texts or ("error" if data.spec.name == "file" else "cut")
            longest = config.max_seq_len if refused == "error" else None
            return encode_examples(
                examples, data.spec.problem, tokenizer, max_length, longest=longest, file=file
            )

        from_train = run.importance_source == "holdout"
        self.importance_rows = encoded(
            held_out, data.train_file if from_train else data.validation_file
        )
        self.train_rows = encoded(train, data.train_file)
        self.taught_rows = self.train_rows
        if run.augmented_file is not None and set(LABEL_FREE_STAGES) & set(run.stages):
            self.taught_rows = add_augmented(
                self.train_rows, run.augmented_file, data, tokenizer, max_length
            )
        self.validation_rows = encoded(data.validation, data.validation_file)

    @property
    def has_labels(self) -> bool:
        """Whether a model can learn from labels, rather than from a teacher alone."""
        return self._spec.problem != "none"

    @property
    def report_spec(self) -> TaskSpec:
        """The task with the metrics that `evaluate` reports."""
        if self.has_labels:
            return self._spec
        return replace(self._spec, metrics=(FIDELITY,), primary_metric=FIDELITY)

    @property
    def importance_loss(self) -> LossFunction | None:
        """The loss that heads and neurons are scored by; None: the model's own, on labels."""
        return None if self.has_labels else contrastive_loss(pooling=self._run.pooling)

    def load(self, path: str, *, fresh_head: bool = False) -> DynaBertPreTrainedModel:
        """The model for this task from a checkpoint, in float32.

        Args:
            path: A BERT, RoBERTa or DynaBERT checkpoint.
            fresh_head: Initialise a head that the checkpoint does not have.

        Raises:
            ValueError: The checkpoint has no head for this task, or one for other labels.
        """
        options: dict[str, Any] = {"dtype": torch.float32}
        if self._run.depth_rule is not None:
            options["depth_rule"] = self._run.depth_rule
        if not self.has_labels:
            # The pooler would get no gradient, and is not what a sentence is embedded with.
            return DynaBertModel.from_pretrained(path, add_pooling_layer=False, **options)
        spec = self._spec
        if not fresh_head:
            _check_labels(path, spec)
        if spec.problem == "regression":
            options.update(num_labels=1, problem_type="regression")
        elif spec.label_names:
            labels = dict(enumerate(spec.label_names))
            options.update(id2label=labels, label2id={v: k for k, v in labels.items()})
        if spec.problem == "classification":
            options["problem_type"] = "single_label_classification"
        loaded: Any = MODEL_CLASSES[spec.problem].from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=fresh_head, **options
        )
        model, info = loaded
        if info["missing_keys"] and not fresh_head:
            raise ValueError(
                f"run_stages: model={path!r} has no {', '.join(sorted(info['missing_keys']))}, "
                f"expected a model fine-tuned on {spec.name}. Begin with the teacher stage."
            )
        assert isinstance(model, DynaBertPreTrainedModel)
        return model

    def evaluate(
        self,
        model: nn.Module,
        subnets: Sequence[SubnetConfig],
        autocast_dtype: torch.dtype | None = None,
    ) -> list[GridRow]:
        """Score subnets on the validation rows; a model without labels by how near it is to the one
        the run starts from."""
        options: dict[str, Any] = {
            "batch_size": self._run.eval_batch_size,
            "autocast_dtype": autocast_dtype,
            "progress": self._run.progress,
        }
        if self.has_labels:
            return evaluate_grid(
                model, self.validation_rows, self.collator, self._spec, subnets, **options
            )
        return evaluate_fidelity(
            model,
            self._target,
            self.validation_rows,
            self.collator,
            subnets,
            pooling=self._run.pooling,
            **options,
        )

    @cached_property
    def _target(self) -> Tensor:
        """The validation rows as the model the run starts from embeds them."""
        (target,) = embed(
            self.load(self._model_path),
            self.validation_rows,
            self.collator,
            [FULL],
            pooling=self._run.pooling,
            batch_size=self._run.eval_batch_size,
            progress=self._run.progress,
        )
        return target


def _check_labels(path: str, spec: TaskSpec) -> None:
    """Refuse a fine-tuned model whose head is not for the labels of this task.

    Raises:
        ValueError: It has another number of labels, or the same ones in another order.
    """
    config: Any = DynaBertConfig.from_pretrained(path)
    known = [config.id2label[index] for index in range(config.num_labels)]
    names = spec.label_names
    if len(known) != spec.num_labels:
        raise ValueError(
            f"run_stages: model={path!r} has {len(known)} labels, expected {spec.num_labels} as "
            f"{spec.name}. Begin with the teacher stage."
        )
    if set(known) == set(names) and known != list(names):
        raise ValueError(
            f"run_stages: model={path!r} has the labels {', '.join(known)}, expected "
            f"{', '.join(names)}, in this order. Begin with the teacher stage, or load the task "
            "with the model's labels."
        )
