"""SQuAD v1.1: the official files, or own ones of the same form, and the official scores."""

import json
import logging
import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dynabert.data.examples import Answer, Question, TaskSpec
from dynabert.data.files import read_text, row_error

_log = logging.getLogger(__name__)
_METRICS = ("f1", "exact_match")
_FILES = {"train": "train-v1.1.json", "validation": "dev-v1.1.json"}
_FOLDER = "SQuAD"
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def question_spec(name: str) -> TaskSpec:
    """The task as the rest of the library sees it, under the name it is chosen by."""
    return TaskSpec(name, "question-answering", ("question", "context"), (), _METRICS, _METRICS[0])


def squad_files(data_dir: Path) -> dict[str, Path]:
    """The official files by split, in ``data_dir/SQuAD`` or in `data_dir` itself.

    Raises:
        FileNotFoundError: Neither folder holds the validation file.
    """
    for folder in (data_dir / _FOLDER, data_dir):
        if (folder / _FILES["validation"]).is_file():
            return {split: folder / name for split, name in _FILES.items()}
    raise FileNotFoundError(
        f"load_task: data_dir={data_dir}, expected {_FILES['validation']} in it. "
        "Give the folder of SQuAD's official files."
    )


def read_squad_file(path: Path) -> list[Question]:
    """All questions of one file of SQuAD v1.1's form, checked.

    Blanks around an answer are left out. An answer that does not stand at its ``answer_start``, as
    where offsets were counted in bytes, is taken from where the context has it, provided that it
    has it once; a warning counts them.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Not UTF-8, not of that form, or an answer that is not in its context; names the
            file, and the line, the place or the question.
    """
    text = read_text(path)
    try:
        document = json.loads(text)
    except ValueError as error:
        line = getattr(error, "lineno", 1)
        raise row_error(path, line, f"not valid JSON ({error})", "Check the file.") from None
    questions = list(_Reader(path).questions(document))
    if not questions:
        raise ValueError(
            f"read_squad_file: {path} holds no questions, expected at least one. Check the file."
        )
    return questions


class _Reader:
    """Walks through one document; `place` is where it is, for the message of an error."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._place = "document"
        self._num_moved = 0

    def questions(self, document: Any) -> Iterator[Question]:
        for number, article in enumerate(self._get(document, "data", list)):
            self._place = f"data[{number}]"
            for index, paragraph in enumerate(self._get(article, "paragraphs", list)):
                self._place = f"data[{number}].paragraphs[{index}]"
                context = self._get(paragraph, "context", str)
                if not context.strip():
                    raise self._error(f"context={context!r}, expected text")
                for entry in self._get(paragraph, "qas", list):
                    yield self._question(entry, context)
                    self._place = f"data[{number}].paragraphs[{index}]"
        if self._num_moved:
            _log.warning(
                "%s: %d answers did not stand at their answer_start and were found elsewhere in "
                "the context",
                self._path,
                self._num_moved,
            )

    def _question(self, entry: Any, context: str) -> Question:
        name = self._get(entry, "id", str)
        self._place = f"question {name}"
        question = self._get(entry, "question", str)
        found = [self._answer(answer, context) for answer in self._get(entry, "answers", list)]
        if not found:
            raise self._error("no answers, expected at least one. SQuAD v2 is not supported")
        return Question(name, question.strip(), context, tuple(found))

    def _answer(self, answer: Any, context: str) -> Answer:
        raw, start = self._get(answer, "text", str), self._get(answer, "answer_start", int)
        text = raw.strip()
        if not text:
            raise self._error(f"an answer {raw!r}, expected text")
        start += raw.index(text)
        if context[max(start, 0) : start + len(text)] != text:
            if context.count(text) != 1:
                raise self._error(
                    f"answer {text!r} is not at answer_start={start} of its context, which has it "
                    f"{context.count(text)} times, expected once"
                )
            start = context.index(text)
            self._num_moved += 1
        return Answer(text, start)

    def _get(self, mapping: Any, key: str, kind: type) -> Any:
        value = mapping.get(key) if isinstance(mapping, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            names = {list: "a list", str: "text", int: "a whole number"}
            shown = repr(value) if len(repr(value)) < 40 else f"a {type(value).__name__}"
            raise self._error(f"{key}={shown}, expected {names[kind]}")
        return value

    def _error(self, problem: str) -> ValueError:
        return ValueError(
            f"read_squad_file: {self._path} {self._place}: {problem}. "
            "See SQuAD v1.1 for the form of a file."
        )


def answer_scores(predicted: Sequence[str], truth: Sequence[Sequence[str]]) -> dict[str, float]:
    """SQuAD's official scores: means over the questions of the best match among the answers.

    Args:
        predicted: The answer to each question.
        truth: The right answers to each, at least one.

    Returns:
        ``f1`` over the words of an answer, and ``exact_match``, as fractions.
    """
    f1 = exact = 0.0
    for guess, answers in zip(predicted, truth, strict=True):
        words = _normal_words(guess)
        rights = [_normal_words(answer) for answer in answers]
        f1 += max(_word_f1(words, right) for right in rights)
        exact += words in rights
    return {"f1": f1 / len(predicted), "exact_match": exact / len(predicted)}


def _normal_words(text: str) -> list[str]:
    """Words in lower case, without punctuation and articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _word_f1(words: Sequence[str], right: Sequence[str]) -> float:
    num_same = sum((Counter(words) & Counter(right)).values())
    return 2 * num_same / (len(words) + len(right)) if num_same else 0.0
