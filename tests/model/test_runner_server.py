"""The example server: what its worker does with a batch, and, slow, all of it under load."""

from __future__ import annotations

import argparse
import importlib.util
import json
import queue
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from dynabert import DynaBertConfig, DynaBertForSequenceClassification, SubnetConfig
from dynabert.data.examples import TaskSpec
from dynabert.evaluation import GridRow
from dynabert.report import build_report

CHECKOUT = Path(__file__).resolve().parents[2]
SPEC = TaskSpec("toy", "classification", ("text",), ("no", "yes"), ("accuracy",), "accuracy")
FULL, NARROW = SubnetConfig(), SubnetConfig(0.25)


@pytest.fixture(scope="module")
def server() -> ModuleType:
    pytest.importorskip("litserve", reason="litserve is not installed (the extra serve)")
    path = CHECKOUT / "docs" / "examples" / "elastic_server.py"
    spec = importlib.util.spec_from_file_location("elastic_server", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path: Path, byte_level_tokenizer: PreTrainedTokenizerBase) -> Path:
    """A random model as `dynabert train` leaves one, with its tokenizer and scores."""
    config = DynaBertConfig(
        architecture="roberta",
        vocab_size=len(byte_level_tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=130,
        initializer_range=0.5,
        id2label={0: "no", 1: "yes"},
        label2id={"no": 0, "yes": 1},
    )
    model = DynaBertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "model")
    byte_level_tokenizer.save_pretrained(tmp_path / "model")
    rows = [GridRow(FULL, {"accuracy": 0.9}, 0.9, 10), GridRow(NARROW, {"accuracy": 0.8}, 0.8, 10)]
    build_report(model, rows, SPEC).save(tmp_path / "grid.json")
    return tmp_path


def options(run: Path, **changes: Any) -> argparse.Namespace:
    values = {
        "run": run,
        "deadline_ms": 1e4,
        "reserve_ms": 5.0,
        "percentile": 99.0,
        "fixed": False,
        "max_batch_size": 3,
        "max_length": 32,
        "threads": 1,
    }
    return argparse.Namespace(**{**values, **changes})


def test_a_batch_is_answered_by_request(
    server: ModuleType, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = server.Classifier(options(run), {})
    monkeypatch.setattr(api, "_publish_counters", lambda: None)
    api.setup("cpu")
    api.device = "cpu"
    waiting: queue.Queue[Any] = queue.Queue()
    texts = [["great", "awful film"], ["a"], ["so", "it", "goes"], ["the end"]]
    for number, each in enumerate(texts):
        request = server.Texts(texts=each, deadline_ms=None if number else 1e5)
        waiting.put((0, f"uid{number}", 50.0 + number, request))

    batch, timed_out = server.WatchedQueue().get_batch_requests(api, waiting, None)
    assert [uid for _, uid, _ in batch] == ["uid0", "uid1", "uid2"]
    assert timed_out == []
    assert (api.arrived_at, api.num_waiting) == ([50.0, 51.0, 52.0], 1)

    asked: dict[str, Any] = {}
    runner = api.runner

    def watched(**arguments: Any) -> Any:
        asked.update(arguments)
        return runner(**{**arguments, "submitted_at": None})

    monkeypatch.setattr(api, "runner", watched)
    answers = api.predict([request for _, _, request in batch])
    # The second came 1 s after the first and has 10 s, the first itself 100.
    assert asked["submitted_at"] == 50.0
    assert asked["deadline_ms"] == pytest.approx(11_000 - 5)
    assert asked["waiting"] == pytest.approx(1 / 3)

    assert [len(answer["predictions"]) for answer in answers] == [2, 1, 3]
    assert {answer["subnet"] for answer in answers} == {FULL.name}
    found = [prediction for answer in answers for prediction in answer["predictions"]]
    model = DynaBertForSequenceClassification.from_pretrained(run / "model").eval()
    for text, prediction in zip([t for each in texts[:3] for t in each], found, strict=True):
        with torch.no_grad():
            logits = model(**api.tokenizer(text, return_tensors="pt")).logits[0]
        assert prediction["class"] == int(logits.argmax())
        assert prediction["label"] == ["no", "yes"][prediction["class"]]
        assert prediction["score"] == pytest.approx(float(logits.softmax(-1).max()), abs=1e-4)
    assert len({prediction["score"] for prediction in found}) == 6  # each text has its own


def test_a_fixed_server_has_the_full_network_only(
    server: ModuleType, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = server.Classifier(options(run, fixed=True), {})
    monkeypatch.setattr(api, "_publish_counters", lambda: None)
    api.setup("cpu")
    assert api.runner.candidates == (FULL,)


@pytest.mark.slow
def test_the_load_test_runs_from_end_to_end(run: Path, tmp_path: Path) -> None:
    """On a model that takes no time: it shows nothing of latency, but every answer arrives."""
    pytest.importorskip("litserve", reason="litserve is not installed (the extra serve)")
    data, out = tmp_path / "dev.tsv", tmp_path / "rows.jsonl"
    data.write_text("sentence\tlabel\n" + "".join(f"film {n}\t{n % 2}\n" for n in range(40)))
    command = [sys.executable, "-m", "benchmarks.load_test", "--run", str(run)]
    command += ["--data", str(data), "--out", str(out), "--burst-seconds", "2"]
    command += ["--calm-seconds", "2", "--calibration-seconds", "2", "--warmup-seconds", "0.5"]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=500)
    assert "requests/s" in done.stdout, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["peer"], row["case"]) for row in rows] == [
        ("fixed", "one at a time"),
        ("fixed", "one at a time"),
        ("fixed", "capacity"),
        *[("fixed", case) for case in ("calm before", "burst", "calm after")],
        *[("elastic", case) for case in ("calm before", "burst", "calm after")],
    ]
    fixed, elastic = rows[4], rows[7]
    assert fixed["n"] == elastic["n"] > 20
    assert elastic["accuracy_cost"] == pytest.approx(fixed["accuracy"] - elastic["accuracy"])
    assert fixed["subnets"] == {FULL.name: 1.0}
