"""Questions and contexts as rows of tokens, and answers out of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from dynabert.data import question_rows
from dynabert.data.collators import DynamicPadCollator
from dynabert.data.examples import Answer, Question
from dynabert.data.question_rows import QuestionRows, Span, best_spans, encode_questions

CONTEXT = "the film was good , very long . a plane is  taking off"


def ask(answer: str, question: str = "was a film good", context: str = CONTEXT) -> Question:
    return Question("q", question, context, (Answer(answer, context.index(answer)),))


def gold_spans(rows: QuestionRows) -> Iterator[tuple[dict[str, object], Span]]:
    """Each row with the span of its labels: sure of itself where the row shows the answer."""
    for index in range(len(rows)):
        row = rows[index]
        start, end = row["start_positions"], row["end_positions"]
        first = row["context"][0]
        yield row, Span(1.0, start, end) if start else Span(0.0, first, first)


@pytest.mark.parametrize(
    "answer", ["the", "good", "long . a", "is  taking", "off", "film was good"]
)
@pytest.mark.parametrize("max_length", [18, 21, 64])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_labels_give_the_answer_back(
    kind: str,
    max_length: int,
    answer: str,
    tokenizer: PreTrainedTokenizerBase,
    byte_level_tokenizer: PreTrainedTokenizerBase,
) -> None:
    chosen = tokenizer if kind == "bert" else byte_level_tokenizer
    max_length *= 1 if kind == "bert" else 4  # a token for nearly each letter
    rows = encode_questions([ask("good"), ask(answer)], chosen, max_length)
    assert max(rows.lengths) <= max_length
    found = list(gold_spans(rows))
    assert any(span.score for _, span in found)
    assert rows.predicted_answers([span for _, span in found]) == ["good", answer]
    assert rows.right_answers() == [["good"], [answer]]
    for row, _ in found:
        assert (row["start_positions"] == 0) == (row["end_positions"] == 0)


def test_windows_share_tokens_and_show_the_whole_context(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    rows = encode_questions([ask("good")], tokenizer, 14, doc_stride=3)
    shown = []
    for index in range(len(rows)):
        begin, end = rows[index]["context"]
        shown.append(tokenizer.convert_ids_to_tokens(rows[index]["input_ids"][begin:end]))
        assert rows[index]["token_type_ids"][begin:end] == [1] * (end - begin)
    assert shown[0] == ["the", "film", "was", "good", ",", "very", "long"]
    assert shown[1][:3] == shown[0][-3:]
    words = [*shown[0], *(word for window in shown[1:] for word in window[3:])]
    assert words == CONTEXT.split()
    # Where a window does not show the answer, its labels are the first token.
    assert [rows[index]["start_positions"] for index in range(2)] == [9, 0]
    assert [rows[index]["end_positions"] for index in range(2)] == [9, 0]


def test_an_answer_across_the_end_of_a_window_is_in_the_next(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    rows = encode_questions([ask("very long .")], tokenizer, 14, doc_stride=3)
    labels = [(rows[i]["start_positions"], rows[i]["end_positions"]) for i in range(2)]
    assert labels == [(0, 0), (7, 9)]


def test_long_questions_are_cut(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    long = ask("good", question="was a film good , very long")
    with caplog.at_level(logging.WARNING):
        rows = encode_questions([long, ask("good")], tokenizer, 64, max_query_length=4)
    assert rows[0]["input_ids"] == rows[1]["input_ids"]
    assert "1 of 2 questions were longer than 4 tokens and were cut" in caplog.text
    # A short row keeps half of its room for the context.
    begin, end = encode_questions([long], tokenizer, 11)[0]["context"]
    assert (begin, end) == (6, 10)


def test_chunks_change_nothing(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = [ask("good"), ask("plane"), ask("off")]
    whole = encode_questions(questions, tokenizer, 14)
    monkeypatch.setattr(question_rows, "_CHUNK_QUESTIONS", 2)
    chunked = encode_questions(questions, tokenizer, 14)
    assert [chunked[i] for i in range(len(chunked))] == [whole[i] for i in range(len(whole))]
    spans = [span for _, span in gold_spans(chunked)]
    assert chunked.predicted_answers(spans) == ["good", "plane", "off"]


@pytest.mark.parametrize("side", ["right", "left"])
def test_positions_count_padding_on_the_left(tokenizer: PreTrainedTokenizerBase, side: str) -> None:
    tokenizer.padding_side = side
    rows = encode_questions([ask("good"), ask("good", context="good film")], tokenizer, 64)
    batch = DynamicPadCollator(tokenizer)([rows[0], rows[1]])
    for name in ("start_positions", "end_positions"):
        assert batch[name].dtype == torch.int64
        words = batch["input_ids"].gather(1, batch[name][:, None]).flatten().tolist()
        assert tokenizer.convert_ids_to_tokens(words) == ["good", "good"]
    assert set(batch) == {
        *("input_ids", "token_type_ids", "attention_mask", "start_positions", "end_positions"),
    }


@pytest.mark.parametrize("max_answer_length", [1, 3, 50])
def test_best_span_is_that_of_a_search_over_all(max_answer_length: int) -> None:
    generator = torch.Generator().manual_seed(5)
    start, end = torch.randn(2, 9, 13, generator=generator)
    is_context = torch.zeros(9, 13, dtype=torch.bool)
    is_context[:, 4:11] = True
    is_context[0, 5:] = False  # one token alone
    spans = best_spans(start, end, is_context, max_answer_length)
    for row, span in enumerate(spans):
        tokens = is_context[row].nonzero().flatten().tolist()
        scores = {
            (i, j): float(start[row, i] + end[row, j])
            for i in tokens
            for j in tokens
            if i <= j < i + max_answer_length
        }
        assert (span.start, span.end) == max(scores, key=scores.__getitem__)
        assert span.score == pytest.approx(max(scores.values()))


def test_best_window_wins(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = encode_questions([ask("good"), ask("plane")], tokenizer, 14, doc_stride=3)
    firsts = [rows[index]["context"][0] for index in range(len(rows))]
    assert len(rows) == 6
    scores = (1, 3, 2, -7, -5, -6)
    spans = [Span(score, i, i + 1) for score, i in zip(scores, firsts, strict=True)]
    assert rows.predicted_answers(spans) == [", very", ", very"]


def test_bad_input_is_refused(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"questions=\[\], expected at least one"):
        encode_questions([], tokenizer, 64)
    with pytest.raises(ValueError, match="max_length=4, expected at least 5"):
        encode_questions([ask("good")], tokenizer, 4)
    blank = Question("q7", "was good", "\u200b", (Answer("\u200b", 0),))
    with pytest.raises(ValueError, match="question q7: its context makes no tokens"):
        encode_questions([ask("good"), blank], tokenizer, 64)
    assert len(encode_questions([ask("good")], tokenizer, 5)) > 5
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(ValueError, match="tokenizer=BertTokenizer, expected a fast one"):
        encode_questions([ask("good")], tokenizer, 64)
