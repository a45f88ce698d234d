"""From tagged sentences to rows of tokens, and from predictions for tokens back to words."""

import logging
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dynabert.data.collators import CHUNK_ROWS, IGNORED_LABEL, EncodedDataset, require_offsets
from dynabert.data.entities import OUTSIDE
from dynabert.data.examples import TaggedSentence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


class TokenRows(EncodedDataset):
    """Tokenised sentences, each in one row or, where it is longer than a row, in several.

    ``labels`` of a row has an int for each token: the tag of a word at its first token, -100 at its
    others and at special tokens.

    Attributes:
        sentences: The sentences.
    """

    def __init__(
        self,
        columns: Mapping[str, Sequence[Sequence[int]]],
        sentences: Sequence[TaggedSentence],
        words: Sequence[tuple[int, Sequence[int]]],
    ) -> None:
        """Hold token lists by column name, and for each row its sentence and the words that begin
        in it."""
        super().__init__(columns, None)
        self.sentences = sentences
        self._words = words

    def predicted_tags(
        self, predicted: Sequence[Sequence[int]], names: Sequence[str]
    ) -> list[list[str]]:
        """The tag of every word of every sentence, by name.

        Args:
            predicted: For each row, the tags at its labelled tokens, in their order.
            names: Names of the tags. A word of which the tokeniser leaves nothing has ``O``, or the
                first where there is no ``O``.
        """
        default = OUTSIDE if OUTSIDE in names else names[0]
        tags = [[default] * len(sentence.words) for sentence in self.sentences]
        for (sentence, words), found in zip(self._words, predicted, strict=True):
            for word, tag in zip(words, found, strict=True):
                tags[sentence][word] = names[tag]
        return tags

    def right_tags(self, names: Sequence[str]) -> list[list[str]]:
        """What `predicted_tags` ought to be."""
        return [[names[tag] for tag in sentence.tags] for sentence in self.sentences]


def encode_sentences(
    sentences: Sequence[TaggedSentence], tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> TokenRows:
    """Tokenise tagged sentences; one of more than `max_length` tokens goes on in further rows.

    A sentence is tokenised as plain text, its words separated by blanks: a byte-level tokeniser
    then makes the tokens that it makes of any text.

    Args:
        sentences: What to tokenise.
        tokenizer: A tokeniser that knows where in a text its tokens are from.
        max_length: Longest row in tokens, special tokens included.

    Raises:
        ValueError: No sentences, `max_length` leaves no room for text, or the tokeniser does not
            know where its tokens are from.
    """
    require_offsets("encode_sentences", tokenizer)
    room = tokenizer.num_special_tokens_to_add()
    if max_length <= room:
        raise ValueError(
            f"encode_sentences: max_length={max_length}, expected more than {room}. "
            "Leave room for text beside the special tokens."
        )
    if not sentences:
        raise ValueError(
            "encode_sentences: sentences=[], expected at least one. Check the task's files."
        )
    columns: dict[str, list[list[int]]] = {}
    words_of_rows: list[tuple[int, list[int]]] = []
    for first in range(0, len(sentences), CHUNK_ROWS):
        encoded: Any = tokenizer(
            [" ".join(sentence.words) for sentence in sentences[first : first + CHUNK_ROWS]],
            truncation=True,
            max_length=max_length,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_attention_mask=False,
        )
        origins = [first + index for index in encoded.pop("overflow_to_sample_mapping")]
        labels, words = _label_first_tokens(sentences, origins, encoded.pop("offset_mapping"))
        # A row in which no word begins, the rest of a very long one, has nothing to learn.
        kept = [row for row, begun in enumerate(words) if begun]
        for name, rows in (*encoded.items(), ("labels", labels)):
            columns.setdefault(name, []).extend(rows[row] for row in kept)
        words_of_rows.extend((origins[row], words[row]) for row in kept)
    if len(words_of_rows) > len(sentences):
        _log.info(
            "%d sentences make %d rows of at most %d tokens",
            len(sentences),
            len(words_of_rows),
            max_length,
        )
    return TokenRows(columns, sentences, words_of_rows)


def _label_first_tokens(
    sentences: Sequence[TaggedSentence],
    origins: Sequence[int],
    offsets: Sequence[Sequence[tuple[int, int]]],
) -> tuple[list[list[int]], list[list[int]]]:
    """Labels of every row's tokens, and the words that begin in it.

    Args:
        sentences: All sentences.
        origins: The sentence of each row.
        offsets: Where the tokens of each row start and end in the words joined by blanks.
    """
    labels: list[list[int]] = []
    words: list[list[int]] = []
    former = -1
    for origin, spans in zip(origins, offsets, strict=True):
        sentence = sentences[origin]
        if origin != former:
            former, begun, starts = origin, set[int](), [0]
            for word in sentence.words:
                starts.append(starts[-1] + len(word) + 1)
        labels.append([IGNORED_LABEL] * len(spans))
        words.append([])
        for position, (start, end) in enumerate(spans):
            # The last character: some tokenisers count the blank before a word as part of it.
            index = bisect_right(starts, end - 1) - 1
            if start < end and index not in begun:
                begun.add(index)
                words[-1].append(index)
                labels[-1][position] = sentence.tags[index]
    return labels, words
