"""The CPU harness around its peers: cases, inputs, the worker protocol, checks before timing."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import bench_model, cpu_ceilings, peers
from benchmarks.bench_model import Bench, Plan, relative_error
from benchmarks.cases import CASES, SHAPES, chosen_cases
from benchmarks.geometry import TINY, Subnet
from benchmarks.peer_models import bert_with_weights, extract, random_bert
from benchmarks.peer_worker import serve
from benchmarks.peers import CHECKOUT, PEERS, Peer, PeerError, Worker, worker_command
from benchmarks.plain_bert import load_plain, save_state
from benchmarks.records import Recorder, read_rows
from benchmarks.runtimes import Job, Session
from benchmarks.runtimes.ours import dense_shape, extracted_model, full_model
from dynabert import SubnetConfig

CASE = CASES["tiny/3x8/w0.5-d0.5"]
# A worker whose peer adds a number to the truth: the name of its variant.
FAKE_WORKER = """
import os, sys
from pathlib import Path
import numpy as np
from benchmarks.peer_worker import serve
from benchmarks.runtimes import Session

def load(job):
    if job.variant == "broken":
        raise RuntimeError("no kernels here")
    if job.variant == "dying":
        print("out of memory", file=sys.stderr, flush=True)
        os._exit(3)
    subnet = Path(job.subnet_weights).stem
    truth = np.load(Path(job.inputs).with_name(Path(job.inputs).stem + f"-{subnet}.npy"))
    off = np.float32(job.variant or 0)
    return Session(lambda: None, lambda: truth + off, {"fake": True})

serve(sys.stdin, sys.stdout, load)
"""


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny model's weights and truth are written once."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture
def bench(work_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A bench whose peers are fakes: what variant they have decides what they do."""
    monkeypatch.setattr(bench_model, "_WARM_S", 0.0)
    monkeypatch.setattr(
        bench_model, "worker_command", lambda peer, python: [sys.executable, "-c", FAKE_WORKER]
    )
    plan = Plan(1, 2, 0.002, "reference", None, work_dir)
    recorder = Recorder(tmp_path, {"hardware": "test"}, "abc", "cpu_latency.jsonl")
    return Bench(plan, recorder, {"fp32": 1e12, "memory": 1e10})


def fake_peer(name: str, variant: str = "") -> Peer:
    return Peer(name, "fake", ("float32",), variant=variant)


def ask(*requests: dict[str, Any], load: Any) -> list[dict[str, Any]]:
    """Answers of a worker in this process."""
    answers = io.StringIO()
    serve(io.StringIO("".join(json.dumps(r) + "\n" for r in requests)), answers, load)
    return [json.loads(line) for line in answers.getvalue().splitlines()]


def job(tmp_path: Path) -> dict[str, Any]:
    paths = dict.fromkeys(("full_weights", "subnet_weights", "inputs"), str(tmp_path / "x"))
    return Job("fake", "", "float32", 1, "tiny", 1.0, 1.0, **paths).to_dict()


def test_case_names_say_what_runs() -> None:
    assert CASE.subnet == Subnet(TINY, 0.5, 0.5)
    assert CASE.shape is SHAPES["3x8"]
    assert all(case.name == name for name, case in CASES.items())


def test_chosen_cases_keep_the_tables_order() -> None:
    chosen = chosen_cases(("minilm/1x16/*", "bert-base/1x128/w0.5-d1"))
    assert [case.name for case in chosen] == [
        "bert-base/1x128/w0.5-d1",
        "minilm/1x16/w1-d1",
        "minilm/1x16/w0.5-d1",
        "minilm/1x16/w0.25-d0.5",
    ]


def test_a_pattern_without_a_case_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pattern='gpt/\*', expected to match one of bert-base"):
        chosen_cases(("gpt/*",))


def test_padded_input_has_tokens_where_the_mask_says() -> None:
    shape = SHAPES["3x8"]
    ids, mask = np.array(shape.token_ids(100)), np.array(shape.mask())
    assert ids.shape == mask.shape == (3, 8)
    assert ((ids > 0) == (mask == 1)).all()
    assert mask.sum(axis=1).tolist() == [8, 5, 7]
    assert shape.is_padded and not SHAPES["1x128"].is_padded


def test_flops_count_real_tokens_only() -> None:
    padded, tight = (CASES[f"bert-base/8xsst2-{name}/w1-d1"] for name in ("pad128", "longest"))
    assert padded.flops == tight.flops


@pytest.mark.parametrize("pair", [(1.0, 1.0), (0.5, 0.5), (0.25, 1.0)])
@pytest.mark.parametrize("spelt_out", [False, True])
def test_plain_encoder_equals_the_sliced_hugging_face_model(
    pair: tuple[float, float], spelt_out: bool, tmp_path: Path
) -> None:
    small = extract(random_bert(TINY, "cpu"), Subnet(TINY, *pair))
    save_state(small.state_dict(), TINY.head_dim, tmp_path / "w.safetensors")
    plain = load_plain(tmp_path / "w.safetensors")
    if spelt_out:
        plain.spell_out_attention()
    shape = SHAPES["3x8"]
    ids, mask = (torch.tensor(rows) for rows in (shape.token_ids(100), shape.mask()))
    real = mask.bool()
    with torch.no_grad():
        expected = small(ids, attention_mask=mask).last_hidden_state[real]
        torch.testing.assert_close(plain(ids, mask)[real], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(plain(ids), small(ids).last_hidden_state, rtol=1e-5, atol=1e-5)


def test_our_models_equal_the_sliced_hugging_face_model(tmp_path: Path) -> None:
    bert = random_bert(TINY, "cpu")
    save_state(bert.state_dict(), TINY.head_dim, tmp_path / "w.safetensors")
    again = bert_with_weights(TINY, bert.state_dict())
    ids = torch.tensor(SHAPES["3x8"].token_ids(100))
    subnet = SubnetConfig(0.5, 0.5)
    model = full_model(TINY, tmp_path / "w.safetensors")
    small = extracted_model(model, subnet)
    with torch.no_grad():
        expected = extract(again, Subnet(TINY, 0.5, 0.5))(ids).last_hidden_state
        whole = model(input_ids=ids, subnet=subnet).last_hidden_state
        dense = small(
            input_ids=ids, subnet=dense_shape(model.subnet_shape(subnet))
        ).last_hidden_state
    torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dense, expected, rtol=1e-5, atol=1e-5)
    assert len(small.encoder.layer) == 2 and len(model.encoder.layer) == 4
    assert small.encoder.layer[0].attention.qkv_weight.shape[0] == 2
    assert small.encoder.layer[0].ffn.up_weight.shape[0] == 64
    assert model.encoder.layer[0].ffn.up_weight.shape[0] == 128


def test_worker_prepares_warms_and_samples(tmp_path: Path) -> None:
    calls: list[int] = []
    session = Session(lambda: calls.append(1), lambda: np.ones((1, 2, 3), np.float32), {"v": "1"})
    output = tmp_path / "out.npy"
    answers = ask(
        {"do": "prepare", "job": job(tmp_path), "output": str(output)},
        {"do": "warm", "seconds": 0},
        {"do": "round", "seconds": 0, "settle": 2},
        {"do": "stop"},
        {"do": "warm", "seconds": 0},
        load=lambda _: session,
    )
    assert answers[:2] == [{"notes": {"v": "1"}}, {"calls": 1}]
    assert len(answers) == 3 and len(answers[2]["samples_ms"]) == 3
    assert len(calls) == 1 + 2 + 3  # settling calls are not samples
    assert np.load(output).shape == (1, 2, 3)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"do": "round", "seconds": 0, "settle": 0}, "expected 'prepare' first"),
        ({"do": "prepare", "job": {"surprise": 1}, "output": "x"}, "TypeError"),
    ],
)
def test_worker_ends_with_the_reason(request_: dict[str, Any], message: str) -> None:
    answers = ask(request_, {"do": "warm", "seconds": 0}, load=lambda _: None)
    assert len(answers) == 1 and message in answers[0]["error"]


def test_worker_refuses_an_unknown_request(tmp_path: Path) -> None:
    session = Session(lambda: None, lambda: np.zeros(1, np.float32))
    prepare = {"do": "prepare", "job": job(tmp_path), "output": str(tmp_path / "o.npy")}
    answers = ask(prepare, {"do": "dance"}, load=lambda _: session)
    assert "do='dance', expected prepare, warm" in answers[1]["error"]


def test_group_holds_a_timed_row_and_the_reasons_of_the_others(bench: Bench) -> None:
    rows = bench.run_group(
        CASE,
        "float32",
        [
            fake_peer("ours"),
            fake_peer("openvino", "0.5"),
            fake_peer("onnxruntime", "broken"),
            fake_peer("ctranslate2", "dying"),
        ],
    )
    by_peer = {row["peer"]: row for row in rows}
    ours = by_peer["ours"]
    assert ours["n"] >= 6 and ours["rel_err"] == 0 and ours["notes"] == {"fake": True}
    seconds = ours["median_ms"] / 1e3
    assert ours["share_of_peak"] == pytest.approx(CASE.flops / seconds / 1e12)
    assert ours["backend"] == "reference" and "backend" not in by_peer["openvino"]
    assert "It is not timed" in by_peer["openvino"]["error"]
    assert by_peer["onnxruntime"]["error"] == "RuntimeError: no kernels here"
    assert by_peer["ctranslate2"]["error"] == "the worker ended with code 3: out of memory"
    assert not any("median_ms" in by_peer[name] for name in by_peer if name != "ours")
    assert len({row["group"] for row in rows}) == 1
    assert read_rows(bench.recorder.path) == rows


def test_a_recorded_group_is_not_run_again(bench: Bench) -> None:
    pair = [PEERS["ours"], PEERS["openvino"]]
    assert not bench.is_recorded(CASE, "float32", pair)
    bench.run_group(CASE, "float32", [fake_peer("ours"), fake_peer("openvino")])
    assert bench.is_recorded(CASE, "float32", pair)
    assert bench.is_recorded(CASE, "float32", pair[:1])
    assert not bench.is_recorded(CASE, "float32", [*pair, PEERS["torch_eager"]])
    assert not bench.is_recorded(CASE, "bfloat16", pair)
    bench.recorder.commit = "another"
    assert not bench.is_recorded(CASE, "float32", pair)


def test_relative_error_ignores_padding() -> None:
    truth = np.ones((2, 3, 4), np.float32)
    output = truth.copy()
    output[1, 2] = np.nan
    assert relative_error(output, truth, [[1, 1, 1], [1, 1, 0]]) == 0
    output[0, 0] = 2
    assert relative_error(output, truth, [[1, 1, 1], [1, 1, 0]]) == pytest.approx(5**-0.5)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (np.ones((1, 2, 4), np.float32), "output has shape"),
        (np.full((1, 2, 3), np.inf, np.float32), "NaN or infinity"),
    ],
)
def test_relative_error_refuses_what_is_no_output(output: Any, message: str) -> None:
    with pytest.raises(PeerError, match=message):
        relative_error(output, np.ones((1, 2, 3), np.float32), [[1, 1]])


def test_a_silent_worker_is_ended(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with (
        Worker(command, {}, tmp_path / "log") as worker,
        pytest.raises(PeerError, match=r"no answer within 0\.2 s"),
    ):
        worker.ask({"do": "warm"}, 0.2)


def test_foreign_peer_without_its_environment_is_an_error() -> None:
    with pytest.raises(PeerError, match=r"openvino: python=None, expected .*`make bench-cpu`"):
        worker_command(PEERS["openvino"], None)
    assert worker_command(PEERS["ours"], None)[0] == sys.executable


def test_every_peer_has_its_runtime_file() -> None:
    folder = CHECKOUT / "benchmarks" / "runtimes"
    assert all((folder / f"{peer.runtime}.py").exists() for peer in PEERS.values())
    with pytest.raises(ValueError, match="name='tvm', expected one of ours"):
        peers.chosen_peers(["tvm"])


@pytest.mark.parametrize(("name", "value"), [("threads", 0), ("rounds", 0), ("seconds", 0.0)])
def test_a_plan_that_measures_nothing_is_refused(name: str, value: float) -> None:
    numbers = {"threads": 1, "rounds": 1, "seconds": 1.0, name: value}
    with pytest.raises(ValueError, match=f"bench_model: {name}={value}"):
        Plan(**numbers, backend="", peers_python=None, work_dir=Path()).check()


def test_ceiling_without_an_extension_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from dynabert_kernels import _extension

    monkeypatch.setattr(_extension, "cpu_extension", lambda: object())
    found = cpu_ceilings.measure_here("fp32", 1, 0.01)
    assert found == {"kind": "fp32", "error": "the extension has no measure_peak. Rebuild it"}
