"""From questions to windows of their contexts, and from predicted positions back to answers."""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dynabert.data.collators import EncodedDataset, require_offsets
from dynabert.data.examples import Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)
# Bounds the tokeniser's own objects, which take about 100 bytes a token as long as they live.
_CHUNK_QUESTIONS = 1_000


class Window(NamedTuple):
    """What a row shows of a question's context.

    Attributes:
        question: Index of the question.
        first: First token of the context in the row.
        spans: First character and end of each of its tokens in the context, ``[N, 2]`` int32.
        start: Token the answer begins with; 0, the first token of the row, if it is not in it.
        end: Token the answer ends with, or 0.
    """

    question: int
    first: int
    spans: npt.NDArray[np.int32]
    start: int
    end: int


class Span(NamedTuple):
    """An answer a model proposes for one row: its score, and its first and last token."""

    score: float
    start: int
    end: int


class QuestionRows(EncodedDataset):
    """Tokenised questions, each with its context in one row or, where it is long, in several.

    A row also has ``start_positions`` and ``end_positions``, ints, and ``context``, the first token
    of its context and the one after the last.

    Attributes:
        questions: The questions.
    """

    def __init__(
        self,
        columns: Mapping[str, Sequence[Sequence[int]]],
        questions: Sequence[Question],
        windows: Sequence[Window],
    ) -> None:
        """Hold token lists by column name, and the window of each row."""
        super().__init__(columns, None)
        self.questions = questions
        self._windows = windows

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = super().__getitem__(index)
        window = self._windows[index]
        row["start_positions"] = window.start
        row["end_positions"] = window.end
        row["context"] = (window.first, window.first + len(window.spans))
        return row

    def predicted_answers(self, predicted: Sequence[Span]) -> list[str]:
        """The answer to each question: the best of those proposed for its rows.

        Args:
            predicted: One for each row, in the row's context.
        """
        best: dict[int, tuple[float, str]] = {}
        for window, span in zip(self._windows, predicted, strict=True):
            if window.question not in best or span.score > best[window.question][0]:
                start = window.spans[span.start - window.first][0]
                end = window.spans[span.end - window.first][1]
                text = self.questions[window.question].context[start:end]
                best[window.question] = (span.score, text.strip())
        return [best[index][1] for index in range(len(self.questions))]

    def right_answers(self) -> list[list[str]]:
        """What may stand in the place of each of `predicted_answers`."""
        return [[answer.text for answer in item.answers] for item in self.questions]


def encode_questions(
    questions: Sequence[Question],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    *,
    doc_stride: int = 128,
    max_query_length: int = 64,
) -> QuestionRows:
    """Tokenise questions, each before its context; a longer context is read in windows.

    In rows too short for them, a question has at most half of the row, and windows share at most
    half of what the longest question leaves.

    Args:
        questions: What to tokenise; the first answer is the one to learn.
        tokenizer: A tokeniser that knows where in a text its tokens are from.
        max_length: Longest row in tokens, special tokens included.
        doc_stride: Tokens that two windows after each other share.
        max_query_length: Longest question in tokens; what is longer is cut, and a log line counts
            it.

    Raises:
        ValueError: No questions, `max_length` leaves no room for text, or the tokeniser does not
            know where its tokens are from.
    """
    require_offsets("encode_questions", tokenizer)
    room = max_length - tokenizer.num_special_tokens_to_add(pair=True)
    if room < 2:
        raise ValueError(
            f"encode_questions: max_length={max_length}, expected at least {max_length - room + 2}."
            " Leave room for question and context beside the special tokens."
        )
    if not questions:
        raise ValueError(
            "encode_questions: questions=[], expected at least one. Check the task's files."
        )
    max_query_length = min(max_query_length, room // 2)
    overlap = min(doc_stride, (room - max_query_length) // 2)
    columns: dict[str, list[list[int]]] = {}
    windows: list[Window] = []
    num_cut = 0
    for first in range(0, len(questions), _CHUNK_QUESTIONS):
        chunk = questions[first : first + _CHUNK_QUESTIONS]
        texts = _shortened([item.question for item in chunk], tokenizer, max_query_length)
        pairs = zip(texts, chunk, strict=True)
        num_cut += sum(len(text) < len(item.question) for text, item in pairs)
        encoded: Any = tokenizer(
            texts,
            [item.context for item in chunk],
            truncation="only_second",
            max_length=max_length,
            stride=overlap,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_attention_mask=False,
        )
        origins = encoded.pop("overflow_to_sample_mapping")
        for row, spans in enumerate(encoded.pop("offset_mapping")):
            index = first + origins[row]
            windows.append(_window(index, questions[index], encoded.sequence_ids(row), spans))
        for name, rows in encoded.items():
            columns.setdefault(name, []).extend(rows)
    if num_cut:
        _log.warning(
            "%d of %d questions were longer than %d tokens and were cut",
            num_cut,
            len(questions),
            max_query_length,
        )
    return QuestionRows(columns, questions, windows)


def _shortened(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", max_tokens: int
) -> list[str]:
    """Texts without what comes after their first `max_tokens` tokens."""
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    return [
        text[: spans[max_tokens - 1][1]] if len(spans) > max_tokens else text
        for text, spans in zip(texts, encoded["offset_mapping"], strict=True)
    ]


def _window(
    index: int,
    question: Question,
    sequence_ids: Sequence[int | None],
    spans: Sequence[tuple[int, int]],
) -> Window:
    """What one row shows: `sequence_ids` is 1 at the tokens of the context, `spans` has the
    characters of every token."""
    in_context = [position for position, part in enumerate(sequence_ids) if part == 1]
    if not in_context:
        raise ValueError(
            f"encode_questions: question {question.id}: its context makes no tokens, expected some."
            " Remove the question."
        )
    first = in_context[0]
    shown = np.array(spans[first : in_context[-1] + 1], dtype=np.int32)
    text, begin = question.answers[0]
    end = begin + len(text)
    if begin < shown[0, 0] or shown[-1, 1] < end:
        return Window(index, first, shown, 0, 0)
    start_token = int(np.searchsorted(shown[:, 0], begin, side="right")) - 1
    end_token = int(np.searchsorted(shown[:, 1], end))
    return Window(index, first, shown, first + start_token, first + end_token)


def best_spans(
    start_logits: Tensor, end_logits: Tensor, is_context: Tensor, max_answer_length: int = 30
) -> list[Span]:
    """The best answer within the context of each row: the highest sum of a start's and an end's
    logit.

    Every span is looked at, so there is no shortlist of starts and ends to choose.

    Args:
        start_logits: ``[B, S]``.
        end_logits: ``[B, S]``.
        is_context: ``[B, S]``, true at the tokens of the context, at least one in each row.
        max_answer_length: Longest answer in tokens.

    Returns:
        One for each row, with the columns of the batch as tokens.
    """
    lowest = -torch.inf
    starts = start_logits.float().masked_fill(~is_context, lowest)
    ends = end_logits.float().masked_fill(~is_context, lowest)
    # Ends 0 to max_answer_length - 1 tokens behind each start: [B, S, max_answer_length].
    reach = torch.nn.functional.pad(ends, (0, max_answer_length - 1), value=lowest)
    best_ends, behind = reach.unfold(1, max_answer_length, 1).max(dim=-1)
    scores, start = (starts + best_ends).max(dim=-1)
    end = start + behind.gather(1, start[:, None]).squeeze(1)
    return [Span(*span) for span in zip(scores.tolist(), start.tolist(), end.tolist(), strict=True)]
