"""`release_packed`: a serving model without its packed weights, and everything it then refuses."""

from __future__ import annotations

import copy
import gc
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dynabert import DynaBertConfig, DynaBertForSequenceClassification, ForEach, SubnetConfig
from dynabert.extraction import extract
from dynabert.importance import Importance
from dynabert.modeling_release import return_freed_memory
from dynabert.rewiring import rewire
from dynabert_kernels import ReleasedWeightsError, clear_prepared, prepared_forms, use_backend
from dynabert_kernels._extension import cpu_extension
from dynabert_kernels.ops import _cpu

if _cpu.kernels_missing() is not None:
    pytest.skip(str(_cpu.kernels_missing()), allow_module_level=True)

HALF, QUARTER = SubnetConfig(0.5, 0.5), SubnetConfig(0.25)
SUBNETS: list[Any] = [None, HALF, QUARTER, [HALF, None, QUARTER], ForEach((HALF, SubnetConfig()))]
KINDS = ["float32", "bfloat16", "int8", "autocast", "int8-of-bfloat16"]


@pytest.fixture
def model(make_hf: Any, ours: Any) -> Any:
    clear_prepared()
    return ours(make_hf("bert", num_hidden_layers=2)).eval()


def of_kind(model: Any, kind: str) -> Any:
    if "bfloat16" in kind:
        model.to(torch.bfloat16)
    return model.quantize("int8") if "int8" in kind else model


def logits(model: Any, batch: Any, kind: str = "", **more: Any) -> Tensor:
    autocast = torch.autocast("cpu", torch.bfloat16) if kind == "autocast" else nullcontext()
    with torch.no_grad(), autocast:
        result: Tensor = model(**batch, **more).logits
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_call_has_the_bits_of_before(model: Any, make_batch: Any, kind: str) -> None:
    model, batch = of_kind(model, kind), make_batch(model.config)
    calls = [
        *({"subnet": subnet} for subnet in SUBNETS),
        {"subnet": HALF, "output_hidden_states": True},  # the ops one by one
    ]
    expected = [logits(model, batch, kind, **call) for call in calls]
    view = model.with_subnet(HALF)
    assert model.release_packed(["bfloat16"] if kind == "autocast" else None) is model
    assert list(prepared_forms()) == ["bfloat16" if kind == "autocast" else kind.split("-")[0]]
    for who in (model, copy.deepcopy(model)):
        for call, before in zip(calls, expected, strict=True):
            assert torch.equal(logits(who, batch, kind, **call), before)
    for halved in (view, model.with_subnet(HALF), copy.copy(view)):
        assert torch.equal(logits(halved, batch, kind), expected[1])
    assert not torch.equal(expected[0], expected[1])


def test_no_reference_to_the_packed_weights_is_left(model: Any, make_batch: Any) -> None:
    batch = make_batch(model.config)
    for subnet in SUBNETS:
        logits(model, batch, subnet=subnet)
    with torch.inference_mode():
        model(**batch)
    encoder = model.dynabert.encoder
    storages = [p.untyped_storage()._weak_ref() for p in encoder.parameters()]
    model.release_packed()
    gc.collect()
    assert all(torch.UntypedStorage._expired(storage) for storage in storages)
    for storage in storages:
        torch.UntypedStorage._free_weak_ref(storage)


def train(model: Any, batch: Any) -> Any:
    model.train()
    return model(**batch, labels=torch.zeros(3, dtype=torch.long))


def with_backend(model: Any, batch: Any) -> Any:
    with use_backend("reference"):
        return logits(model, batch)


def with_pair_mask(model: Any, batch: Any) -> Any:
    mask = batch["attention_mask"]
    return logits(
        model, {**batch, "attention_mask": mask[:, None, :].expand(-1, mask.shape[1], -1)}
    )


def in_bfloat16(model: Any, batch: Any) -> Any:
    return logits(model, batch, "autocast")


def rewired(model: Any, batch: Any) -> Any:
    config = model.config
    heads = torch.rand(config.num_hidden_layers, config.num_attention_heads)
    neurons = torch.rand(config.num_hidden_layers, config.intermediate_size)
    return rewire(model, Importance(list(heads), list(neurons), 1, 1, "paper"))


def loaded(model: Any, batch: Any) -> Any:
    state = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    return model.load_state_dict(state)


def exported(model: Any, batch: Any) -> Any:
    with torch.no_grad():
        program = torch.export.export(model, (batch["input_ids"],))  # looks at shapes alone
        return program.module()(batch["input_ids"])


USES: dict[str, Callable[[Any, Any], Any]] = {
    "training": train,
    "gradients": lambda model, batch: model(**batch),
    "reference": with_backend,
    "pair-mask": with_pair_mask,
    "autocast": in_bfloat16,
    "quantize": lambda model, _: model.quantize("int8"),
    "release": lambda model, _: model.release_packed(),
    "state_dict": lambda model, _: model.state_dict(),
    "load_state_dict": loaded,
    "pickle": lambda model, _: pickle.dumps(model),
    "bfloat16": lambda model, _: model.to(torch.bfloat16),
    "double": lambda model, _: model.double(),
    "half-of-the-encoder": lambda model, _: model.dynabert.encoder.half(),
    "meta": lambda model, _: model.to("meta"),
    "rewire": rewired,
    "extract": lambda model, _: extract(model, HALF),
    "export": exported,
}


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:.*pair",
)
@pytest.mark.parametrize(
    "use", [pytest.param(u, marks=pytest.mark.slow if u == "export" else ()) for u in USES]
)
def test_what_needs_the_numbers_is_refused_and_changes_nothing(
    model: Any, make_batch: Any, use: str
) -> None:
    batch = make_batch(model.config)
    expected = logits(model, batch)
    model.release_packed()
    others = {n: p.clone() for n, p in model.named_parameters() if ".encoder." not in n}
    with pytest.raises(RuntimeError, match="oad the model again") as raised:
        USES[use](model, batch)
    assert isinstance(raised.value, ReleasedWeightsError)
    model.eval()
    assert torch.equal(logits(model, batch), expected)
    own = dict(model.named_parameters())
    for name, parameter in others.items():
        assert torch.equal(own[name], parameter), name


def test_a_checkpoint_is_not_touched(model: Any, tmp_path: Path) -> None:
    model.rewiring = None
    model.save_pretrained(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    model.release_packed()
    for folder in ("model", "new"):
        with pytest.raises(ReleasedWeightsError, match=r"^save_pretrained: qkv_weight was rel"):
            model.save_pretrained(tmp_path / folder)
    assert {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_what_asks_for_nothing_new_still_works(model: Any, make_batch: Any) -> None:
    batch = make_batch(model.config)
    expected = logits(model, batch)
    count, footprint = model.num_parameters(), len(list(model.parameters()))
    model.release_packed()
    for again in (model.to("cpu"), model.float(), model.requires_grad_(True), model.eval()):
        assert torch.equal(logits(again, batch), expected)
    with torch.inference_mode():
        assert torch.equal(model.to("cpu")(**batch).logits, expected)
    assert (model.num_parameters(), len(list(model.parameters()))) == (count, footprint)
    assert (model.dtype, model.device.type) == (torch.float32, "cpu")


def test_kept_forms_take_turns(model: Any, make_batch: Any) -> None:
    batch = make_batch(model.config)
    floats, half = logits(model, batch), logits(model, batch, "autocast")
    integers = logits(model.quantize("int8"), batch)
    model.quantize(None).release_packed(["int8", "float32", "bfloat16"])
    assert torch.equal(logits(model.quantize("int8"), batch), integers)
    assert torch.equal(logits(model.quantize(None), batch), floats)
    assert torch.equal(logits(model, batch, "autocast"), half)
    assert not torch.equal(floats, integers)
    assert list(prepared_forms()) == ["bfloat16", "float32", "int8"]


def test_threads_on_a_released_model(model: Any, make_batch: Any) -> None:
    batch = make_batch(model.config)
    expected = [logits(model, batch, subnet=subnet) for subnet in SUBNETS]
    model.release_packed()

    def work(seed: int) -> bool:
        each = zip(SUBNETS[seed:] + SUBNETS[:seed], expected[seed:] + expected[:seed], strict=True)
        return all(torch.equal(logits(model, batch, subnet=s), before) for s, before in each)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, [0, 1, 2, 3, 4] * 8))


def test_calls_meanwhile_are_right_or_refused(model: Any, make_batch: Any) -> None:
    batch = make_batch(model.config)
    expected = logits(model, batch)

    def work(_: int) -> int:
        try:
            return int(torch.equal(logits(model, batch), expected))
        except (ReleasedWeightsError, ValueError) as error:
            return int("released" in str(error))

    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(work, number) for number in range(40)]
        model.release_packed()
        assert sum(call.result() for call in calls) == 40
    assert torch.equal(logits(model, batch), expected)


def test_a_model_is_released_as_a_whole_or_not_at_all(model: Any, make_batch: Any) -> None:
    batch = make_batch(model.config)
    with torch.no_grad():
        model.dynabert.encoder.layer[-1].ffn.up_weight[-1, -1] = torch.nan
    narrow = logits(model, batch, subnet=QUARTER)
    with pytest.raises(ValueError, match="NaN or infinity"):
        model.release_packed("int8")
    assert model.state_dict()  # every parameter is still there
    assert torch.equal(logits(model, batch, subnet=QUARTER), narrow)


def test_what_cannot_be_released(model: Any, make_hf: Any, ours: Any) -> None:
    with pytest.raises(ValueError, match="training=True, expected a model in evaluation"):
        model.train().release_packed()
    model.eval()
    with pytest.raises(ValueError, match=r"forms=\['float64'\], expected one or several"):
        model.double().release_packed()
    model.float()
    torch.nn.utils.parametrizations.weight_norm(model.dynabert.encoder.layer[1].ffn, "up_weight")
    with pytest.raises(ValueError, match="DynaBertFFN has parametrised or further parameters"):
        model.release_packed()
    other = ours(make_hf("bert", num_hidden_layers=1, hidden_size=36)).eval()  # heads of 3
    with pytest.raises(NotImplementedError, match="head_dim=3, expected a multiple of 8"):
        other.release_packed()


def test_a_new_weight_in_the_place_of_a_released_one(model: Any, make_batch: Any) -> None:
    """A sublayer with some weights of its own again is refused, and right once it has all."""
    batch = make_batch(model.config)
    original = copy.deepcopy(model)
    expected = logits(model, batch)
    model.release_packed()
    ffn, former = model.dynabert.encoder.layer[0].ffn, original.dynabert.encoder.layer[0].ffn
    ffn.up_weight = torch.nn.Parameter(former.up_weight.detach().clone())
    with pytest.raises((ValueError, ReleasedWeightsError), match="released"):
        logits(model, batch)
    for name, parameter in former.named_parameters():
        setattr(ffn, name, torch.nn.Parameter(parameter.detach().clone()))
    assert torch.equal(logits(model, batch), expected)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc/self/statm")
@pytest.mark.parametrize("form", ["float32", "int8"])
def test_the_memory_is_given_back(form: str) -> None:
    if "-fsanitize" in cpu_extension().build_info()["flags"]:
        pytest.skip("the address sanitizer holds freed memory back")

    def resident_bytes() -> int:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    clear_prepared()
    config = DynaBertConfig(
        vocab_size=50,
        hidden_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        intermediate_size=1536,
    )
    model = DynaBertForSequenceClassification(config).eval()
    packed = sum(p.nbytes for p in model.dynabert.encoder.parameters())
    if form == "int8":
        model.quantize("int8")
    batch = {"input_ids": torch.arange(9)[None]}
    before = logits(model, batch)
    gc.collect()
    return_freed_memory()
    both = resident_bytes()
    model.release_packed()
    freed = both - resident_bytes()
    assert packed > 28e6
    assert 0.9 * packed < freed < 1.1 * packed
    assert torch.equal(logits(model, batch), before)
    assert sum(prepared_forms().values()) == pytest.approx(
        packed / (4 if form == "int8" else 1), rel=0.02
    )
