"""Task heads on the DynaBERT encoder, shared by every subnet (DynaBERT, section 3.1).

Each follows Hugging Face's head of the same name, BERT's or RoBERTa's as the configuration says,
and takes ``subnet`` like `DynaBertModel`. Losses are means, as Hugging Face's are.

Letters: B sequences, S padded length, C hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import (
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from dynabert.configuration_dynabert import ACTIVATIONS, DynaBertConfig
from dynabert.modeling_dynabert import DynaBertModel, States, Subnets
from dynabert.modeling_inputs import first_token, repeated_rows
from dynabert.modeling_pretrained import DynaBertPreTrainedModel
from dynabert.subnet import ForEach
from dynabert_kernels.varlen import sent


class DynaBertForSequenceClassification(DynaBertPreTrainedModel):
    """One label, several labels or a number for each text (or pair of texts)."""

    def __init__(self, config: DynaBertConfig) -> None:
        super().__init__(config)
        is_roberta = config.architecture == "roberta"
        self.num_labels = config.num_labels
        self.dynabert = DynaBertModel(config, add_pooling_layer=not is_roberta)
        self.dropout = nn.Dropout(_classifier_dropout(config))
        self.classifier = (
            RobertaClassifier(config)
            if is_roberta
            else nn.Linear(config.hidden_size, _num_labels(config))
        )
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        subnet: Subnets = None,
        output_hidden_states: States = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Classify a padded batch; arguments as for `DynaBertModel.forward`, and below.

        Args:
            input_ids: See `DynaBertModel.forward`, likewise all that are not listed.
            attention_mask: See `DynaBertModel.forward`.
            token_type_ids: See `DynaBertModel.forward`.
            position_ids: See `DynaBertModel.forward`.
            inputs_embeds: See `DynaBertModel.forward`.
            labels: ``[B]`` integer for one of several labels; ``[B, num_labels]`` floating-point
                for several at once; ``[B]`` floating-point for regression, which is what
                ``num_labels=1`` means.
            subnet: See `DynaBertModel.forward`.
            output_hidden_states: See `DynaBertModel.forward`.
            return_dict: See `DynaBertModel.forward`.
            **kwargs: See `DynaBertModel.forward`.

        Returns:
            ``loss`` if `labels` are given, ``logits`` ``[B, num_labels]``, ``hidden_states`` if
            asked for. With `ForEach` of n subnets, ``loss`` ``[n]`` and ``logits`` ``[n * B,
            num_labels]``; likewise for the other heads.
        """
        encoded = self.dynabert(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            subnet=subnet,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        summary = encoded.pooler_output
        if summary is None:
            mask = repeated_rows(attention_mask, subnet)
            summary = first_token(encoded.last_hidden_state, mask)
        logits = self.classifier(self.dropout(summary))
        loss = None
        if labels is not None:
            problem_type = self.config.problem_type
            loss = loss_of(subnet, lambda row: sequence_loss(row, labels, problem_type), logits)
        output = SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=encoded.hidden_states
        )
        return output if self.wants_dict(return_dict) else output.to_tuple()


class DynaBertForTokenClassification(DynaBertPreTrainedModel):
    """One label for each token."""

    def __init__(self, config: DynaBertConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.dynabert = DynaBertModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(_classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, _num_labels(config))
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        subnet: Subnets = None,
        output_hidden_states: States = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput | tuple[Any, ...]:
        """Label every token; arguments as for `DynaBertModel.forward`.

        `labels` are ``[B, S]`` integer, -100 where a token does not count. Returns ``loss`` if they
        are given, ``logits`` ``[B, S, num_labels]``, and ``hidden_states`` if asked for.
        """
        encoded = self.dynabert(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            subnet=subnet,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        logits = self.classifier(self.dropout(encoded.last_hidden_state))
        loss = None
        if labels is not None:
            loss = loss_of(subnet, lambda row: token_loss(row, labels), logits)
        output = TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=encoded.hidden_states
        )
        return output if self.wants_dict(return_dict) else output.to_tuple()


class DynaBertForQuestionAnswering(DynaBertPreTrainedModel):
    """Where in a text the answer to a question starts and ends."""

    def __init__(self, config: DynaBertConfig) -> None:
        super().__init__(config)
        self.dynabert = DynaBertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        subnet: Subnets = None,
        output_hidden_states: States = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput | tuple[Any, ...]:
        """Score every token as start and as end; arguments as for `DynaBertModel.forward`.

        `start_positions` and `end_positions` are ``[B]`` integer; one at or beyond S (an answer
        that was cut off) does not count. Returns ``loss`` if both are given, ``start_logits`` and
        ``end_logits`` ``[B, S]``, and ``hidden_states`` if asked for. Padding gets the lowest score
        there is, so it is never an answer and does not enter the loss.
        """
        encoded = self.dynabert(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            subnet=subnet,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        logits = self.qa_outputs(encoded.last_hidden_state)
        mask = repeated_rows(attention_mask, subnet)
        if mask is not None and mask.dim() == 2:
            padding = sent(mask == 0, logits.device).unsqueeze(-1)
            logits = logits.masked_fill(padding, torch.finfo(logits.dtype).min)
        start_logits, end_logits = logits.unbind(dim=-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = (
                loss_of(subnet, lambda row: position_loss(row, start_positions), start_logits)
                + loss_of(subnet, lambda row: position_loss(row, end_positions), end_logits)
            ) / 2
        output = QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits.contiguous(),
            end_logits=end_logits.contiguous(),
            hidden_states=encoded.hidden_states,
        )
        return output if self.wants_dict(return_dict) else output.to_tuple()


class DynaBertForMaskedLM(DynaBertPreTrainedModel):
    """The word behind each masked token."""

    _tied_weights_keys = {  # noqa: RUF012
        "lm_head.decoder.weight": "dynabert.embeddings.word_embeddings.weight"
    }

    def __init__(self, config: DynaBertConfig) -> None:
        super().__init__(config)
        self.dynabert = DynaBertModel(config, add_pooling_layer=False)
        self.lm_head = DynaBertLMHead(config)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_output_embeddings(self) -> nn.Linear:
        """The decoder, whose weight is that of the word embeddings."""
        return cast(nn.Linear, self.lm_head.decoder)

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the decoder."""
        self.lm_head.decoder = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        subnet: Subnets = None,
        output_hidden_states: States = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput | tuple[Any, ...]:
        """Score the vocabulary at every token; arguments as for `DynaBertModel.forward`.

        `labels` are ``[B, S]`` integer, -100 where a token is not to be predicted. Returns ``loss``
        if they are given, ``logits`` ``[B, S, vocab_size]``, and ``hidden_states`` if asked for.
        """
        encoded = self.dynabert(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            subnet=subnet,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(encoded.last_hidden_state)
        loss = None
        if labels is not None:
            loss = loss_of(subnet, lambda row: token_loss(row, labels), logits)
        output = MaskedLMOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states)
        return output if self.wants_dict(return_dict) else output.to_tuple()


class RobertaClassifier(nn.Module):
    """RoBERTa's classification head: dense, tanh, projection."""

    def __init__(self, config: DynaBertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(_classifier_dropout(config))
        self.out_proj = nn.Linear(config.hidden_size, _num_labels(config))

    def forward(self, first: Tensor) -> Tensor:
        """``[B, C]`` to ``[B, num_labels]``."""
        logits: Tensor = self.out_proj(self.dropout(torch.tanh(self.dense(first))))
        return logits


class DynaBertLMHead(nn.Module):
    """Masked-language-modelling head; its decoder is tied to the word embeddings."""

    def __init__(self, config: DynaBertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        # RoBERTa's head uses the exact gelu whatever the encoder does.
        self.activation = (
            "gelu" if config.architecture == "roberta" else ACTIVATIONS[config.hidden_act]
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """``[B, S, C]`` to ``[B, S, vocab_size]``."""
        hidden = self.dense(hidden)
        if self.activation == "relu":
            hidden = F.relu(hidden)
        else:
            hidden = F.gelu(
                hidden, approximate="tanh" if self.activation == "gelu_tanh" else "none"
            )
        logits: Tensor = self.decoder(self.norm(hidden))
        return logits


def loss_of(subnet: Subnets, loss: Callable[[Tensor], Tensor], predictions: Tensor) -> Tensor:
    """The loss of a batch's predictions, a scalar; with `ForEach` one for each subnet, ``[n]``."""
    if not isinstance(subnet, ForEach):
        return loss(predictions)
    count = len(subnet.subnets)
    by_subnet = predictions.unflatten(0, (count, predictions.shape[0] // count))
    return torch.stack([loss(part) for part in by_subnet.unbind()])


def sequence_loss(logits: Tensor, labels: Tensor, problem_type: str | None) -> Tensor:
    """Loss of a sequence classifier, by Hugging Face's rules.

    Args:
        logits: ``[B, num_labels]``.
        labels: See `DynaBertForSequenceClassification.forward`.
        problem_type: ``"regression"``, ``"single_label_classification"`` or
            ``"multi_label_classification"``; None decides by the number of labels and the dtype of
            `labels`.

    Raises:
        ValueError: `labels` do not have the shape the problem needs.
    """
    num_labels = logits.shape[-1]
    if problem_type is None:
        if num_labels == 1:
            problem_type = "regression"
        else:
            is_index = labels.dtype in (torch.long, torch.int)
            problem_type = (
                "single_label_classification" if is_index else "multi_label_classification"
            )
    if problem_type == "single_label_classification":
        return F.cross_entropy(logits, labels.reshape(-1).long())
    if labels.numel() != logits.numel():
        raise ValueError(
            f"DynaBertForSequenceClassification: labels.shape={list(labels.shape)}, expected "
            f"{list(logits.shape)} "
            f"for {problem_type.replace('_', ' ')}."
        )
    targets = labels.reshape(logits.shape).to(logits.dtype)
    if problem_type == "regression":
        return F.mse_loss(logits, targets)
    return F.binary_cross_entropy_with_logits(logits, targets)


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy, ``[..., classes]`` against ``[...]``; label -100 does not count."""
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1).long())


def position_loss(logits: Tensor, positions: Tensor) -> Tensor:
    """Mean cross entropy of ``[B, S]`` against ``[B]``; a position beyond S does not count."""
    seq_len = logits.shape[1]
    return F.cross_entropy(logits, positions.reshape(-1).clamp(0, seq_len), ignore_index=seq_len)


def _classifier_dropout(config: DynaBertConfig) -> float:
    return (
        config.hidden_dropout_prob
        if config.classifier_dropout is None
        else config.classifier_dropout
    )


def _num_labels(config: DynaBertConfig) -> int:
    assert config.num_labels is not None  # the base class derives it from id2label
    return config.num_labels
