"""The GPU benchmarks' logic at tiny sizes on the CPU: counts, records, peers, the driver."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import (
    gpu_attention,
    gpu_ceilings,
    gpu_peers,
    gpu_products,
    gpu_targets,
    gpu_training,
    gpu_training_ours,
    peer_models,
    records,
)
from benchmarks.geometry import BASE, DEPTHS, SUBNETS, TINY, WIDTHS, Subnet, short_text_lengths
from benchmarks.gpu_encoder_peers import (
    Batch,
    CompiledLayers,
    CompiledRagged,
    HuggingFaceEager,
)
from benchmarks.gpu_ours import OursEager, OursGraph, our_model
from benchmarks.gpu_product_cases import CASES, MIXED, NORM
from benchmarks.gpu_tables import summarize
from benchmarks.gpu_timing import Variant, measure, relative_error

GRID = [(width, depth) for width in WIDTHS for depth in DEPTHS]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bert():
    return peer_models.random_bert(TINY, "cpu")


@pytest.fixture
def recorder(tmp_path):
    return records.Recorder(tmp_path, {"hardware": "test"}, "abc")


def tiny_batch(lengths: tuple[int, ...] | None = None) -> Batch:
    generator = torch.Generator().manual_seed(3)
    batch_size = 3 if lengths is None else len(lengths)
    return Batch(torch.randint(0, TINY.vocab_size, (batch_size, 7), generator=generator), lengths)


def reference(bert, subnet: Subnet, batch: Batch) -> torch.Tensor:
    """The float32 Hugging Face subnet, ``[B, S, C]``."""
    small = peer_models.extract(bert, subnet)
    return small.encoder(small.embeddings(batch.ids), attention_mask=batch.mask).last_hidden_state


@pytest.mark.parametrize(
    ("width", "depth", "gflop"),
    [(1.0, 1.0, 22.35), (0.75, 0.75, 12.57), (0.5, 0.5, 5.59), (0.25, 0.5, 2.79)],
)
def test_flops_match_the_printed_table(width, depth, gflop):
    assert Subnet(BASE, width, depth).flops(1, 128) / 1e9 == pytest.approx(gflop, abs=0.005)


def test_kept_layers_follow_the_keep_last_rule():
    assert Subnet(BASE, 1.0, 0.75).layers == (0, 1, 3, 4, 5, 7, 8, 9, 11)
    assert Subnet(BASE, 1.0, 0.5).layers == (1, 3, 5, 7, 9, 11)


def test_weight_bytes_equal_the_extracted_matrices(bert):
    for width, depth in GRID:
        subnet = Subnet(TINY, width, depth)
        layers = peer_models.encoder_weights(peer_models.extract(bert, subnet), torch.bfloat16)
        numbers = sum(tensor.numel() for w in layers for tensor in w if tensor.ndim == 2)
        assert subnet.weight_bytes() == 2 * numbers


def test_short_text_lengths_look_like_sst2():
    lengths = short_text_lengths(4096, 128)
    assert 23 < sum(lengths) / len(lengths) < 27
    assert min(lengths) >= 4
    assert max(lengths) <= 128
    assert lengths == short_text_lengths(4096, 128)


def test_the_subnets_are_the_whole_grid_and_the_full_network_comes_first():
    assert sorted(SUBNETS) == sorted(GRID)
    assert SUBNETS[0] == (1.0, 1.0)


def test_record_holds_rates_shares_and_machine(recorder):
    second = records.Timing((1000.0,))
    recorder.add("A ceilings", "gemm", timing=second, flops=8e12, ceiling="bf16")
    row = recorder.add("B gemm", "out", peer="nt", timing=second, flops=2e12, ceiling_of="bf16")
    stored = records.read_rows(recorder.path)[-1]
    assert stored == json.loads(json.dumps(row))
    assert stored["tflops"] == pytest.approx(2.0)
    assert stored["share_of_ceiling"] == pytest.approx(0.25)
    assert (stored["n"], stored["commit"], stored["machine"]) == (1, "abc", {"hardware": "test"})


def test_ceilings_are_shared_with_a_later_process(recorder):
    recorder.add("A", "copy", timing=records.Timing((1.0,)), bytes_moved=4e9, ceiling="copy")
    later = records.Recorder(recorder.path.parent, {"hardware": "test"}, "abc", process="later")
    row = later.add("B", "x", timing=records.Timing((1.0,)), bytes_moved=1e9)
    assert row["share_of_bandwidth"] == pytest.approx(0.25)
    assert row["process"] == "later"
    other = records.Recorder(recorder.path.parent, {"hardware": "other"}, "abc")
    assert other.ceilings == {}


def test_failed_case_is_a_row_without_timing(recorder):
    with recorder.guarded("C attention", "forward", peer="cudnn"):
        raise RuntimeError("no kernel")
    row = recorder.add("C", "x", timing=records.Timing((1.0,)), flops=1.0, error="wrong")
    assert recorder.rows[0]["error"] == "RuntimeError: no kernel"
    assert "median_ms" not in row
    assert "tflops" not in row


def test_line_cut_off_by_a_killed_process_is_skipped(recorder):
    recorder.add("A", "x", notes="kept")
    with recorder.path.open("a") as stream:
        stream.write('{"section": "A", "ca')
    assert [row["notes"] for row in records.read_rows(recorder.path)] == ["kept"]


def test_measure_interleaves_and_divides_by_calls():
    order = []
    variants = {name: Variant(lambda name=name: order.append(name), 2) for name in "ab"}
    timings = measure(variants, "cpu", samples=3, warmup=0)
    assert order == ["a", "b"] * 3
    assert len(timings["a"].samples_ms) == 3


@pytest.mark.parametrize(("width", "depth"), GRID)
def test_extraction_equals_full_model_with_unused_weights_zeroed(bert, width, depth):
    subnet = Subnet(TINY, width, depth)
    hidden = bert.embeddings(tiny_batch().ids)
    expected = hidden
    for index in subnet.layers:
        layer = peer_models.copy.deepcopy(bert.encoder.layer[index])
        layer.attention.output.dense.weight[:, subnet.num_heads * TINY.head_dim :] = 0
        layer.output.dense.weight[:, subnet.intermediate_size :] = 0
        expected = layer(expected)
    output = peer_models.extract(bert, subnet).encoder(hidden).last_hidden_state
    assert len(peer_models.extract(bert, subnet).encoder.layer) == len(subnet.layers)
    assert relative_error(output, expected) < 1e-6


@pytest.mark.parametrize(("width", "depth"), GRID)
@pytest.mark.parametrize("lengths", [None, (7, 2, 5)], ids=["full", "padded"])
def test_dense_peers_and_ours_match_hugging_face(bert, width, depth, lengths):
    subnet, batch = Subnet(TINY, width, depth), tiny_batch(lengths)
    expected = reference(bert, subnet, batch)[batch.real]
    for exact in (
        CompiledLayers(bert, torch.float32, peer_models.dense_layer, "exact"),
        OursEager(our_model(bert, TINY, torch.float32)),
    ):
        output = exact.prepare(subnet, batch)(batch.ids)
        assert relative_error(output[batch.real], expected) < 1e-5
    for peer in (
        HuggingFaceEager(bert, torch.bfloat16),
        CompiledLayers(bert, torch.bfloat16, peer_models.dense_layer, "bf16"),
        OursGraph(our_model(bert, TINY, torch.bfloat16)),
    ):
        output = peer.variant(subnet, batch, batch.ids, "cpu").output
        assert output.dtype == torch.bfloat16
        assert relative_error(output[batch.real], expected) < gpu_peers.TOLERANCE
    assert bert.embeddings.word_embeddings.weight.dtype == torch.float32


@pytest.mark.parametrize("width", WIDTHS)
def test_ragged_peer_matches_masked_hugging_face(bert, width):
    subnet, batch = Subnet(TINY, width, 0.75), tiny_batch((7, 1, 4))
    peer = CompiledRagged(bert, torch.float32, peer_models.ragged_layer)
    output = peer.prepare(subnet, batch)(batch.ids[batch.real])
    assert relative_error(output, reference(bert, subnet, batch)[batch.real]) < 1e-5


def test_wrong_peer_gets_no_timing(recorder):
    with torch.inference_mode():
        bench = gpu_peers.Bench(recorder, "cpu", budget_s=60, smoke=True)
        wrong = CompiledLayers(bench.model, bench.dtype, lambda hidden, *_: -hidden, "wrong")
        bench.compare_large([wrong], bench.subnet(0.5, 1.0), 3)
    rows = [row for row in recorder.rows if row.get("peer") == "wrong"]
    assert len(rows) == 1
    assert "relative error" in rows[0]["error"]


@pytest.mark.parametrize("per_row", [True, False])
def test_fp8_quantization_restores_within_its_precision(per_row):
    x = torch.randn(9, 33) * torch.arange(1, 10)[:, None]
    values, scale = gpu_ceilings.to_fp8(x, per_row=per_row)
    # e4m3 keeps 3 bits after the leading one: half a step is 1/16 of the value.
    restored = values.float() * scale
    small = x.abs().amax() * 2**-14
    assert bool(((restored - x).abs() <= x.abs() / 16 + small).all())


@pytest.mark.parametrize("width", WIDTHS)
def test_training_slices_match_extracted_model(width):
    assert gpu_training.Trainer("cpu", smoke=True).slicing_error(width) < 1e-5


@pytest.mark.parametrize("stage", ["width_stage", "depth_stage"])
def test_our_training_step_has_the_losses_and_gradients_of_the_loop(stage):
    trainer = gpu_training.Trainer("cpu", smoke=True)
    ours = gpu_training_ours.OurTrainer(trainer)
    errors = gpu_training_ours.check(trainer, ours, stage)
    assert errors["gradients of the loop"] > 0
    assert trainer.model.training and ours.model.training and trainer.dropout_p == 0.1


def test_a_wrong_training_step_of_ours_is_refused():
    trainer = gpu_training.Trainer("cpu", smoke=True)
    ours = gpu_training_ours.OurTrainer(trainer)
    with torch.no_grad():
        ours.model.base_model.encoder.layer[0].ffn.up_weight[0] *= 3
    with pytest.raises(ValueError, match="wrong: width_stage"):
        gpu_training_ours.check(trainer, ours, "width_stage")


def test_training_flops_are_the_stage_units():
    trainer = gpu_training.Trainer("cpu", smoke=True)
    unit = trainer.flops("fine_tuning") / 3
    assert trainer.flops("width_stage") / unit == pytest.approx(8.5)
    assert trainer.flops("depth_stage") / unit == pytest.approx(19.375)


def test_hidden_targets_of_half_depth():
    assert gpu_training.hidden_targets(12, 6) == [0, 2, 4, 6, 8, 10, 12]
    assert gpu_training.hidden_targets(12, 9) == [0, 1, 2, 4, 5, 6, 8, 9, 10, 12][:1] + [
        i * 12 // 9 for i in range(1, 10)
    ]


def test_width_step_reaches_weights_beyond_the_narrowest_width():
    trainer = gpu_training.Trainer("cpu", smoke=True)
    before = trainer.model.bert.encoder.layer[0].intermediate.dense.weight.detach().clone()
    trainer.step("width_stage", gpu_training._ignore)
    after = trainer.model.bert.encoder.layer[0].intermediate.dense.weight
    changed = (after != before).any(dim=1)
    assert bool(changed.all())


def test_one_subnet_is_timed_by_every_protocol_and_tabled(recorder):
    with torch.inference_mode():
        bench = gpu_peers.Bench(recorder, "cpu", budget_s=600, smoke=True)
        hf = HuggingFaceEager(bench.model, bench.dtype)
        plain = CompiledLayers(bench.model, bench.dtype, peer_models.dense_layer, "P2b plain")
        ragged = CompiledRagged(bench.model, bench.dtype, peer_models.ragged_layer)
        ours = OursGraph(our_model(bench.model, bench.geometry, bench.dtype))
        subnet = bench.subnet(0.25, 1.0)
        bench.compare_large([hf, plain, ours], subnet, 3)
        bench.compare_single([hf, plain, ours], subnet)
        bench.compare_ragged([plain], ragged, [ours], subnet)
        bench.mixed_widths(plain, ours)
    assert [row for row in recorder.rows if "error" in row] == []
    cases: dict[str, set[str]] = {}
    for row in recorder.rows:
        if "median_ms" in row:
            cases.setdefault(row["case"], set()).add(row["peer"])
    assert set(cases) == {"batch3", "batch3_x100", "batch1", "short_texts", "mixed_widths"}
    assert all(any(peer.startswith("ours graph") for peer in peers) for peers in cases.values())
    table = summarize(recorder.rows)
    assert "Encoder, batch 1, us" in table
    assert "P4 varlen compiled" in table


def test_our_mixed_batch_is_checked_against_every_width(recorder):
    with torch.inference_mode():
        bench = gpu_peers.Bench(recorder, "cpu", budget_s=600, smoke=True)
        plain = CompiledLayers(bench.model, bench.dtype, peer_models.dense_layer, "P2b plain")
        ours = OursGraph(our_model(bench.model, bench.geometry, bench.dtype))
        ours.mixed = lambda subnets, *rest: OursGraph.mixed(ours, subnets[::-1], *rest)
        bench.mixed_widths(plain, ours)
    (row,) = (row for row in recorder.rows if "error" in row)
    assert row["peer"] == "ours graph, one call" and "wrong at w1-d1" in row["error"]


def test_products_of_the_peers_are_right_and_have_a_ratio(recorder):
    gpu_products.run(recorder, "cpu", budget_s=100, smoke=True, with_ours=False)
    assert [row for row in recorder.rows if "error" in row] == []
    assert {row["case"] for row in recorder.rows} == {
        *(case.kind for case in CASES),
        *(f"{kind} mixed" for kind in MIXED),
    }
    assert {row["ratio_to_best_peer"] for row in recorder.rows if row["case"] == NORM} == {1.0}


def test_a_wrong_product_is_an_error_and_not_a_timing(recorder):
    sweep = gpu_products.Sweep(recorder, "cpu", tokens=8, with_ours=True)
    sweep._tiles = lambda *_: None
    case = CASES[0]
    wrong = type(case)(case.kind, case.matrix, case.plain, lambda o, *_: (-case.plain(o)[0],))
    with torch.no_grad():
        sweep.run(wrong, TINY, 0.5, compile=False)
    assert {row["peer"] for row in recorder.rows if "error" in row} == {"ours", "ours device width"}
    assert {row["peer"] for row in recorder.rows if "median_ms" in row} == {"cublas + elementwise"}


def row_of(case: str, peer: str, ms: float, **fields: object) -> dict[str, object]:
    return {"section": "D", "case": case, "peer": peer, "median_ms": ms, **fields}


def test_a_ratio_compares_rows_of_one_process_and_takes_the_least_favourable():
    full = {"subnet": "w1-d1"}
    rows = [
        row_of("batch128", "P2b compiled graph", 6.0, process="a", **full),
        row_of("batch128", "ours graph", 5.0, process="a", **full),
        row_of("batch128", "P2b compiled graph", 7.0, process="b", **full),
        row_of("batch128", "P2 max-autotune graph", 4.4, process="b", **full),
        row_of("batch128", "ours graph", 4.0, process="b", **full),
        row_of("batch128", "P2 max-autotune graph", 1.0, process="c", **full),
    ]
    value = gpu_targets.ratio("ours graph", gpu_targets._compiled, "batch128", "w1-d1")
    assert value(rows) == pytest.approx(1.1)


def test_targets_say_what_is_met_missed_and_not_measured():
    rows = [
        row_of("batch128", "ours graph", 128 / 25.0, subnet="w1-d1"),
        row_of("width_stage", "ours", 20.0, subnet="all"),
        row_of("short_texts", "ours graph", 1.0, subnet="w1-d1", shape={"B": 128, "S": 128}),
        row_of("short_texts", "P4 varlen compiled", 1.2, subnet="w1-d1"),
        row_of("short_texts", "P4 varlen compiled", 2.0, subnet="w1-d1", clock="host"),
    ]
    verdicts = {t.what: t.line(rows)[""] for t in gpu_targets.TARGETS}
    assert verdicts["(1, 1) 128 x 128, sequences/s, device"] == "met"
    assert verdicts["width stage step, ms"] == "missed"
    assert verdicts["short texts, times varlen_attn in a graph of its lengths"] == "missed"
    assert verdicts["mixed widths 4 x 32, times compiled graphs in turn"] == "not measured"
    assert "25000" in gpu_targets.report(rows).replace("2.5e+04", "25000")


def test_the_best_of_a_peers_ways_counts():
    rows = [
        row_of("short_texts", "P2b", 3.0, sdpa="efficient"),
        row_of("short_texts", "P2b", 2.0, sdpa="cudnn"),
        row_of("short_texts", "P2b", 2.2, sdpa="cudnn"),
    ]
    assert gpu_targets.times_ms(rows, "short_texts") == {"P2b": pytest.approx(2.1)}


def test_attention_cases_a_cpu_has_are_right(recorder):
    gpu_attention.measure_dense(recorder, "cpu", TINY, 2, 8, 32)
    gpu_attention.measure_ragged(recorder, "cpu", TINY, 2, 4, 16)
    forward = {row["peer"]: row for row in recorder.rows if row["case"] == "forward"}
    assert {name for name, row in forward.items() if "error" in row} == {"cudnn", "efficient"}
    assert all(forward[name]["rel_err"] < 1e-2 for name in ("flash", "math", "varlen"))
    timed = {row["peer"] for row in recorder.rows if row["case"] == "ragged_forward"}
    assert {"varlen", "masked_math_S16"} <= timed


@pytest.mark.slow
def test_driver_runs_every_section(tmp_path):
    root = Path(records.__file__).resolve().parent.parent
    out = tmp_path / "gpu.jsonl"
    command = [sys.executable, "-m", "benchmarks.bench_gpu", "--smoke", "--out", str(out)]
    command += ["--work-dir", str(tmp_path / "work")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = records.read_rows(out)
    assert {row["section"][0] for row in rows} >= set("ABCDEF")
    assert {row["process"] for row in rows} >= {"ceilings", "inference", "products", "autotune"}
    summary = (tmp_path / "work" / "summary.txt").read_text()
    assert "rehearsal: " in summary
    assert "Training step, ms" in summary
    assert summary.rstrip().splitlines()[-1].startswith("  times compiled loop")
    assert "Traceback" not in (tmp_path / "work" / "log.txt").read_text()


def test_a_process_that_takes_over_goes_on_after_the_step_that_was_lost(recorder, tmp_path):
    bench = gpu_peers.Bench(recorder, "cpu", budget_s=600, smoke=True)
    ran: list[str] = []
    steps = [(name, lambda name=name: ran.append(name)) for name in "abcd"]
    begun = tmp_path / "begun"
    begun.write_text("a\nb\n")
    gpu_peers.run_steps(bench, steps, begun)
    assert ran == ["c", "d"]
    assert begun.read_text().split() == ["a", "b", "c", "d"]
