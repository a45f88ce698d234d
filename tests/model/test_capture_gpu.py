"""Captured graphs and mixed batches on a GPU, against ordinary calls of the same kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import dynabert
from dynabert import DynaBertConfig, ForEach, SubnetConfig, subnet_grid
from dynabert_kernels import use_backend

pytestmark = pytest.mark.gpu

GRID = subnet_grid((1.0, 0.75, 0.5, 0.25), (1.0, 0.5))
PER_LAYER = SubnetConfig(num_heads=(1, 4, 2, 3), intermediate_size=(512, 16, 80, 400))
ROWS, COLUMNS = 6, 80
# Token counts of one configuration of the kernels: compiling is most of what these tests take.
BATCHES = ([80] * 6, [5, 1, 80, 17, 0, 33], [70, 2, 60], [80, 80])
# Both ways run the same kernels; a graph's tiles may differ from those of a fixed width.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2}


@pytest.fixture(autouse=True)
def on_triton() -> Iterator[None]:
    with use_backend("triton"), torch.no_grad():
        yield


def make(kind: str = "ForSequenceClassification", dtype: torch.dtype = torch.float32) -> Any:
    config = DynaBertConfig(
        vocab_size=200,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=100,
        initializer_range=0.1,
    )
    return getattr(dynabert, f"DynaBert{kind}")(config).eval().to("cuda", dtype)


def batch_of(lengths: list[int], side: str = "right", seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    seq_len = max(lengths)
    ids = torch.randint(3, 200, (len(lengths), seq_len), generator=generator)
    place, length = torch.arange(seq_len).expand(ids.shape), torch.tensor(lengths)[:, None]
    mask = place < length if side == "right" else place >= seq_len - length
    return ids.cuda(), mask.long().cuda()


def assert_close(got: Any, expected: Any, dtype: torch.dtype) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", ["Model", "ForSequenceClassification", "ForQuestionAnswering"])
def test_graphs_equal_calls_at_every_subnet_and_length(kind: str, dtype: torch.dtype) -> None:
    model = make(kind, dtype)
    runner = model.capture(ROWS, COLUMNS)
    for number, lengths in enumerate(BATCHES):
        ids, mask = batch_of(lengths, ("right", "left")[number % 2], seed=number)
        mixed = [GRID[row % 4] for row in range(len(lengths))]
        for subnet in (*GRID, mixed, PER_LAYER):
            expected = model(ids, mask, subnet=subnet)
            assert_close(runner(ids, mask, subnet=subnet), expected, dtype)
        if min(lengths) == max(lengths):
            assert_close(runner(ids, subnet=GRID[2]), model(ids, subnet=GRID[2]), dtype)
    # Both depths padded, one of them dense and one with widths that differ within the batch.
    assert runner.num_graphs == 4
    assert runner.num_replays == len(BATCHES) * (len(GRID) + 2) + 2  # two once more, without a mask


def test_a_thousand_replays_capture_and_allocate_nothing() -> None:
    model = make(dtype=torch.bfloat16)
    runner = model.capture(ROWS, COLUMNS, subnets=[GRID[0], GRID[4]], lazy=False)
    assert runner.num_graphs == 6
    generator = torch.Generator().manual_seed(0)
    batches = [batch_of(lengths, seed=seed) for seed, lengths in enumerate(BATCHES)]
    torch.cuda.synchronize()
    reserved = torch.cuda.memory_reserved()
    for number in range(1000):
        ids, mask = batches[number % len(batches)]
        picked = torch.randint(4, (len(ids),), generator=generator).tolist()
        depth = number % 2 * 4
        subnet: Any = GRID[depth + picked[0]]
        if number % 3 == 0:
            subnet = [GRID[depth + pick] for pick in picked]
        got = runner(ids, mask, subnet=subnet)
        if number % 100 == 0:
            assert_close(got, model(ids, mask, subnet=subnet), torch.bfloat16)
    assert (runner.num_graphs, runner.num_replays) == (6, 1000)
    assert torch.cuda.memory_reserved() <= reserved + 2**21
    with pytest.raises(ValueError, match=r"subnet keeps layers \(3,\).*lazy=True"):
        runner(*batches[0], subnet=SubnetConfig(1.0, 0.25))


def test_replays_on_a_side_stream_and_clones() -> None:
    runner = make().capture(ROWS, COLUMNS, clone=True)
    ids, mask = batch_of(BATCHES[1])
    first = runner(ids, mask)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other = runner(ids, mask, subnet=GRID[3])
        again = runner(ids, mask)
    torch.cuda.synchronize()
    assert torch.equal(first.logits, again.logits)
    assert not torch.equal(first.logits, other.logits)
    shared = runner(ids, mask, clone=False).logits
    runner(ids, mask, subnet=GRID[3], clone=False)
    assert torch.equal(shared, other.logits)


def test_graphs_read_the_live_parameters() -> None:
    model = make()
    runner = model.capture(ROWS, COLUMNS)
    ids, mask = batch_of(BATCHES[1])
    before = runner(ids, mask, clone=True)
    model.dynabert.encoder.layer[1].ffn.up_weight.mul_(1.5)
    after = runner(ids, mask)
    assert not torch.equal(before.logits, after.logits)
    assert_close(after, model(ids, mask), torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.half(), "parameters were moved"),
        (lambda model: model.train(), "put in training"),
        (lambda model: model.dynabert.encoder.layer[0].register_forward_hook(print), "hooked"),
        (lambda model: setattr(model, "classifier", torch.nn.Linear(256, 2)), "was replaced"),
    ],
    ids=["moved", "training", "hook", "replaced"],
)
def test_a_changed_model_is_refused(change: Callable[[Any], Any], message: str) -> None:
    model = make()
    runner = model.capture(ROWS, COLUMNS)
    ids, mask = batch_of(BATCHES[0])
    runner(ids, mask)
    change(model)
    with pytest.raises(RuntimeError, match=message):
        runner(ids, mask)


def test_kernels_that_read_widths_back_are_refused() -> None:
    ids, mask = batch_of(BATCHES[0])
    with use_backend("reference"):
        runner = make().capture(ROWS, COLUMNS)
    with pytest.raises(NotImplementedError, match="cannot be captured"):
        runner(ids, mask)
    torch.cuda.synchronize()  # the failed capture leaves the device usable


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_nothing_waits_for_the_device() -> None:
    model = make(dtype=torch.bfloat16)
    runner = model.capture(ROWS, COLUMNS)
    ids, mask = batch_of(BATCHES[1])
    on_cpu, mixed = mask.cpu(), [GRID[row % 4] for row in range(len(ids))]
    depths = [GRID[row % 2 * 4] for row in range(len(ids))]
    calls = [
        lambda: runner(ids, mask),
        lambda: runner(ids, mask, subnet=mixed),
        lambda: model(ids, on_cpu),
        lambda: model(ids, on_cpu, subnet=mixed),
        lambda: model(ids, on_cpu, subnet=depths),
        lambda: model(ids, subnet=mixed),
    ]
    for call in calls:
        call()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in calls:
            call()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("kind", ["Model", "ForSequenceClassification", "ForQuestionAnswering"])
def test_a_mask_on_the_cpu_gives_the_same_bits(kind: str) -> None:
    model = make(kind)
    ids, mask = batch_of(BATCHES[1], "left")
    for subnet in (None, [GRID[row % 3] for row in range(len(ids))]):
        expected = model(ids, mask, subnet=subnet)
        for name, value in model(ids, mask.cpu(), subnet=subnet).items():
            assert torch.equal(value, expected[name])


@pytest.mark.parametrize("states", [False, True, "packed"], ids=str)
def test_mixed_batches_equal_the_reference(states: Any) -> None:
    model = make("Model")
    ids, mask = batch_of([40, 3, 80, 17, 9, 33])
    subnets = [GRID[row % 4] for row in range(6)]
    got = model(ids, mask, subnet=subnets, output_hidden_states=states)
    with use_backend("reference"):
        expected = model(ids, mask, subnet=subnets, output_hidden_states=states)
    torch.testing.assert_close(
        got.last_hidden_state, expected.last_hidden_state, atol=1e-3, rtol=1e-3
    )
    for one, other in zip(got.hidden_states or (), expected.hidden_states or (), strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def test_gradients_at_several_subnets_equal_the_reference() -> None:
    model = make()
    ids, mask = batch_of([80, 3, 60])
    gradients = []
    for backend in ("triton", "reference"):
        model.zero_grad(set_to_none=True)
        with use_backend(backend), torch.enable_grad():
            labels = torch.tensor([0, 1, 1], device="cuda")
            model(ids, mask, subnet=ForEach(tuple(GRID)), labels=labels).loss.sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    found, expected = gradients
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            found[name] / scale, gradient / scale, atol=1e-3, rtol=0, msg=name
        )
