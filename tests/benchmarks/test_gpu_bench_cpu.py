"""The GPU benchmarks' logic at tiny sizes on the CPU: counts, records, peers, the driver."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import gpu_attention, gpu_ceilings, gpu_peers, gpu_training, peer_models, records
from benchmarks.geometry import BASE, TINY, WIDTHS, Subnet, short_text_lengths
from benchmarks.gpu_encoder_peers import Batch, CompiledLayers, CompiledRagged, HuggingFaceEager
from benchmarks.gpu_tables import summarize
from benchmarks.gpu_timing import Variant, measure, relative_error

GRID = [(width, depth) for width in WIDTHS for depth in (1.0, 0.75, 0.5)]


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
    hidden = torch.randn(batch_size, 7, TINY.hidden_size, generator=generator)
    return Batch(hidden.to(torch.bfloat16), lengths)


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


def test_timing_quantiles_equal_torch():
    samples = (3.0, 1.0, 7.0, 2.0, 11.0)
    timing = records.Timing(samples)
    for q in (0.2, 0.5, 0.8):
        expected = float(torch.tensor(samples, dtype=torch.float64).quantile(q))
        assert timing.quantile(q) == pytest.approx(expected)


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
    later = records.Recorder(recorder.path.parent, {}, "abc")
    row = later.add("B", "x", timing=records.Timing((1.0,)), bytes_moved=1e9)
    assert row["share_of_bandwidth"] == pytest.approx(0.25)


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
    hidden = tiny_batch().hidden.float()
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
def test_dense_peers_match_hugging_face(bert, width, depth, lengths):
    subnet, batch = Subnet(TINY, width, depth), tiny_batch(lengths)
    reference = peer_models.extract(bert, subnet).encoder(
        batch.hidden.float(), attention_mask=batch.mask
    )
    expected = reference.last_hidden_state[batch.real]
    exact = CompiledLayers(bert, torch.float32, peer_models.dense_layer, "exact")
    output = exact.prepare(subnet, batch)(batch.hidden.float())
    assert relative_error(output[batch.real], expected) < 1e-5
    for peer in (
        HuggingFaceEager(bert, torch.bfloat16),
        CompiledLayers(bert, torch.bfloat16, peer_models.dense_layer, "bf16"),
    ):
        output = peer.prepare(subnet, batch)(batch.hidden)
        assert output.dtype == torch.bfloat16
        assert relative_error(output[batch.real], expected) < gpu_peers.TOLERANCE


@pytest.mark.parametrize("width", WIDTHS)
def test_ragged_peer_matches_masked_hugging_face(bert, width):
    subnet, batch = Subnet(TINY, width, 0.75), tiny_batch((7, 1, 4))
    encoder = peer_models.extract(bert, subnet).encoder
    expected = encoder(batch.hidden.float(), attention_mask=batch.mask).last_hidden_state
    peer = CompiledRagged(bert, torch.float32, peer_models.ragged_layer)
    output = peer.prepare(subnet, batch)(batch.hidden.float()[batch.real])
    assert relative_error(output, expected[batch.real]) < 1e-5


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
    trainer.width_step(gpu_training._ignore)
    after = trainer.model.bert.encoder.layer[0].intermediate.dense.weight
    changed = (after != before).any(dim=1)
    assert bool(changed.all())


def test_one_subnet_is_timed_by_every_protocol_and_tabled(recorder):
    with torch.inference_mode():
        bench = gpu_peers.Bench(recorder, "cpu", budget_s=600, smoke=True)
        hf = HuggingFaceEager(bench.model, bench.dtype)
        plain = CompiledLayers(bench.model, bench.dtype, peer_models.dense_layer, "P2b plain")
        ragged = CompiledRagged(bench.model, bench.dtype, peer_models.ragged_layer)
        subnet = bench.subnet(0.25, 1.0)
        bench.compare_large([hf, plain], subnet, 3)
        bench.compare_single([hf, plain], subnet)
        bench.compare_ragged([plain], ragged, subnet)
        bench.mixed_widths(plain)
    assert [row for row in recorder.rows if "error" in row] == []
    cases = {row["case"] for row in recorder.rows if "median_ms" in row}
    assert cases == {"batch3", "batch3_x100", "batch1", "short_texts", "mixed_widths"}
    table = summarize(recorder.rows)
    assert "Encoder, batch 1, us" in table
    assert "P4 varlen compiled" in table


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
    command = [sys.executable, "-m", "benchmarks.gpu_baseline", "--smoke", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = records.read_rows(tmp_path / records.RECORD_NAME)
    assert {row["section"][0] for row in rows} >= set("ABCDE")
    assert "Training step, ms" in (tmp_path / "summary.txt").read_text()
    assert "Traceback" not in (tmp_path / "log.txt").read_text()
