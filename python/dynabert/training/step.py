"""One batch of a training step: the losses of several subnets from one forward pass.

Stands above the losses and the plan of subnets, below `trainer`, which runs the backward passes and
knows how many processes and batches make an optimiser step.

Letters: B sequences, S padded length, T tokens that run, C hidden size, n subnets.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from dynabert.configuration_dynabert import DynaBertConfig
from dynabert.data.collators import LABEL_NAMES
from dynabert.data.examples import Problem
from dynabert.modeling_dynabert import DynaBertModel
from dynabert.modeling_pretrained import DynaBertPreTrainedModel
from dynabert.subnet import ForEach, SubnetConfig, SubnetShape
from dynabert.training.arguments import Pooling, Stage
from dynabert.training.losses import embedding_loss, hidden_state_loss, prediction_loss
from dynabert.training.subnet_plan import PlannedSubnet
from dynabert.training.task_agnostic import pool

Inputs = Mapping[str, Any]
_PREDICTIONS = ("logits", "start_logits", "end_logits")


@dataclass(frozen=True)
class Share:
    """What a batch weighs among all batches (and processes) of an optimiser step; 1 if it is
    alone."""

    sequences: Tensor | float = 1.0
    tokens: Tensor | float = 1.0
    labels: Tensor | float = 1.0


@dataclass(frozen=True)
class Lesson:
    """What one teacher says about a batch.

    Attributes:
        predictions: Its logits by name, or its pooled output; one row per sequence.
        states: Embeddings and the state after each layer, ``[T, C]``; None if nobody learns them.
    """

    predictions: dict[str, Tensor]
    states: tuple[Tensor, ...] | None


class Batch:
    """One batch on the device, with what every subnet needs of it.

    Args:
        inputs: As the collator made it.
        share: Its weight.
        with_padding: Let padding run through the network like any token.
    """

    def __init__(self, inputs: Inputs, share: Share, *, with_padding: bool = False) -> None:
        self.inputs = dict(inputs)
        self.mask: Tensor = inputs["attention_mask"]
        self.share = share
        self.num_tokens: Tensor | int = self.mask.sum()
        if with_padding:
            # Which keys each token sees; a mask over pairs of tokens keeps padding in the network.
            self.inputs["attention_mask"] = self.mask[:, None, None, :] != 0
            self.num_tokens = self.mask.numel()
        self.unlabelled = {k: v for k, v in self.inputs.items() if k not in LABEL_NAMES}


class StepLosses:
    """The losses of a stage.

    Args:
        stage: Weights and kind of the losses.
        problem: What is predicted.
        pooling: How `problem` ``none`` pools hidden states.
    """

    def __init__(self, stage: Stage, problem: Problem, pooling: Pooling) -> None:
        self._stage = stage
        self._problem = problem
        self._pooling = pooling
        self._logit_weight = stage.logit_weight
        if problem == "regression" and not stage.regression_logits:
            self._logit_weight = 0.0
        self._states: Any = "packed" if stage.hidden_weight > 0 else False

    @contextmanager
    def _padding(self) -> Iterator[None]:
        """Without the model's warning that padding runs, which the stage asks for, and FSDP2's of
        writing into what a model returns, which nobody does here."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
            if self._stage.hidden_padding:
                warnings.filterwarnings("ignore", ".*a mask over pairs of tokens")
            yield

    @torch.no_grad()
    def lessons(
        self, teacher: nn.Module, batch: Batch, subnets: Iterable[SubnetConfig]
    ) -> dict[SubnetConfig, Lesson]:
        """What each of `subnets` of the teacher says, from one forward pass."""
        each = tuple(dict.fromkeys(subnets))
        with self._padding():
            output = teacher(
                **batch.unlabelled, subnet=ForEach(each), output_hidden_states=self._states
            )
        states = output.hidden_states or (None,) * len(each)
        predictions = self._predictions(output, batch, len(each))
        return {
            subnet: Lesson(predicted, own)
            for subnet, predicted, own in zip(each, predictions, states, strict=True)
        }

    def __call__(
        self,
        model: nn.Module,
        batch: Batch,
        group: Sequence[PlannedSubnet],
        lessons: Mapping[SubnetConfig, Lesson],
    ) -> Tensor:
        """The weighed loss of each subnet of `group`, ``[n]`` float32, from one forward pass."""
        each = ForEach(tuple(item.subnet for item in group))
        if self._stage.teacher is None:
            with self._padding():
                losses: Tensor = model(**batch.inputs, subnet=each).loss
            return losses.float() * batch.share.labels
        with self._padding():
            output = model(**batch.unlabelled, subnet=each, output_hidden_states=self._states)
        predictions = self._predictions(output, batch, len(group))
        losses_of = []
        for number, item in enumerate(group):
            assert item.teacher is not None
            lesson = lessons[item.teacher]
            loss = torch.zeros((), device=batch.mask.device)
            if self._logit_weight > 0:
                loss = loss + self._logit_weight * self._prediction_loss(
                    predictions[number], lesson.predictions, batch
                )
            if lesson.states is not None:
                hidden = hidden_state_loss(
                    output.hidden_states[number],
                    lesson.states,
                    item.shape.hidden_targets,
                    batch.num_tokens,
                )
                loss = loss + self._stage.hidden_weight * batch.share.tokens * hidden
            losses_of.append(loss)
        return torch.stack(losses_of)

    def untaught(
        self, model: DynaBertPreTrainedModel, planned: Sequence[PlannedSubnet]
    ) -> list[str]:
        """Names of the parameters that no loss of `planned` reaches: of layers that none of them
        keeps, and of a head whose predictions are not learned."""
        base = cast(DynaBertModel, model.base_model)
        kept = {layer.index for item in planned for layer in item.shape.layers}
        layers = [layer for index, layer in enumerate(base.encoder.layer) if index not in kept]
        skipped = {parameter for layer in layers for parameter in layer.parameters()}
        if self._problem == "none" or (self._stage.teacher and self._logit_weight == 0):
            skipped |= {*model.parameters()} - {
                *base.embeddings.parameters(),
                *base.encoder.parameters(),
            }
        return [name for name, parameter in model.named_parameters() if parameter in skipped]

    def _predictions(self, output: Any, batch: Batch, count: int) -> list[dict[str, Tensor]]:
        """Logits or pooled output of each of `count` subnets."""
        if self._problem == "none":
            states = output.last_hidden_state.chunk(count)
            return [{"pooled": pool(state, batch.mask, self._pooling)} for state in states]
        found = {name: output[name].chunk(count) for name in _PREDICTIONS if name in output}
        return [{name: parts[k] for name, parts in found.items()} for k in range(count)]

    def _prediction_loss(
        self, student: dict[str, Tensor], teacher: dict[str, Tensor], batch: Batch
    ) -> Tensor:
        if self._problem == "none":
            loss = embedding_loss(student["pooled"], teacher["pooled"])
            return loss * batch.share.sequences
        loss = prediction_loss(student, teacher, self._problem, batch.mask)
        by_token = self._problem == "token-classification"
        return loss * (batch.share.tokens if by_token else batch.share.sequences)


def micro_groups(
    planned: Sequence[PlannedSubnet], bytes_of: Sequence[int], budget: int
) -> list[list[PlannedSubnet]]:
    """Cut the subnets of a step into groups whose activations fit a budget, in their order.

    The last group is filled first, so it holds the full network. A subnet above the budget runs
    alone.

    Args:
        planned: The subnets, the full network last.
        bytes_of: Activations of each, in bytes.
        budget: Bytes for the activations of a group.
    """
    groups: list[list[PlannedSubnet]] = [[]]
    filled = 0
    for item, size in zip(reversed(planned), reversed(bytes_of), strict=True):
        if groups[-1] and filled + size > budget:
            groups.append([])
            filled = 0
        groups[-1].append(item)
        filled += size
    return [group[::-1] for group in reversed(groups)]


def activation_bytes(
    shape: SubnetShape, config: DynaBertConfig, num_tokens: int, seq_len: int, itemsize: int
) -> int:
    """What a training pass of a subnet keeps for its backward pass, in bytes, estimated.

    Args:
        shape: The subnet.
        config: The network.
        num_tokens: Tokens of the batch that run.
        seq_len: Padded length; attention keeps its scores.
        itemsize: Bytes of a number in the matrix products, 2 under bfloat16 autocast.
    """
    hidden = config.hidden_size
    per_token = 0
    for layer in shape.layers:
        inner = layer.num_heads * config.head_dim
        per_token += 2 * hidden * (3 * itemsize + 3 * 4)  # both residual additions and LayerNorms
        per_token += inner * 8 * itemsize + 3 * layer.num_heads * seq_len * itemsize
        per_token += 2 * layer.intermediate_size * itemsize
    return per_token * num_tokens
