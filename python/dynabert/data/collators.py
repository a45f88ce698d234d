"""From examples to batches: tokenise once, pad each batch to its own longest row."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dynabert.data.examples import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LABEL_NAMES = frozenset({"labels", "start_positions", "end_positions"})
"""What of a batch a model computes its own loss from."""
IGNORED_LABEL = -100
"""Label of a token that has none."""

_log = logging.getLogger(__name__)
# Bounds the tokeniser's Python lists; its threads are busy from about 1,000 rows on.
CHUNK_ROWS = 10_000


class EncodedDataset(Dataset[dict[str, Any]]):
    """Tokenised rows, held as flat integer arrays: about 5 bytes for each token.

    Row `i` is a dict of plain lists and numbers: ``input_ids``, ``token_type_ids`` where the
    tokeniser makes them, ``length`` (tokens), and ``labels`` where there are labels (int for a
    class, float for a score, a list of ints where every token has one).

    Attributes:
        lengths: Tokens of each row, special tokens included.
        num_truncated: Rows that were longer than `max_length`.
    """

    def __init__(
        self,
        columns: Mapping[str, Sequence[Sequence[int]]],
        labels: Sequence[int | float] | None,
        num_truncated: int = 0,
    ) -> None:
        """Hold token lists by column name, alike in lengths, and one label per row or None.

        Raises:
            ValueError: The lists of a row differ in their lengths.
        """
        self.lengths = [len(row) for row in columns["input_ids"]]
        self.num_truncated = num_truncated
        self._labels = labels
        self._offsets = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        self._columns = {name: _flatten(rows, self.lengths) for name, rows in columns.items()}

    @classmethod
    def joined(cls, parts: Sequence["EncodedDataset"]) -> "EncodedDataset":
        """The rows of several datasets with the same columns, one after the other, without their
        labels."""
        whole = cls({name: [] for name in parts[0]._columns}, None)
        whole.lengths = [length for part in parts for length in part.lengths]
        whole.num_truncated = sum(part.num_truncated for part in parts)
        whole._offsets = np.concatenate([[0], np.cumsum(whole.lengths, dtype=np.int64)])
        for name in whole._columns:
            whole._columns[name] = np.concatenate([part._columns[name] for part in parts])
        return whole

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        tokens = slice(self._offsets[index], self._offsets[index + 1])
        row: dict[str, Any] = {name: flat[tokens].tolist() for name, flat in self._columns.items()}
        row["length"] = self.lengths[index]
        if self._labels is not None:
            row["labels"] = self._labels[index]
        return row


def _flatten(rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> npt.NDArray[np.int32]:
    if [len(row) for row in rows] != list(lengths):
        raise ValueError("EncodedDataset: columns differ in their lengths, expected equal ones.")
    flat = np.empty(sum(lengths), dtype=np.int32)
    start = 0
    for row, length in zip(rows, lengths, strict=True):
        flat[start : start + length] = row
        start += length
    return flat


def require_offsets(who: str, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a tokeniser that does not know where in a text its tokens are from.

    Raises:
        ValueError: It is one of those written in Python; the message begins with `who`.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{who}: tokenizer={type(tokenizer).__name__}, expected a fast one, which knows where "
            "its tokens are from. Save the model with a tokenizer.json."
        )


def encode(
    examples: Sequence[Example],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    *,
    longest: int | None = None,
    file: Path | None = None,
    log_cuts: bool = True,
) -> EncodedDataset:
    """Tokenise examples once; the longer text of a pair is cut first. A log line counts the cuts.

    Args:
        examples: What to tokenise; all or none have a label.
        tokenizer: Any Hugging Face tokeniser.
        max_length: Longest row in tokens, special tokens included.
        longest: Refuse a row that would have more tokens than this before it is cut; None: none.
        file: Where the examples are from, for the message of that error.
        log_cuts: False: no log line.

    Raises:
        ValueError: No examples, `max_length` leaves no room for text, only some rows have a label
            or a pair, or a row has more than `longest` tokens; names file and line.
    """
    room = tokenizer.num_special_tokens_to_add(pair=True)
    if max_length <= room:
        raise ValueError(
            f"encode: max_length={max_length}, expected more than {room}. "
            "Leave room for text beside the special tokens of a pair."
        )
    if not examples:
        raise ValueError("encode: examples=[], expected at least one. Check the task's files.")
    for name in ("text_pair", "label"):
        present = {getattr(example, name) is not None for example in examples}
        if len(present) > 1:
            raise ValueError(f"encode: only some examples have a {name}, expected all or none.")

    columns: dict[str, list[list[int]]] = {}
    num_truncated = 0
    for start in range(0, len(examples), CHUNK_ROWS):
        chunk = examples[start : start + CHUNK_ROWS]
        encoded = _tokenise(chunk, tokenizer, truncation=True, max_length=max_length)
        for name, rows in encoded.items():
            columns.setdefault(name, []).extend(rows)
        full = [
            example
            for example, row in zip(chunk, encoded["input_ids"], strict=True)
            if len(row) == max_length
        ]
        if full:
            uncut = _tokenise(full, tokenizer, truncation=False)
            lengths = [len(row) for row in uncut["input_ids"]]
            num_truncated += sum(length > max_length for length in lengths)
            for example, length in zip(full, lengths, strict=True):
                if longest is not None and length > longest:
                    place = "" if file is None else f"{file} "
                    raise ValueError(
                        f"encode: {place}line {example.line}: a text of {length} tokens, expected "
                        f"at most {longest}, as the model can take. Shorten it, or cut long texts "
                        "with long_texts='cut'."
                    )
    if num_truncated and log_cuts:
        _log.warning(
            "%d of %d rows were longer than %d tokens and were cut",
            num_truncated,
            len(examples),
            max_length,
        )
    labels = [example.label for example in examples if example.label is not None]
    return EncodedDataset(columns, labels or None, num_truncated)


def _tokenise(
    examples: Sequence[Example], tokenizer: "PreTrainedTokenizerBase", **options: Any
) -> dict[str, list[list[int]]]:
    texts = [example.text for example in examples]
    pairs = [example.text_pair for example in examples if example.text_pair is not None]
    # verbose=False: the tokeniser would warn about rows that are only measured here.
    encoded = tokenizer(texts, pairs or None, return_attention_mask=False, verbose=False, **options)
    return {name: rows for name, rows in encoded.items()}


class DynamicPadCollator:
    """Pad the rows of a batch to the longest of them, on the tokeniser's padding side.

    Returns ``input_ids``, ``attention_mask`` and, where the rows have them, ``token_type_ids``, all
    ``[batch_size, seq_len]`` int64. Where the rows have them, ``labels``: ``[batch_size]`` int64
    for classes or float32 for scores, ``[batch_size, seq_len]`` int64 for tags, -100 at padding;
    and ``start_positions`` and ``end_positions``, ``[batch_size]`` int64.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", pad_to_multiple_of: int | None = None
    ) -> None:
        """Pad as `tokenizer` does; with `pad_to_multiple_of`, up to a multiple of that many tokens.

        Raises:
            ValueError: The tokeniser has no padding token, or the multiple is not positive.
        """
        if tokenizer.pad_token_id is None:
            raise ValueError(
                "DynamicPadCollator: pad_token_id=None, expected a padding token. "
                "Set tokenizer.pad_token."
            )
        if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
            raise ValueError(
                f"DynamicPadCollator: pad_to_multiple_of={pad_to_multiple_of}, expected 1 or more. "
                "Leave it out to pad to the longest row."
            )
        self._pad_values = {
            "input_ids": int(tokenizer.pad_token_id),
            "token_type_ids": int(getattr(tokenizer, "pad_token_type_id", 0)),
        }
        self._left = tokenizer.padding_side == "left"
        self._multiple = pad_to_multiple_of or 1

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Make one batch of at least one row."""
        lengths = [len(row["input_ids"]) for row in rows]
        seq_len = -(-max(lengths) // self._multiple) * self._multiple
        batch = {
            name: self._pad([row[name] for row in rows], seq_len, value)
            for name, value in self._pad_values.items()
            if name in rows[0]
        }
        batch["attention_mask"] = self._pad([[1] * length for length in lengths], seq_len, 0)
        if "labels" in rows[0]:
            labels = [row["labels"] for row in rows]
            if isinstance(labels[0], list):
                batch["labels"] = self._pad(labels, seq_len, IGNORED_LABEL)
            else:
                dtype = torch.float32 if isinstance(labels[0], float) else torch.int64
                batch["labels"] = torch.tensor(labels, dtype=dtype)
        for name in ("start_positions", "end_positions"):
            if name in rows[0]:
                starts = [seq_len - length if self._left else 0 for length in lengths]
                positions = [row[name] + start for row, start in zip(rows, starts, strict=True)]
                batch[name] = torch.tensor(positions)
        return batch

    def _pad(self, rows: Sequence[Sequence[int]], seq_len: int, value: int) -> Tensor:
        padded = np.full((len(rows), seq_len), value, dtype=np.int64)
        for target, row in zip(padded, rows, strict=True):
            start = seq_len - len(row) if self._left else 0
            target[start : start + len(row)] = row
        return torch.from_numpy(padded)
