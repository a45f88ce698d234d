"""Candidates: what a masked language model, word vectors and WordNet put in a word's place."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dynabert import DynaBertForMaskedLM, SubnetConfig
from dynabert.training.augmentation import (
    FirstAnswer,
    MaskedLMSource,
    Word,
    WordNetSource,
    WordVectorSource,
    find_words,
    load_masked_lm,
)
from tests.training.augmentation_toys import WORDS, Fixed, bert, plain_candidates, roberta

Toy = Callable[..., tuple[PreTrainedModel, PreTrainedTokenizerBase]]
SENTENCES = (
    "the film was good",
    "A great movie, nice plot.",
    "Plane story: bad, bad films filming the film.",
    "nice",
)
TOYS = pytest.mark.parametrize("toy", [bert, roberta])


def words_of(*texts: str) -> list[Word]:
    return [word for text in texts for word in find_words(text)]


def allowed_pieces(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The pieces of a toy's vocabulary that begin a word and are letters only, written out."""
    pieces = tokenizer.get_vocab()
    if "Ġfilm" in pieces:
        starts = {id_: piece[1:] for piece, id_ in pieces.items() if piece.startswith("Ġ")}
    else:
        starts = {id_: piece for piece, id_ in pieces.items()}
    return {id_: word for id_, word in sorted(starts.items()) if word.isalpha()}


def is_one_piece(tokenizer: PreTrainedTokenizerBase, word: Word) -> bool:
    (encoding,) = tokenizer([word.text]).encodings or ()
    return (word.start, word.end) in encoding.offsets


@TOYS
@pytest.mark.parametrize("count", [1, 3, 50])
def test_candidates_are_those_of_one_sentence_at_a_time(toy: Toy, count: int) -> None:
    model, tokenizer = toy()
    words = words_of(*SENTENCES)
    source = MaskedLMSource(model, tokenizer, num_candidates=count, batch_tokens=64)
    allowed = allowed_pieces(tokenizer)
    found = source.candidates(words)
    single = [is_one_piece(tokenizer, word) for word in words]
    assert any(single) and not all(single)
    for word, candidates, one_piece in zip(words, found, single, strict=True):
        expected = plain_candidates(model, tokenizer, word, allowed, count) if one_piece else []
        assert candidates == expected, word


@TOYS
def test_only_the_masked_token_reaches_the_output_layer(toy: Toy) -> None:
    model, tokenizer = toy()
    seen = []
    decoder = model.get_output_embeddings()
    words = words_of(*SENTENCES)
    source = MaskedLMSource(model, tokenizer, num_candidates=3)
    handle = decoder.register_forward_hook(lambda _, args, out: seen.append(out.shape[:2]))
    expected = source.candidates(words)
    handle.remove()
    assert seen and {shape[1] for shape in seen} == {1}

    model.get_output_embeddings = lambda: None  # type: ignore[method-assign]
    assert MaskedLMSource(model, tokenizer, num_candidates=3).candidates(words) == expected


@TOYS
def test_candidates_do_not_depend_on_the_batch(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = toy()
    # Pieces that differ by less than rounding, which here is as large as a big network's.
    decoder = model.get_output_embeddings()
    ids = list(allowed_pieces(tokenizer))
    with torch.no_grad():
        decoder.weight[ids] = decoder.weight[ids[0]] * (1 + 1e-7 * torch.randn(len(ids), 1))
    forward = model.forward

    def noisy(**inputs: Any) -> Any:
        output = forward(**inputs)
        if len(inputs["input_ids"]) > 1:
            output.logits = output.logits * (1 + 1e-6 * torch.randn_like(output.logits))
        return output

    monkeypatch.setattr(model, "forward", noisy)
    words = words_of(*SENTENCES)
    answers = []
    for batch_tokens in (1, 40, 90, 10**6):
        source = MaskedLMSource(model, tokenizer, num_candidates=4, batch_tokens=batch_tokens)
        answers.append([sorted(found) for found in source.candidates(words)])
        assert [sorted(f) for f in source.candidates(words[::-1])[::-1]] == answers[0]
    assert answers == [answers[0]] * 4


@TOYS
def test_equal_scores_are_ranked_by_token_id(toy: Toy) -> None:
    model, tokenizer = toy()
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    (found,) = MaskedLMSource(model, tokenizer, num_candidates=4).candidates(words_of("the plot"))
    expected = [word for word in allowed_pieces(tokenizer).values() if word != "plot"]
    assert found == expected[:4]


def test_unknown_words_and_pieces_have_none() -> None:
    source = MaskedLMSource(*bert())
    assert source.candidates(words_of("unknown films filming")) == [[], [], []]
    assert source.candidates([]) == []


def test_what_is_no_word_by_itself_is_no_candidate() -> None:
    model, tokenizer = bert()
    (found,) = MaskedLMSource(model, tokenizer, num_candidates=99).candidates(words_of("Film"))
    assert sorted(found) == sorted({*WORDS, "café"} - {"film"})


@pytest.mark.parametrize("toy", [bert, roberta])
def test_long_sentences_stand_once(toy: Toy) -> None:
    model, tokenizer = toy()
    source = MaskedLMSource(model, tokenizer, num_candidates=3)
    text = " ".join([".", *["film", "good"] * 16])  # 33 tokens: twice they need 69 positions
    words = words_of(text)
    assert all(source.candidates(words))
    inputs = tokenizer(text, return_tensors="pt")
    inputs["input_ids"][0, 2] = tokenizer.mask_token_id
    with torch.no_grad():
        scores = model(**inputs).logits[0, 2]
    best = max(
        (id_ for id_, word in allowed_pieces(tokenizer).items() if word != "film"),
        key=lambda id_: float(scores[id_]),
    )
    assert source.candidates(words)[0][0] == allowed_pieces(tokenizer)[best]

    longer = words_of(". " + "film " * 80)  # 64 positions, 2 of them for special tokens
    assert [bool(found) for found in source.candidates(longer)] == [True] * 61 + [False] * 19


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_elastic_model_and_its_subnets(name: str, tmp_path: Path) -> None:
    model, tokenizer = {"bert": bert, "roberta": roberta}[name]()
    model.save_pretrained(tmp_path)
    elastic = DynaBertForMaskedLM.from_pretrained(tmp_path)
    words = words_of(*SENTENCES)
    full = MaskedLMSource(elastic, tokenizer, num_candidates=5)
    assert full.candidates(words) == MaskedLMSource(model, tokenizer, num_candidates=5).candidates(
        words
    )

    half = SubnetConfig(width_mult=0.5, depth_mult=0.5)
    source = MaskedLMSource(elastic, tokenizer, subnet=half, num_candidates=5)
    view = MaskedLMSource(elastic.with_subnet(half), tokenizer, num_candidates=5)
    assert source.candidates(words) == view.candidates(words) != full.candidates(words)
    assert source.identity == view.identity != full.identity
    assert source.identity["subnet"] == repr(elastic.subnet_shape(half))
    assert full.identity["subnet"] is None
    with pytest.raises(TypeError, match=r"subnet=w0.5-d0.5 of a \w+ForMaskedLM, expected a Dyna"):
        MaskedLMSource(model, tokenizer, subnet=half)


def test_model_is_left_as_it_was() -> None:
    model, tokenizer = bert()
    model.train()
    MaskedLMSource(model, tokenizer).candidates(words_of(*SENTENCES))
    assert model.training and not model.get_output_embeddings()._forward_pre_hooks


def test_reduced_precision_is_part_of_the_identity() -> None:
    model, tokenizer = bert()
    words = words_of(*SENTENCES)
    for batch_tokens in (1, 64):
        source = MaskedLMSource(
            model,
            tokenizer,
            batch_tokens=batch_tokens,
            num_candidates=2,
            autocast_dtype=torch.bfloat16,
        )
        assert source.identity["autocast"] == "bfloat16"
        assert source.identity["batch_tokens"] == batch_tokens
        assert {len(found) for found in source.candidates(words)} == {0, 2}
    assert "batch_tokens" not in MaskedLMSource(model, tokenizer, batch_tokens=7).identity


def test_identity_is_that_of_weights_and_tokeniser() -> None:
    model, tokenizer = bert()
    first = MaskedLMSource(model, tokenizer, name="toy")
    before = first.identity
    first.candidates(words_of(*SENTENCES))
    tokenizer(["film"], padding="max_length", max_length=9, truncation=True)
    assert MaskedLMSource(model, tokenizer, name="toy").identity == before
    with torch.no_grad():
        model.get_output_embeddings().bias[0] += 1
    assert MaskedLMSource(model, tokenizer, name="toy").identity != before


def test_scores_that_are_no_numbers_are_refused() -> None:
    model, tokenizer = bert()
    with torch.no_grad():
        model.get_output_embeddings().bias[0] = torch.nan
    source = MaskedLMSource(model, tokenizer, name="toy")
    with pytest.raises(FloatingPointError, match="MaskedLMSource: toy gives scores that are no"):
        source.candidates(words_of("good"))


def test_models_that_cannot_be_asked_are_refused(tmp_path: Path) -> None:
    model, tokenizer = bert()
    with pytest.raises(ValueError, match="batch_tokens=0, expected at least 1"):
        MaskedLMSource(model, tokenizer, batch_tokens=0)
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match="has no mask token, expected a fast tokeniser"):
        MaskedLMSource(model, tokenizer)
    model, tokenizer = bert()
    model.bert.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no cls\.predictions.*, expected a masked language"):
        load_masked_lm(str(tmp_path))


def test_loaded_model_answers_as_the_saved_one(tmp_path: Path) -> None:
    model, tokenizer = bert()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    words = words_of(*SENTENCES)
    source = MaskedLMSource(*load_masked_lm(str(tmp_path)))
    assert source.identity["model"] == str(tmp_path)
    assert source.candidates(words) == MaskedLMSource(model, tokenizer).candidates(words)


def write_vectors(path: Path, vectors: dict[str, Any], header: str = "") -> Path:
    lines = [f"{word} {' '.join(map(str, vector))}\n" for word, vector in vectors.items()]
    path.write_text(header + "".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def vectors() -> dict[str, Any]:
    generator = np.random.default_rng(0)
    words = ["film", "movie", "Paris", "paris", "10", ",", "good", "great", "café", "well-known"]
    return {word: generator.standard_normal(7).round(3) for word in words}


@pytest.mark.parametrize("header", ["", "10 7\n"], ids=["glove", "word2vec"])
def test_word_vectors_give_the_nearest_words(
    header: str, vectors: dict[str, Any], tmp_path: Path
) -> None:
    source = WordVectorSource(write_vectors(tmp_path / "v.txt", vectors, header), num_candidates=3)
    words = words_of("Film, café Paris PARIS unknown film!")
    found = source.candidates(words)
    letters = [word for word in vectors if word.isalpha()]
    for word, name in zip(words, ["film", "café", "Paris", "paris", None, "film"], strict=True):
        if name is None:
            expected = []
        else:
            cosine = {
                other: float(
                    vectors[name]
                    @ vectors[other]
                    / np.linalg.norm(vectors[name])
                    / np.linalg.norm(vectors[other])
                )
                for other in letters
                if other != name
            }
            expected = sorted(cosine, key=lambda other: -cosine[other])[:3]
        assert found[words.index(word)] == expected


def test_word_vectors_answer_alike_one_at_a_time(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    letters = "abcdefghij"
    names = [a + b + c for a in letters for b in letters for c in letters]
    table = {name: generator.standard_normal(5).round(2) for name in names}
    table |= {name: table["abc"] for name in ("xa", "xb", "xc")}  # exact ties
    source = WordVectorSource(write_vectors(tmp_path / "v.txt", table), num_candidates=2)
    words = [Word(name, 0, len(name)) for name in table]
    together = source.candidates(words)
    assert together[-1] == ["abc", "xa"]
    assert [source.candidates([word])[0] for word in words[::7]] == together[::7]


def test_word_vectors_read_the_first_rows_only(vectors: dict[str, Any], tmp_path: Path) -> None:
    path = write_vectors(tmp_path / "v.txt", vectors)
    words = words_of("film movie good")
    source = WordVectorSource(path, max_rows=2)
    assert source.candidates(words) == [["movie"], ["film"], []]
    path.write_text(path.read_text() + "broken line\n")
    assert WordVectorSource(path, max_rows=2).identity == source.identity
    assert WordVectorSource(path, max_rows=3).identity != source.identity


def test_words_with_spaces_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "v.txt"
    path.write_text("film 1 2 3\n. . . 1 2 2\nmovie 1 2 4\n")
    assert WordVectorSource(path).candidates(words_of("film")) == [["movie"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("film 1 2\nmovie 1\n", r"v.txt line 2: 2 fields, expected a word and 2 numbers or"),
        ("film 1 2\nmovie 1 x\n", r"v.txt line 2: could not convert .*x"),
        ("film 1 2\nmovie 1 nan\n", r"v.txt line 2: a number that is not finite"),
        ("film 1 2\n\nmovie 1 2\n", r"v.txt line 2: 0 fields, expected a word and 2 numbers"),
        ("film\n", r"v.txt line 1: 1 fields, expected a word and 1 numbers or"),
        ("10 1 2\n", r"v.txt has no word of letters only"),
        ("", r"v.txt has no word of letters only"),
    ],
)
def test_bad_word_vectors_are_refused_by_line(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "v.txt").write_text(content)
    with pytest.raises(ValueError, match=message):
        WordVectorSource(tmp_path / "v.txt")


def test_missing_word_vectors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"WordVectorSource: path=.*none.txt, expected an"):
        WordVectorSource(tmp_path / "none.txt")
    with pytest.raises(ValueError, match=r"line 1: .*utf-8"):
        (tmp_path / "latin.txt").write_bytes(b"caf\xe9 1 2\n")
        WordVectorSource(tmp_path / "latin.txt")


class StandInWordNet:
    """Some synsets, found also by the inflected form of a word, as in WordNet itself."""

    synsets_of = {  # noqa: RUF012
        "film": [["film", "movie", "motion_picture"], ["film", "Cinema", "movie"]],
        "films": [["film", "movie", "motion_picture"]],
    }

    def get_version(self) -> str:
        return "3.0"

    def synsets(self, form: str) -> list[Any]:
        return [
            SimpleNamespace(lemma_names=lambda names=names: names)
            for names in self.synsets_of.get(form, ())
        ]


def install(monkeypatch: pytest.MonkeyPatch, wordnet: Any) -> None:
    nltk, corpus = ModuleType("nltk"), ModuleType("nltk.corpus")
    corpus.wordnet = wordnet  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nltk", nltk)
    monkeypatch.setitem(sys.modules, "nltk.corpus", corpus)


def test_wordnet_gives_synonyms_of_base_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, StandInWordNet())
    source = WordNetSource()
    assert source.candidates(words_of("Film films nice")) == [["movie", "Cinema"], [], []]
    assert WordNetSource(num_candidates=1).candidates(words_of("film")) == [["movie"]]
    assert source.identity["version"] == "3.0"


def test_wordnet_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoData:
        def get_version(self) -> str:
            raise LookupError("Resource wordnet not found")

    message = "nltk with its WordNet data is not installed.* Run pip install nltk, then python -m"
    install(monkeypatch, NoData())
    with pytest.raises(ModuleNotFoundError, match=message):
        WordNetSource()
    monkeypatch.setitem(sys.modules, "nltk.corpus", None)
    with pytest.raises(ModuleNotFoundError, match=message):
        WordNetSource()


def test_first_answer_asks_on_only_for_what_is_open() -> None:
    first = Fixed({"film": ["movie"]})
    second = Fixed({"film": ["picture"], "good": ["fine"]})
    source = FirstAnswer([first, second])
    words = words_of("good film unknown")
    assert source.candidates(words) == [["fine"], ["movie"], []]
    assert source.candidates(words[1:2]) == [["movie"]] and second.num_calls == 1
    assert source.identity["sources"] == [first.identity, second.identity]
    with pytest.raises(ValueError, match="FirstAnswer: sources="):
        FirstAnswer([])


def test_masked_language_model_for_single_pieces_and_vectors_for_others(tmp_path: Path) -> None:
    model, tokenizer = bert()
    path = write_vectors(tmp_path / "v.txt", {"films": [1, 0], "movies": [1, 0.1], "film": [0, 1]})
    masked_lm = MaskedLMSource(model, tokenizer, num_candidates=2)
    source = FirstAnswer([masked_lm, WordVectorSource(path, num_candidates=1)])
    words = words_of("film films unknown")
    assert source.candidates(words) == [masked_lm.candidates(words)[0], ["movies"], []]
