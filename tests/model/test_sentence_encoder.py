"""A DynaBERT encoder inside sentence-transformers: the right subnet, whoever names it and when."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import BertTokenizer, DistilBertConfig, DistilBertModel

from dynabert import DynaBertModel, ForEach, SubnetConfig
from dynabert.sentence_encoder import load_sentence_transformer

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None,
    reason='sentence-transformers is not installed: pip install "dynabert-kernels[sbert]"',
)

Array = npt.NDArray[np.float32]

WORDS = ("the", "a", "cat", "dog", "ran", "sat", "on", "mat", "far", "away")
# Lengths all differ, and not in order: `encode` sorts.
TEXTS = ["a dog", "the cat sat on the mat", "ran", "the dog ran far far away on a mat", "a cat sat"]
HALF, SMALL = SubnetConfig(0.5), SubnetConfig(0.25, 0.5)
SUBNETS = (SubnetConfig(), HALF, SubnetConfig(1.0, 2 / 3), SMALL)


@pytest.fixture
def bert_dir(make_hf: Any, tmp_path: Path) -> Path:
    """A folder with a small random BERT and its tokeniser, as the hub has them."""
    folder = tmp_path / "bert"
    make_hf("bert", "Model").save_pretrained(folder)
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    vocab = {word: place for place, word in enumerate((*special, *WORDS))}
    BertTokenizer(vocab=vocab, model_max_length=32).save_pretrained(folder)
    return folder


@pytest.fixture
def elastic_dir(bert_dir: Path, tmp_path: Path) -> Path:
    """The same network as training leaves it: a DynaBERT encoder without pooler."""
    folder = tmp_path / "elastic"
    DynaBertModel.from_pretrained(bert_dir, add_pooling_layer=False).save_pretrained(folder)
    BertTokenizer.from_pretrained(bert_dir).save_pretrained(folder)
    return folder


Load = Callable[..., Any]


@pytest.fixture
def load() -> Load:
    """`load_sentence_transformer` on the CPU, looking nothing up."""

    def local(path: Path, **kwargs: Any) -> Any:
        return load_sentence_transformer(path, device="cpu", local_files_only=True, **kwargs)

    return local


def plain(path: Path) -> Any:
    """What a program that knows nothing of this package loads."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(path), device="cpu", local_files_only=True)


def by_hand(path: Path, subnet: SubnetConfig | None, texts: list[str], first: bool) -> Array:
    """Embeddings by model and tokeniser alone, one text at a time: no batch, no padding."""
    model = DynaBertModel.from_pretrained(path).eval()
    tokenizer = BertTokenizer.from_pretrained(path)
    rows = []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            states = model(input_ids=ids, subnet=subnet).last_hidden_state[0].double()
        rows.append((states[0] if first else states.mean(dim=0)).numpy())
    return np.stack(rows)


def assert_close(found: Array, expected: Array) -> None:
    np.testing.assert_allclose(found, expected, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_embeddings_are_the_pooled_states_of_the_subnet(
    bert_dir: Path, load: Load, pooling: str
) -> None:
    model = load(bert_dir, pooling=pooling)
    for subnet in (None, HALF, SMALL):
        found = model.encode(TEXTS, batch_size=3, subnet=subnet)
        assert_close(found, by_hand(bert_dir, subnet, TEXTS, first=pooling == "cls"))
    found = model.encode_query(TEXTS, prompt="the ", subnet=HALF)
    prompted = [f"the {text}" for text in TEXTS]
    assert_close(found, by_hand(bert_dir, HALF, prompted, first=pooling == "cls"))


def test_full_width_is_the_model_that_was_converted(bert_dir: Path, load: Load) -> None:
    assert_close(load(bert_dir).encode(TEXTS), plain(bert_dir).encode(TEXTS))


def test_roberta_is_cut_to_the_positions_it_has(
    make_hf: Any, byte_level_tokenizer: Any, load: Load, tmp_path: Path
) -> None:
    make_hf("roberta", "Model", vocab_size=300).save_pretrained(tmp_path)
    byte_level_tokenizer.save_pretrained(tmp_path)
    peer = plain(tmp_path)
    peer.max_seq_length = 38  # of 40 position embeddings
    texts = ["A sentence. " * 20, "awful"]
    assert_close(load(tmp_path).encode(texts), peer.encode(texts))


def test_subnet_chosen_at_loading_equals_one_chosen_per_call(elastic_dir: Path, load: Load) -> None:
    full, narrow = load(elastic_dir), load(elastic_dir, subnet=SMALL)
    at_small, at_full = full.encode(TEXTS, subnet=SMALL), full.encode(TEXTS)
    np.testing.assert_array_equal(narrow.encode(TEXTS), at_small)
    np.testing.assert_array_equal(narrow.encode(TEXTS, subnet=SubnetConfig()), at_full)
    assert np.abs(at_small - at_full).max() > 0.1


def test_threads_that_share_a_model_get_the_subnet_they_name(elastic_dir: Path, load: Load) -> None:
    model = load(elastic_dir)
    expected = [model.encode(TEXTS, subnet=subnet) for subnet in SUBNETS]

    def work(number: int) -> int:
        found = (model.encode(TEXTS, subnet=SUBNETS[number]) for _ in range(15))
        return sum(not np.array_equal(embeddings, expected[number]) for embeddings in found)

    with ThreadPoolExecutor(len(SUBNETS)) as pool:
        assert list(pool.map(work, range(len(SUBNETS)))) == [0] * len(SUBNETS)
    assert len({embeddings.tobytes() for embeddings in expected}) == len(SUBNETS)


def test_saved_model_loads_without_this_module_and_keeps_all_modules(
    bert_dir: Path, load: Load, tmp_path: Path
) -> None:
    from sentence_transformers.base.modules.normalize import Normalize

    source = plain(bert_dir)
    source.append(Normalize())
    source.max_seq_length = 7
    source.prompts["query"] = "the "
    source.save_pretrained(str(tmp_path / "source"), create_model_card=False)

    model = load(tmp_path / "source", subnet=HALF)
    model.save_pretrained(str(tmp_path / "saved"), create_model_card=False)
    modules = json.loads((tmp_path / "saved" / "modules.json").read_text())
    assert [entry["type"].split(".")[0] for entry in modules] == ["sentence_transformers"] * 3

    again = plain(tmp_path / "saved")
    assert isinstance(again[0].auto_model, DynaBertModel)
    assert again[0].auto_model.pooler is None
    assert again.max_seq_length == 7
    np.testing.assert_array_equal(again.encode(TEXTS, subnet=HALF), model.encode(TEXTS))
    found = again.encode_query(TEXTS)  # the whole network was saved
    assert_close(found, source.encode_query(TEXTS))
    assert_close(np.linalg.norm(found, axis=1), np.ones(len(TEXTS)))


def test_run_folder_says_pooling_and_length(elastic_dir: Path, load: Load, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    arguments = {"pooling": "cls", "max_length": 5}
    (run / "run.json").write_text(json.dumps({"schema": 1, "arguments": arguments}))
    with pytest.raises(FileNotFoundError, match="has not finished"):
        load(run)
    elastic_dir.rename(run / "model")
    cut = [" ".join(text.split()[:3]) for text in TEXTS]  # [CLS], three words, [SEP]
    assert_close(
        load(run).encode(TEXTS, subnet=HALF), by_hand(run / "model", HALF, cut, first=True)
    )
    found = load(run, pooling="mean").encode(TEXTS)
    assert_close(found, by_hand(run / "model", None, cut, first=False))


@pytest.mark.parametrize(
    ("subnet", "error", "message"),
    [
        pytest.param([HALF] * 5, TypeError, "encode: subnet is a list, expected one", id="list"),
        pytest.param(ForEach((HALF, SMALL)), TypeError, "subnet is a ForEach", id="for-each"),
        pytest.param("0.5", TypeError, "subnet is a str", id="text"),
        pytest.param(SubnetConfig(0.3), ValueError, "3.6 of 12 heads", id="no-whole-head"),
    ],
)
def test_encode_refuses_what_is_not_one_subnet_of_the_model(
    elastic_dir: Path, load: Load, subnet: Any, error: type[Exception], message: str
) -> None:
    model = load(elastic_dir)
    with pytest.raises(error, match=message):
        model.encode(TEXTS, subnet=subnet)


def test_loading_refuses_with_the_reason(
    elastic_dir: Path, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"3\.6 of 12 heads"):
        load(elastic_dir, subnet=SubnetConfig(0.3))
    with pytest.raises(TypeError, match=r"subnet=0\.5, expected a SubnetConfig"):
        load(elastic_dir, subnet=0.5)
    with pytest.raises(ValueError, match="pooling='max', expected 'mean', 'cls' or None"):
        load(elastic_dir, pooling="max")
    with pytest.raises(ValueError, match="backend='onnx', expected 'torch'"):
        load(elastic_dir, backend="onnx")
    other = tmp_path / "distilbert"
    sizes = {"vocab_size": 15, "dim": 8, "hidden_dim": 8, "n_layers": 1, "n_heads": 1}
    DistilBertModel(DistilBertConfig(**sizes)).save_pretrained(other)
    BertTokenizer.from_pretrained(elastic_dir).save_pretrained(other)
    with pytest.raises(ValueError, match="model_type='distilbert', expected 'bert', 'roberta'"):
        load(other)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r"pip install \"dynabert-kernels\[sbert\]\""):
        load(elastic_dir)


@pytest.mark.slow
def test_worker_processes_get_the_subnet(elastic_dir: Path, load: Load) -> None:
    model = load(elastic_dir, subnet=HALF)
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    try:
        named, default = (
            model.encode(TEXTS, pool=pool, chunk_size=2, **call) for call in ({"subnet": SMALL}, {})
        )
    finally:
        model.stop_multi_process_pool(pool)
    assert_close(named, by_hand(elastic_dir, SMALL, TEXTS, first=False))
    assert_close(default, by_hand(elastic_dir, HALF, TEXTS, first=False))


@pytest.mark.slow
def test_sentence_transformers_trains_the_subnet_chosen_at_loading(
    elastic_dir: Path, load: Load, tmp_path: Path
) -> None:
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss

    model = load(elastic_dir, subnet=HALF)
    model.encode(TEXTS)  # what inference prepares is no tensor of training
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = {"a": TEXTS[:4], "b": TEXTS[1:], "score": [0.1, 0.9, 0.5, 0.2]}
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path / "out"), max_steps=1, learning_rate=0.01, report_to=[], use_cpu=True
    )
    SentenceTransformerTrainer(
        model, arguments, Dataset.from_dict(data), loss=CosineSimilarityLoss(model)
    ).train()
    changed = {
        name: (value != before[name]).flatten(1).any(dim=1)
        for name, value in model.state_dict().items()
        if name.endswith(("up_weight", "qkv_weight"))
    }
    assert len(changed) == 2 * 6
    for name, rows in changed.items():
        half = len(rows) // 2
        assert rows[:half].all(), name
        assert not rows[half:].any(), name
