"""SQuAD's files and scores."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dynabert.data.examples import Answer, Question
from dynabert.data.squad import answer_scores, read_squad_file
from dynabert.data.tasks import load_task

CONTEXT = "The Norman dynasty had a major impact. It was in France."


def question(name: str = "q1", answer: Any = "France", start: Any = 49, **changes: Any) -> Any:
    answers = [{"text": answer, "answer_start": start}]
    return {"id": name, "question": "Where?", "answers": answers, **changes}


def document(*questions: Any, context: Any = CONTEXT) -> Any:
    return {"version": "1.1", "data": [{"paragraphs": [{"context": context, "qas": questions}]}]}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], Path]:
    """``write(document)``: the path of a file with it."""

    def write(document: Any) -> Path:
        path = tmp_path / "train.json"
        path.write_text(document if isinstance(document, str) else json.dumps(document))
        return path

    return write


def test_questions_with_all_their_answers(write: Callable[[Any], Path]) -> None:
    both = [{"text": "France", "answer_start": 49}, {"text": " in France", "answer_start": 45}]
    path = write(document(question("a", answers=both), question("b", question=" Who? ")))
    assert read_squad_file(path) == [
        Question("a", "Where?", CONTEXT, (Answer("France", 49), Answer("in France", 46))),
        Question("b", "Who?", CONTEXT, (Answer("France", 49),)),
    ]


def test_an_answer_elsewhere_is_found_if_it_is_there_once(
    write: Callable[[Any], Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        first, second = read_squad_file(write(document(question(start=-3), question(start=50))))
    assert first.answers == second.answers == (Answer("France", 49),)
    assert "2 answers did not stand at their answer_start" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            document(question(answer="Spain")),
            r"question q1: answer 'Spain' is not at answer_st",
        ),
        (
            document(question(answer="a", start=0)),
            r"question q1: answer 'a' .* has it 8 times",
        ),
        (document(question(answer="")), r"question q1: an answer '', expected text"),
        (document(question(answers=[])), r"question q1: no answers, expected at least one"),
        (
            document(question(start="49")),
            r"question q1: answer_start='49', expected a whole n",
        ),
        (document(question(answers=3)), r"question q1: answers=3, expected a list"),
        (document(question(question=None)), r"question q1: question=None, expected text"),
        (document({"question": "?"}), r"data\[0\]\.paragraphs\[0\]: id=None, expected text"),
        (document(question(), context=" "), r"data\[0\]\.paragraphs\[0\]: context=' ', expected"),
        (document(), r"train\.json holds no questions"),
        ({"data": [{"title": "x"}]}, r"data\[0\]: paragraphs=None, expected a list"),
        ([1, 2], r"document: data=None, expected a list"),
        ('{"data": [\n{"paragraphs": ]}', r"train\.json line 2: not valid JSON"),
        ("", r"train\.json line 1: not valid JSON"),
    ],
    ids=[
        "not-there",
        "often-there",
        "blank-answer",
        "no-answers",
        "start-is-text",
        "answers-no-list",
        "no-question",
        "no-id",
        "no-context",
        "no-questions",
        "no-paragraphs",
        "a-list",
        "cut-off",
        "empty",
    ],
)
def test_bad_document_names_the_place(
    write: Callable[[Any], Path], content: Any, message: str
) -> None:
    path = write(content)
    options: Any = {"train_file": path.name, "problem": "question-answering"}
    with pytest.raises(ValueError, match=message) as error:
        load_task("file", path.parent, **options)
    assert str(path) in str(error.value)


def test_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "dev-v1.1.json").write_bytes(b'{"data":\n "\xe9"}')
    with pytest.raises(ValueError, match=r"dev-v1\.1\.json line 2: byte 0xe9 at offset 11"):
        load_task("squad", tmp_path, with_train=False)


def test_squad_is_found_in_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "SQuAD"
    folder.mkdir()
    for name, id_ in (("train", "t"), ("dev", "d")):
        (folder / f"{name}-v1.1.json").write_text(json.dumps(document(question(id_))))
    data = load_task("squad", tmp_path)
    assert [item.id for item in data.train] == ["t"]  # type: ignore[union-attr]
    assert [item.id for item in data.validation] == ["d"]  # type: ignore[union-attr]
    assert (data.spec.problem, data.spec.num_labels) == ("question-answering", 2)
    assert (data.spec.metrics, data.spec.primary_metric) == (("f1", "exact_match"), "f1")
    assert load_task("squad", folder).validation == data.validation
    assert load_task("squad", folder, with_train=False).train == []


def test_squad_needs_its_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data_dir=None, expected the folder of SQuAD"):
        load_task("squad")
    with pytest.raises(FileNotFoundError, match=r"expected dev-v1\.1\.json in it"):
        load_task("squad", tmp_path)
    with pytest.raises(ValueError, match="expected none of them"):
        load_task("squad", tmp_path, problem="none")


def test_held_out_questions_are_about_other_contexts(tmp_path: Path) -> None:
    questions = [question(f"{number}", start=56) for number in range(3)]
    paragraphs = [{"context": f"Text {n} {CONTEXT}", "qas": questions} for n in range(10)]
    (tmp_path / "train.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    data = load_task("file", tmp_path, train_file="train.json", problem="question-answering")
    assert (len(data.train), len(data.validation)) == (27, 3)
    assert not {q.context for q in data.train} & {q.context for q in data.validation}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("predicted", "answers", "f1", "exact"),
    [
        ("The Norman dynasty!", ["norman dynasty"], 1, 1),
        ("a  Norman-dynasty", ["NormanDynasty"], 1, 1),
        ("in France", ["France"], 2 / 3, 0),
        ("in France", ["Spain", "in the France"], 1, 1),
        ("10 th century", ["the 10th century", "10 th"], 4 / 5, 0),
        ("France France Spain", ["France"], 1 / 2, 0),
        ("Spain", ["France"], 0, 0),
        ("", ["France"], 0, 0),
        ("the", ["an"], 0, 1),  # nothing is left of either, and the official script says so
        ("anthem", ["them"], 0, 0),
    ],
    ids=[
        "article-case-punctuation",
        "punctuation-joins",
        "part",
        "best-of-several",
        "best-f1",
        "repeated",
        "wrong",
        "empty",
        "only-articles",
        "no-article-in-a-word",
    ],
)
def test_official_scores(predicted: str, answers: list[str], f1: float, exact: float) -> None:
    assert answer_scores([predicted], [answers]) == pytest.approx({"f1": f1, "exact_match": exact})


def test_scores_are_means_over_questions() -> None:
    scores = answer_scores(["France", "in Spain"], [["France"], ["Spain"]])
    assert scores == pytest.approx({"f1": 5 / 6, "exact_match": 1 / 2})


def test_official_file(shared_data: Path) -> None:
    data = load_task("squad", shared_data, with_train=False)
    assert len(data.validation) == 10_570
    questions = [item for item in data.validation if isinstance(item, Question)]
    for item in questions:
        for text, start in item.answers:
            assert item.context[start : start + len(text)] == text
    texts = [[answer.text for answer in item.answers] for item in questions]
    scores = answer_scores([answers[-1] for answers in texts], texts)
    # One annotator has marked a full stop, of which the official F1 leaves nothing.
    assert scores == pytest.approx({"f1": 1 - 1 / 10_570, "exact_match": 1.0})
