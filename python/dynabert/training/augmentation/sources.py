"""What may take a word's place: `CandidateSource`, word vectors, WordNet, and several in turn.

`MaskedLMSource` is in `masked_lm`. A source of one's own needs two members.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from dynabert.data.files import row_error
from dynabert.training.augmentation.words import Word, is_word

NUM_CANDIDATES = 15
"""Most candidates of a word, as in TinyBERT."""

_ROUNDING = 1e-5  # above the rounding of a float32 cosine
_BLOCK_WORDS = 256  # queries per matrix product: scores of 100,000 words take 100 MB


class CandidateSource(Protocol):
    """Proposes words that may take the place of others."""

    @property
    def identity(self) -> dict[str, Any]:
        """What the answers depend on, as plain JSON values: two sources with the same identity
        answer alike."""
        ...

    def candidates(self, words: Sequence[Word]) -> list[list[str]]:
        """Up to a fixed number of replacements for each word, the best first; none where it knows
        none.

        The answer for a word depends on its text and place, not on the other words of the call.
        """
        ...


class FirstAnswer:
    """Asks several sources in turn: a word gets the candidates of the first one that has any.

    A masked language model and then word vectors make TinyBERT's augmentation: the model answers
    for words that are one piece of its vocabulary, the vectors for the others.
    """

    def __init__(self, sources: Sequence[CandidateSource]) -> None:
        """Ask `sources` in their order.

        Raises:
            ValueError: There are none.
        """
        if not sources:
            raise ValueError(
                "FirstAnswer: sources=[], expected at least one. Give a masked language model, "
                "word vectors or WordNet."
            )
        self._sources = tuple(sources)

    @property
    def identity(self) -> dict[str, Any]:
        """Those of the sources, in their order."""
        return {"kind": "first-answer", "sources": [source.identity for source in self._sources]}

    def candidates(self, words: Sequence[Word]) -> list[list[str]]:
        """See `CandidateSource`; a source is asked only for what those before it left open."""
        answers: list[list[str]] = [[] for _ in words]
        for source in self._sources:
            still_open = [index for index, answer in enumerate(answers) if not answer]
            if not still_open:
                break
            found = source.candidates([words[index] for index in still_open])
            for index, answer in zip(still_open, found, strict=True):
                answers[index] = answer
        return answers


class WordVectorSource:
    """The nearest words by cosine, from a file in GloVe's text form: ``word v1 v2 ...``.

    Words of letters only are kept, as float32: 100,000 words of 300 numbers take 120 MB, and as
    much again while they are read. Looked up as written, else in lower case.
    """

    def __init__(
        self, path: Path | str, *, num_candidates: int = NUM_CANDIDATES, max_rows: int = 100_000
    ) -> None:
        """Read the first `max_rows` rows of `path`; files are sorted by frequency.

        A first line of two whole numbers, as word2vec and fastText write it, is passed over.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: A line cannot be read, which names file and line; or no word is left.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"WordVectorSource: path={path}, expected an existing file. Check the name."
            )
        _check_count("WordVectorSource", "num_candidates", num_candidates)
        _check_count("WordVectorSource", "max_rows", max_rows)
        digest = hashlib.sha256()
        self._words: list[str] = []
        self._index: dict[str, int] = {}
        values = array("f")
        dim = 0
        for word, vector in _vectors(path, max_rows, digest):
            dim = len(vector)
            if is_word(word) and word not in self._index:
                self._index[word] = len(self._words)
                self._words.append(word)
                values.frombytes(vector.tobytes())
        if not self._words:
            raise ValueError(
                f"WordVectorSource: path={path} has no word of letters only, expected one at "
                "least. Is this a file of word vectors?"
            )
        # A copy, so that the buffer, which array() over-allocates, is freed.
        matrix = torch.from_numpy(np.array(values, dtype=np.float32)).view(-1, dim)
        self._matrix = matrix / matrix.norm(dim=1, keepdim=True).clamp_min(1e-12)
        self._num_candidates = num_candidates
        self._identity = {
            "kind": "word-vectors",
            "file": path.name,
            "sha256": digest.hexdigest(),
            "candidates": num_candidates,
        }

    @property
    def identity(self) -> dict[str, Any]:
        """Name and digest of the rows that were read, and how many candidates are given."""
        return self._identity

    def candidates(self, words: Sequence[Word]) -> list[list[str]]:
        """See `CandidateSource`; a word gets none that the file does not have."""
        rows = [self._index.get(w.form, self._index.get(w.form.lower(), -1)) for w in words]
        known = sorted({row for row in rows if row >= 0})
        nearest: dict[int, list[str]] = {-1: []}
        for start in range(0, len(known), _BLOCK_WORDS):
            block = known[start : start + _BLOCK_WORDS]
            nearest.update(zip(block, self._nearest(torch.tensor(block)), strict=True))
        return [nearest[row] for row in rows]

    def _nearest(self, rows: Tensor) -> Iterator[list[str]]:
        """Candidates of the words with these indices, ``[n]`` int64."""
        cosines = self._matrix[rows] @ self._matrix.T  # [n, num_words]
        cosines[torch.arange(len(rows)), rows] = -torch.inf
        # float32 sums depend on how many words are asked for at once; float64 ones rank.
        near = contenders(cosines, self._num_candidates, _ROUNDING)
        for row, (columns, _) in zip(rows.tolist(), near, strict=True):
            exact = (self._matrix[columns].double() * self._matrix[row].double()).sum(dim=1)
            order = exact.argsort(descending=True, stable=True)[: self._num_candidates]
            yield [self._words[column] for column in columns[order].tolist()]


class WordNetSource:
    """Synonyms from WordNet, the commonest meaning first, through an installed `nltk`.

    WordNet has base forms only, so inflected words get none.
    """

    def __init__(self, *, num_candidates: int = NUM_CANDIDATES) -> None:
        """Open WordNet where it is installed; nothing is downloaded.

        Raises:
            ModuleNotFoundError: `nltk` or its WordNet data is not installed.
        """
        _check_count("WordNetSource", "num_candidates", num_candidates)
        try:
            self._wordnet: Any = import_module("nltk.corpus").wordnet
            version = self._wordnet.get_version()
        except (ModuleNotFoundError, LookupError):
            raise ModuleNotFoundError(
                "WordNetSource: nltk with its WordNet data is not installed, expected both. "
                "Run pip install nltk, then python -m nltk.downloader wordnet."
            ) from None
        self._num_candidates = num_candidates
        self._identity = {"kind": "wordnet", "version": version, "candidates": num_candidates}

    @property
    def identity(self) -> dict[str, Any]:
        """WordNet's version, and how many candidates are given."""
        return self._identity

    def candidates(self, words: Sequence[Word]) -> list[list[str]]:
        """See `CandidateSource`."""
        synonyms = {form: self._synonyms(form) for form in {word.form.lower() for word in words}}
        return [synonyms[word.form.lower()] for word in words]

    def _synonyms(self, form: str) -> list[str]:
        found: dict[str, None] = {}
        for synset in self._wordnet.synsets(form):
            names = [str(name) for name in synset.lemma_names()]
            if form in map(str.lower, names):  # else it was found by its base form
                found |= dict.fromkeys(n for n in names if is_word(n) and n.lower() != form)
        return list(found)[: self._num_candidates]


class Contenders(NamedTuple):
    """Columns of one row of scores, ascending, and their scores; both ``[n]``, on the CPU."""

    columns: Tensor
    scores: Tensor


def contenders(scores: Tensor, count: int, slack: float | Tensor) -> list[Contenders]:
    """For each row the columns that may be among its `count` best, if scores are off by rounding.

    Args:
        scores: ``[rows, columns]``; -inf where a column is not allowed.
        count: Columns wanted, 1 or more.
        slack: How far below the `count`-th best score a column may lie; a number or ``[rows]``.

    Returns:
        At least `count` columns of each row, or all that are allowed.
    """
    worst = scores.topk(min(count, scores.shape[1]), dim=1).values[:, -1] - slack
    chosen = (scores >= worst[:, None]) & (scores > -torch.inf)
    rows, columns = chosen.nonzero(as_tuple=True)
    sizes = chosen.sum(dim=1).tolist()
    pairs = zip(columns.cpu().split(sizes), scores[rows, columns].cpu().split(sizes), strict=True)
    return [Contenders(*pair) for pair in pairs]


def _vectors(path: Path, max_rows: int, digest: Any) -> Iterator[tuple[str, Any]]:
    """The first `max_rows` words and their vectors, ``[dim]`` float32; digests what it reads."""
    dim = num_rows = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            fields = line.split()
            if number == 1 and len(fields) == 2 and all(field.isdigit() for field in fields):
                continue
            if num_rows == max_rows:
                return
            num_rows += 1
            digest.update(line)
            dim = dim or len(fields) - 1
            if not 0 < dim < len(fields):
                problem = f"{len(fields)} fields, expected a word and {max(dim, 1)} numbers or more"
                raise _vector_error(path, number, problem)
            try:
                # The words of some files hold spaces.
                text = b" ".join(fields[:-dim]).decode()
                vector = np.array(fields[-dim:], dtype=np.float32)
            except ValueError as error:  # UnicodeDecodeError is one
                raise _vector_error(path, number, str(error)) from None
            if not np.isfinite(vector).all():
                raise _vector_error(path, number, "a number that is not finite")
            yield text, vector


def _vector_error(path: Path, line: int, problem: str) -> ValueError:
    return row_error(path, line, problem, "Is this a text file of word vectors, one word a line?")


def _check_count(who: str, name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{who}: {name}={value}, expected at least 1.")
