"""An augmented file as rows to train on, beside those of the task."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dynabert.data.collators import CHUNK_ROWS, EncodedDataset, encode
from dynabert.data.examples import Example, TaskData
from dynabert.training.augmentation.files import read_augmented
from dynabert.training.augmentation.variants import check_task

_log = logging.getLogger(__name__)


def add_augmented(
    rows: EncodedDataset,
    path: Path,
    data: TaskData,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> EncodedDataset:
    """`rows` and those of an augmented file, tokenised and without labels.

    Rows of the file that are rows of the task, of its training or its validation data, are left
    out: the former are in `rows` already or held out, the latter are not to be trained on.

    Args:
        rows: The training rows of `data`.
        path: A file as `write_augmented` makes it.
        data: The task.
        tokenizer: The model's tokeniser.
        max_length: Longest row in tokens; longer ones are cut.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read, holds pairs for a task of single texts or the other way
            round, has no row of its own, or does not suit the kind of task.
    """
    check_task(data.spec)
    parts = [rows]
    examples = _new_examples(path, data)
    while chunk := list(islice(examples, CHUNK_ROWS)):
        parts.append(encode(chunk, tokenizer, max_length, log_cuts=False))
    if len(parts) == 1:
        raise ValueError(
            f"add_augmented: {path} holds nothing but rows of task {data.spec.name}, expected "
            "variants of them. Make it with more attempts, or with another source of words."
        )
    joined = EncodedDataset.joined(parts)
    num_cut = joined.num_truncated - rows.num_truncated
    _log.info(
        "%s: %d rows beside the %d of the task, %d of them cut to %d tokens",
        path,
        len(joined) - len(rows),
        len(rows),
        num_cut,
        max_length,
    )
    return joined


def _new_examples(path: Path, data: TaskData) -> Iterator[Example]:
    """The rows of the file that are no rows of the task."""
    num_texts = len(data.spec.text_fields)
    examples = [e for split in (data.train, data.validation) for e in split]
    known = {example[:2] for example in examples}
    for number, row in enumerate(read_augmented(path), start=1):
        if (row.text_pair is None) != (num_texts == 1):
            raise ValueError(
                f"add_augmented: {path} line {number} holds "
                f"{'one text' if row.text_pair is None else 'a pair'}, expected "
                f"{'a pair' if num_texts == 2 else 'one text'} as task {data.spec.name} has. Make "
                "the file from this task."
            )
        if row[:2] not in known:
            yield Example(row.text, row.text_pair, None, number)
