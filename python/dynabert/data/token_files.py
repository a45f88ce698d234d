"""The user's own files of tagged words: CoNLL columns, or JSONL with lists of tokens and tags."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dynabert.data.entities import is_entity_tag
from dynabert.data.examples import TaggedSentence, TaskSpec
from dynabert.data.files import numbered_lines, read_rows, read_text, row_error

_DOCUMENT_START = "-DOCSTART-"
_JSON_SUFFIXES = (".jsonl", ".json")


@dataclass(frozen=True)
class RawSentence:
    """A checked sentence whose tags are still names; `lines` has the line of each word."""

    path: Path
    words: tuple[str, ...]
    tags: tuple[str, ...]
    lines: tuple[int, ...]


def read_token_file(
    path: Path, token_column: str | None = None, tag_column: str | None = None
) -> list[RawSentence]:
    """All sentences of one file.

    A ``.jsonl`` or ``.json`` file has an object on each line, with two lists of equal length. Any
    other file has a word on each line and a blank line after each sentence; its columns are
    separated by tabs if the first line has any, else by blanks, and lines that begin with
    ``-DOCSTART-`` are passed over.

    Args:
        path: The file, UTF-8.
        token_column: Columns: number of the one with the words, from 1; None: the first. JSONL: the
            key; None: ``tokens``.
        tag_column: Columns: number of the one with the tags; None: the last. JSONL: the key; None:
            ``tags``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: There is no sentence, or a line cannot be read; names file and line.
    """
    if path.suffix.lower() in _JSON_SUFFIXES:
        sentences = list(_json_sentences(path, token_column or "tokens", tag_column or "tags"))
    else:
        sentences = list(_column_sentences(path, _number(token_column), _number(tag_column)))
    if not sentences:
        raise ValueError(
            f"read_token_file: {path} is empty, expected at least one sentence. Check the file."
        )
    return sentences


def _number(column: str | None) -> int | None:
    if column is None:
        return None
    if not column.isdecimal() or int(column) < 1:
        raise ValueError(
            f"read_token_file: column {column!r}, expected a number, from 1. Columns of a CoNLL "
            "file have no names."
        )
    return int(column)


def _column_sentences(
    path: Path, token_number: int | None, tag_number: int | None
) -> Iterator[RawSentence]:
    """Sentences of a file in columns, by default the first and the last."""
    num_columns = 0
    rows: list[tuple[str, str, int]] = []
    for line, content in (*numbered_lines(read_text(path)), (0, "")):
        if not content.strip():
            if rows:
                words, tags, lines = zip(*rows, strict=True)
                yield RawSentence(path, words, tags, lines)
                rows = []
            continue
        if content.startswith(_DOCUMENT_START):
            continue
        if not num_columns:  # the first line tells how all of them are written
            separator = re.compile("\t" if "\t" in content else "[ \t]+")
        cells = [cell.strip(" ") for cell in separator.split(content.rstrip(" \t"))]
        num_columns = num_columns or len(cells)
        least = max(2, token_number or 0, tag_number or 0)
        if len(cells) < least or len(cells) != num_columns:
            problem = f"{len(cells)} columns, expected {max(least, num_columns)}"
            raise row_error(path, line, problem, "Separate word and tag by a tab or a blank.")
        word, tag = cells[(token_number or 1) - 1], cells[(tag_number or 0) - 1]
        if not word or not tag:
            problem = f"word {word!r} with tag {tag!r}, expected both"
            raise row_error(path, line, problem, "Fill in or remove this line.")
        rows.append((word, tag, line))


def _json_sentences(path: Path, token_key: str, tag_key: str) -> Iterator[RawSentence]:
    advice = "Each line has one sentence: a list of tokens and one of tags."
    for line, values in read_rows(path):
        lists = []
        for key in (token_key, tag_key):
            if key not in values:
                raise row_error(path, line, f"no key {key!r} among {list(values)}", advice)
            cells = values[key]
            if not isinstance(cells, list) or not cells:
                raise row_error(path, line, f"{key}={cells!r}, expected a list of texts", advice)
            for index, cell in enumerate(cells):
                if not isinstance(cell, str) or not cell.strip():
                    raise row_error(path, line, f"{key}[{index}]={cell!r}, expected text", advice)
            lists.append(tuple(cell.strip() for cell in cells))
        words, tags = lists
        if len(words) != len(tags):
            problem = f"{len(tags)} tags for {len(words)} tokens, expected as many"
            raise row_error(path, line, problem, advice)
        yield RawSentence(path, words, tags, (line,) * len(words))


def infer_tags(sentences: Iterable[RawSentence], tag_names: Sequence[str] | None) -> TaskSpec:
    """What the tags of the training sentences ask for.

    Tags of entities are scored as whole entities, others, such as parts of speech, word by word.

    Args:
        sentences: The training sentences.
        tag_names: The tags, when known beforehand; None: those of the sentences, ``O`` first.

    Raises:
        ValueError: Fewer than two tags, or some that are not of the kind of the others.
    """
    first_use: dict[str, tuple[Path, int]] = {}
    for sentence in sentences:
        for tag, line in zip(sentence.tags, sentence.lines, strict=True):
            first_use.setdefault(tag, (sentence.path, line))
    names = tuple(tag_names or sorted(first_use, key=lambda tag: (tag != "O", tag)))
    if len(names) < 2:
        raise ValueError(
            f"load_task: the tags are {list(names)}, expected at least two. Check the tag column."
        )
    entity_tags = [tag for tag in names if is_entity_tag(tag)]
    for tag in names:
        if entity_tags and tag not in entity_tags and tag in first_use:
            problem = f"tag {tag!r} beside {entity_tags[-1]!r}, expected O or a prefix and a kind"
            raise row_error(*first_use[tag], problem, "Prefixes are B-, I-, E-, S-, L- and U-.")
    metrics = ("f1", "precision", "recall") if entity_tags else ("accuracy", "f1_macro")
    return TaskSpec("file", "token-classification", ("tokens",), names, metrics, metrics[0])


def to_sentences(sentences: Iterable[RawSentence], spec: TaskSpec) -> list[TaggedSentence]:
    """Sentences with their tags as indices.

    Raises:
        ValueError: A tag is not one of the task's; names file and line.
    """
    index_of = {name: index for index, name in enumerate(spec.label_names)}
    tagged = []
    for sentence in sentences:
        for tag, line in zip(sentence.tags, sentence.lines, strict=True):
            if tag not in index_of:
                problem = f"tag {tag!r}, expected one of {', '.join(spec.label_names)}"
                advice = "Only tags of the training file can be learned."
                raise row_error(sentence.path, line, problem, advice)
        tags = tuple(index_of[tag] for tag in sentence.tags)
        tagged.append(TaggedSentence(sentence.words, tags, sentence.lines[0]))
    return tagged
