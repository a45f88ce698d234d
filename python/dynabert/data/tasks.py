"""`load_task`: GLUE, SQuAD, the user's own files or the embedded task, read and checked row by
row."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from dynabert.data.embedded import PACKAGES, Sentence, stdlib_sentences
from dynabert.data.examples import (
    AnyExample,
    Example,
    Problem,
    Question,
    TaskData,
    TaskSpec,
    holdout_split,
    subsample,
)
from dynabert.data.files import file_digest
from dynabert.data.glue import GLUE_TASKS, download_glue, glue_files, read_glue_file
from dynabert.data.squad import question_spec, read_squad_file, squad_files
from dynabert.data.token_files import infer_tags, read_token_file, to_sentences
from dynabert.data.user_files import Columns, infer_spec, read_user_file, to_examples

__all__ = [
    "TASK_NAMES",
    "Example",
    "Problem",
    "TaskData",
    "TaskSpec",
    "holdout_split",
    "load_task",
    "subsample",
]

TASK_NAMES = (*GLUE_TASKS, "squad", "stdlib", "file")
_ALIASES = {"sst-2": "sst2", "sts-b": "stsb", "mnli-m": "mnli"}
_HELD_OUT_SHARE = 0.1  # of a training file that comes without a validation file
# The defaults of a file of texts; a file of tagged words has others.
_TEXT_COLUMNS = (Columns.text, Columns.label)


def load_task(
    task: str,
    data_dir: Path | str | None = None,
    *,
    train_file: Path | str | None = None,
    validation_file: Path | str | None = None,
    text_column: str = "text",
    pair_column: str | None = None,
    label_column: str | None = "label",
    problem: Literal["auto"] | Problem = "auto",
    label_names: Sequence[str] | None = None,
    max_train_rows: int | None = None,
    balanced: bool = False,
    seed: int = 0,
    from_hub: bool = False,
    with_train: bool = True,
) -> TaskData:
    """Read a task's training and validation examples and check every row.

    Args:
        task: A GLUE task (``cola sst2 mrpc stsb qqp mnli mnli-mm qnli rte wnli``; ``mnli-mm``
            validates on the mismatched rows), ``squad`` for SQuAD v1.1, ``stdlib`` for the embedded
            task, or ``file`` for own files.
        data_dir: GLUE and SQuAD: the folder that holds the official folder (``SST-2``), or that
            folder itself. Own files: the folder their names are relative to.
        train_file: Own files: a CSV, TSV or JSONL file with a header or keys; for token
            classification see `token_files.read_token_file`, for question answering a JSON file of
            SQuAD's form.
        validation_file: Own files: likewise; None: a tenth of the training file, held out.
        text_column: Own files: the column of the text, or of the words.
        pair_column: Own files: the column of a second text; None: single texts.
        label_column: Own files: the column of the label, or of the tags; None: there is none.
        problem: Own files: ``classification``, ``regression``, ``token-classification``,
            ``question-answering``, or ``auto``: numbers that are not all whole are scores, anything
            else names classes. ``none`` drops the labels of any task of texts.
        label_names: Own files: the classes or tags in order, for instance a trained model's; None:
            those of the training file.
        max_train_rows: Keep a seeded choice of this many training rows; None: all.
        balanced: Choose them with equally many of each class.
        seed: Chooses rows.
        from_hub: GLUE: fetch the rows with the `datasets` library where no `data_dir` is given.
        with_train: False reads only the validation rows; own files then need `label_names` for
            classes and tags.

    Returns:
        The task and its examples.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: An argument is wrong, or a row cannot be read; the message names file and line.
        ConnectionError: The hub cannot be reached.
    """
    name = _ALIASES.get(task.lower(), task.lower())
    if name not in TASK_NAMES:
        raise ValueError(
            f"load_task: task={task!r}, expected one of {', '.join(TASK_NAMES)}. "
            "Use 'file' with train_file for your own data."
        )
    if problem not in ("auto", *get_args(Problem)):
        raise ValueError(
            f"load_task: problem={problem!r}, expected auto, {', '.join(get_args(Problem))}."
        )
    if max_train_rows is not None and max_train_rows < 1:
        raise ValueError(
            f"load_task: max_train_rows={max_train_rows}, expected at least 1 or None for all."
        )
    allowed = ("auto",) if name == "squad" else ("auto", "none")
    if name != "file" and (train_file or validation_file or problem not in allowed):
        raise ValueError(
            f"load_task: task={task!r} with train_file, validation_file or problem, "
            "expected none of them. They belong to task='file'."
        )

    folder = None if data_dir is None else Path(data_dir)
    if name == "stdlib":
        data = _load_stdlib(folder)
    elif name == "file":
        columns = Columns(text_column, pair_column, label_column)
        data = _load_user_files(
            [
                None if file is None else (folder or Path()) / file
                for file in (train_file, validation_file)
            ],
            columns,
            problem,
            label_names,
            seed,
            with_train,
        )
    elif name == "squad":
        data = _load_squad(folder, with_train)
    else:
        data = _load_glue(name, folder, from_hub, with_train)

    train = data.train if with_train else []
    if train and max_train_rows is not None:
        train = subsample(train, max_train_rows, seed, balanced=balanced)
    data = replace(data, train=train)
    if problem == "none":
        data = _without_labels(data)
    options = {
        "task": name,
        "max_train_rows": max_train_rows,
        "balanced": balanced,
        "seed": seed,
        "problem": problem,
        "labels": data.spec.label_names,
        "columns": data.spec.text_fields,
        "label_column": label_column,
        "with_train": with_train,
    }
    given = {
        "data_dir": folder and str(folder),
        "train_file": train_file and str(train_file),
        "validation_file": validation_file and str(validation_file),
        "text_column": text_column,
        "pair_column": pair_column,
        "label_column": label_column,
        "problem": problem,
        "from_hub": from_hub,
        "balanced": balanced,
        "max_train_rows": max_train_rows,
    }
    return replace(data, fingerprint=_fingerprint(data.fingerprint, options), options=given)


def _load_stdlib(folder: Path | None) -> TaskData:
    if folder is not None:
        raise ValueError(
            f"load_task: data_dir={folder} with task='stdlib', expected None. "
            "The embedded task reads the running Python's own library."
        )
    spec = TaskSpec("stdlib", "classification", ("sentence",), PACKAGES, ("accuracy",), "accuracy")
    train, validation = stdlib_sentences()
    texts = _fingerprint(*(list(sentence) for sentence in (*train, *validation)))
    source = "docstring sentences of this Python's standard library"
    return TaskData(spec, _from_sentences(train), _from_sentences(validation), source, texts)


def _from_sentences(sentences: Iterable[Sentence]) -> list[Example]:
    return [Example(item.text, None, item.label, item.line) for item in sentences]


def _load_glue(name: str, folder: Path | None, from_hub: bool, with_train: bool) -> TaskData:
    spec = GLUE_TASKS[name].spec(name)
    splits = ("train", "validation") if with_train else ("validation",)
    files: dict[str, Path] = {}
    if folder is not None:
        files = glue_files(name, folder)
        rows = {split: read_glue_file(name, files[split]) for split in splits}
        source = str(files["validation"].parent)
        fingerprint = _fingerprint(*(file_digest(files[split]) for split in splits))
    elif from_hub:
        rows = {split: download_glue(name, split) for split in splits}
        source = f"nyu-mll/glue, {name}"
        fingerprint = _fingerprint(*(list(row) for split in splits for row in rows[split]))
    else:
        raise ValueError(
            f"load_task: data_dir=None, expected the folder of {GLUE_TASKS[name].folder}. "
            "Give a data_dir, or from_hub=True to fetch the rows with `datasets`."
        )
    return TaskData(
        spec,
        rows.get("train", []),
        rows["validation"],
        source,
        fingerprint,
        train_file=files.get("train"),
        validation_file=files.get("validation"),
    )


def _load_squad(folder: Path | None, with_train: bool) -> TaskData:
    if folder is None:
        raise ValueError(
            "load_task: data_dir=None, expected the folder of SQuAD's official files. "
            "Give a data_dir."
        )
    files = squad_files(folder)
    splits = ("train", "validation") if with_train else ("validation",)
    questions = {split: read_squad_file(files[split]) for split in splits}
    fingerprint = _fingerprint(*(file_digest(files[split]) for split in splits))
    source = str(files["validation"].parent)
    train, validation = questions.get("train", []), questions["validation"]
    return TaskData(question_spec("squad"), train, validation, source, fingerprint)


def _load_user_files(
    files: Sequence[Path | None],
    columns: Columns,
    problem: Literal["auto"] | Problem,
    label_names: Sequence[str] | None,
    seed: int,
    with_train: bool,
) -> TaskData:
    train_file, validation_file = files
    needed = train_file if with_train else validation_file
    if needed is None:
        missing = "train_file" if with_train else "validation_file"
        raise ValueError(
            f"load_task: {missing}=None with task='file', expected a path. Name the file."
        )
    used = [file for file in (train_file if with_train else None, validation_file) if file]
    knows_labels = problem in ("regression", "question-answering", "none") or columns.label is None
    if not (with_train or label_names or knows_labels):
        raise ValueError(
            "load_task: label_names=None with with_train=False, expected the model's classes or "
            "problem='regression'. Validation rows do not tell the order of the classes."
        )
    spec, examples = _read_user_files(used, columns, problem, label_names)
    train = examples[needed] if with_train else []
    source = ", ".join(str(file) for file in used)
    if validation_file is not None:
        validation = examples[validation_file]
    else:
        train, validation = _hold_out(train, seed)
        source += f" ({len(validation)} rows held out for validation)"
    fingerprint = _fingerprint(*(file_digest(file) for file in used))
    return TaskData(
        spec,
        train,
        validation,
        source,
        fingerprint,
        train_file=train_file,
        validation_file=validation_file or train_file,
    )


def _read_user_files(
    files: Sequence[Path],
    columns: Columns,
    problem: Literal["auto"] | Problem,
    label_names: Sequence[str] | None,
) -> tuple[TaskSpec, dict[Path, Sequence[AnyExample]]]:
    """The task that the first file asks for, and the examples of every file."""
    if problem == "question-answering":
        return question_spec("file"), {file: read_squad_file(file) for file in files}
    if problem == "token-classification":
        chosen = [None if name in _TEXT_COLUMNS else name for name in (columns.text, columns.label)]
        sentences = {file: read_token_file(file, *chosen) for file in files}
        spec = replace(infer_tags(sentences[files[0]], label_names), text_fields=(columns.text,))
        return spec, {file: to_sentences(sentences[file], spec) for file in files}
    rows = {file: read_user_file(file, columns) for file in files}
    spec = infer_spec(rows[files[0]], columns, problem, label_names)
    return spec, {file: to_examples(rows[file], spec) for file in files}


def _hold_out(
    examples: Sequence[AnyExample], seed: int
) -> tuple[Sequence[AnyExample], Sequence[AnyExample]]:
    """Training and validation examples; questions about the same context stay together."""
    questions = [item for item in examples if isinstance(item, Question)]
    contexts = list(dict.fromkeys(item.context for item in questions))
    count = max(1, round(len(contexts or examples) * _HELD_OUT_SHARE))
    if not questions:
        return holdout_split(examples, count, seed)
    held_out = set(holdout_split(contexts, count, seed)[1])
    return (
        [item for item in questions if item.context not in held_out],
        [item for item in questions if item.context in held_out],
    )


def _without_labels(data: TaskData) -> TaskData:
    spec = replace(data.spec, problem="none", label_names=(), metrics=(), primary_metric="")
    train, validation = (
        [item._replace(label=None) for item in examples if isinstance(item, Example)]
        for examples in (data.train, data.validation)
    )
    return replace(data, spec=spec, train=train, validation=validation)


def _fingerprint(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
