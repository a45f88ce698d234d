"""A text classification task that every Python carries: docstring sentences by package.

The sentences are read from the source files of the running interpreter's standard library with
`ast`; nothing is imported, executed, downloaded or cached. Only the standard library is used here.
"""

import ast
import hashlib
import re
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# Present, with hundreds of docstrings, in every CPython 3.10 to 3.13, minimal Debian installs
# included.
_SOURCES = {
    "asyncio": "asyncio",
    "decimal": "_pydecimal.py",
    "email": "email",
    "http": "http",
    "importlib": "importlib",
    "logging": "logging",
    "unittest": "unittest",
    "xml": "xml",
}
PACKAGES = tuple(_SOURCES)

_MIN_WORDS, _MAX_WORDS = 6, 40
_VALIDATION_SHARE = 0.15
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(`*])")
_WORD = re.compile(r"[A-Za-z][a-z']*[a-z]")
# The name of a package in its own text would make the label a look-up. All names go, from every
# sentence, so that a gap says only that some package was named.
_NAMES = re.compile(r"\b_*(?:py)?(?:" + "|".join(PACKAGES) + r")s?\b", re.IGNORECASE)
_GAP = "this"


class Sentence(NamedTuple):
    """One sentence, the index of its package in `PACKAGES`, and the file and line it is from."""

    text: str
    label: int
    origin: str
    line: int


def stdlib_sentences(root: Path | None = None) -> tuple[list[Sentence], list[Sentence]]:
    """Sentences of the standard library's docstrings, split in training and validation.

    All sentences of one docstring fall on the same side, by a hash of where it stands, so order and
    split depend on nothing but the text of the library. A sentence is kept once; one that occurs in
    two packages is dropped. About 3,300 and 550 sentences on CPython 3.10 to 3.13.

    Args:
        root: Folder of the standard library; default: that of the running interpreter.

    Returns:
        Training and validation sentences, in the order of package, file and line.

    Raises:
        FileNotFoundError: The library's source files are not installed (a zipped or stripped
            Python).
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    found: list[tuple[Sentence, bool]] = []
    labels_of: dict[str, set[int]] = defaultdict(set)
    for label, package in enumerate(PACKAGES):
        files = _source_files(root, package)
        for path in files:
            name = path.relative_to(root).as_posix()
            for sentence, held_out in _file_sentences(path, name, label):
                if label not in labels_of[sentence.text]:
                    found.append((sentence, held_out))
                labels_of[sentence.text].add(label)
    unique = [pair for pair in found if len(labels_of[pair[0].text]) == 1]
    train = [sentence for sentence, held_out in unique if not held_out]
    validation = [sentence for sentence, held_out in unique if held_out]
    return train, validation


def _source_files(root: Path, package: str) -> list[Path]:
    source = root / _SOURCES[package]
    files = [source] if source.is_file() else sorted(source.rglob("*.py"))
    if not files:
        raise FileNotFoundError(
            f"stdlib task: {source} holds no Python source, expected the standard library's files. "
            "Use a Python with its library as .py files, or another task."
        )
    return files


def _file_sentences(path: Path, name: str, label: int) -> Iterator[tuple[Sentence, bool]]:
    """Each sentence of a file's docstrings, and whether it is held out for validation."""
    for owner, line, docstring in _docstrings(ast.parse(path.read_bytes()), ""):
        digest = hashlib.sha256(f"{name}:{owner}".encode()).digest()
        held_out = int.from_bytes(digest[:4], "big") < _VALIDATION_SHARE * 2**32
        for text in _sentences(docstring):
            yield Sentence(text, label, name, line), held_out


def _docstrings(node: ast.AST, owner: str) -> Iterator[tuple[str, int, str]]:
    """Qualified name, line and text of every docstring under `node`, in source order."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node)
        if docstring:
            yield owner, node.body[0].lineno, docstring
    for child in ast.iter_child_nodes(node):
        name = getattr(child, "name", None)
        yield from _docstrings(child, f"{owner}.{name}" if name else owner)


def _sentences(docstring: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", docstring):
        if ">>>" in paragraph:
            continue
        for sentence in _SENTENCE_END.split(" ".join(paragraph.split())):
            text = " ".join(_NAMES.sub(_GAP, sentence).split())
            words = text.split()
            plain = sum(_WORD.fullmatch(word.strip(".,:;()'\"")) is not None for word in words)
            # Tables, grammars and code have few plain words.
            if _MIN_WORDS <= len(words) <= _MAX_WORDS and plain >= 0.6 * len(words):
                yield text
