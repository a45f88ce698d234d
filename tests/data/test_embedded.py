import re
from collections import Counter
from pathlib import Path

import pytest

from dynabert.data.embedded import PACKAGES, stdlib_sentences
from dynabert.data.tasks import load_task

MODULE = '''"""Opening words about messages and their many headers. Short one.

    >>> not_a_sentence_but_a_doctest_of_some_length(1, 2, 3, 4, 5)

An {name} object keeps messages until somebody asks for them.
"""

raise SystemError("never executed")


class Box:
    def open(self):
        "Open this box and look at whatever there is inside it."

    def same(self):
        "{shared}"
'''
SHARED = "This sentence stands in more than one package of the library."


@pytest.fixture
def library(tmp_path: Path) -> Path:
    for package in PACKAGES:
        path = tmp_path / ("_pydecimal.py" if package == "decimal" else f"{package}/module.py")
        path.parent.mkdir(exist_ok=True)
        unlike = MODULE.replace("messages", f"{package[::-1]} letters").replace("box", package[:3])
        path.write_text(unlike.replace("{name}", package).replace("{shared}", SHARED))
    return tmp_path


def test_sentences_of_a_made_up_library(library: Path) -> None:
    train, validation = stdlib_sentences(library)
    asyncio = [item for item in train + validation if item.label == PACKAGES.index("asyncio")]
    assert Counter(item.text for item in asyncio) == Counter(
        [
            "Opening words about oicnysa letters and their many headers.",
            "An this object keeps oicnysa letters until somebody asks for them.",
            "Open this asy and look at whatever there is inside it.",
        ]
    )
    assert {(item.origin, item.line) for item in asyncio} == {
        ("asyncio/module.py", 1),
        ("asyncio/module.py", 13),
    }
    assert SHARED not in {item.text for item in train + validation}


def test_docstring_is_never_on_both_sides(library: Path) -> None:
    train, validation = stdlib_sentences(library)
    sides = {(item.origin, item.line) for item in train} & {
        (item.origin, item.line) for item in validation
    }
    assert not sides


def test_library_without_sources_is_named(library: Path) -> None:
    (library / "_pydecimal.py").unlink()
    with pytest.raises(FileNotFoundError, match=r"_pydecimal\.py holds no Python source"):
        stdlib_sentences(library)


def test_task_is_well_populated_and_unique() -> None:
    data = load_task("stdlib")
    assert data.spec.label_names == PACKAGES
    assert 2_800 <= len(data.train) <= 3_800
    assert 400 <= len(data.validation) <= 750
    for examples, least in ((data.train, 200), (data.validation, 20)):
        counts = Counter(example.label for example in examples)
        assert sorted(counts) == list(range(len(PACKAGES)))
        assert min(counts.values()) >= least
    texts = [example.text for example in data.train + data.validation]
    assert len(set(texts)) == len(texts)
    assert all(6 <= len(text.split()) <= 40 for text in texts)


def test_task_does_not_name_its_packages() -> None:
    names = re.compile(rf"\b({'|'.join(PACKAGES)})\b", re.IGNORECASE)
    assert not [example.text for example in load_task("stdlib").train if names.search(example.text)]


def test_task_is_the_same_every_time() -> None:
    assert load_task("stdlib", max_train_rows=100) == load_task("stdlib", max_train_rows=100)


def test_task_is_learnable_but_not_trivial() -> None:
    sklearn = pytest.importorskip("sklearn")
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    data = load_task("stdlib")
    vectorizer = TfidfVectorizer()
    features = vectorizer.fit_transform([example.text for example in data.train])
    words = LogisticRegression(C=10.0, max_iter=200)
    words.fit(features, [example.label for example in data.train])
    held_out = vectorizer.transform([example.text for example in data.validation])
    accuracy = words.score(held_out, [example.label for example in data.validation])
    assert 0.65 <= accuracy <= 0.92, sklearn.__version__
