"""Two processes take the steps of one, under DistributedDataParallel and under FSDP2."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch import Tensor, distributed
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler
from transformers import TrainerCallback, TrainingArguments

from dynabert import DynaBertForSequenceClassification, SubnetConfig, subnet_grid
from dynabert.evaluation import GridRow, evaluate_grid
from dynabert.training import DynaBertTrainer, Stage
from dynabert.training.processes import from_first, is_first, shared_out
from dynabert.training.resumable_trainer import SaveEvery
from dynabert.training.row_order import RowOrder
from dynabert.training.sharding import prepare_sharding, whole_weights
from tests.training.conftest import SENTIMENT, tiny_config
from tests.training.sharded_on_cpu import allow_sharding_on_the_cpu
from tests.training.two_processes import in_two_processes

FULL, NARROW = SubnetConfig(), SubnetConfig(0.5, 0.5)
GRID = tuple(subnet_grid((1, 0.5, 0.25), (1, 0.5)))
WIDTH = Stage("width", tuple(subnet_grid((1, 0.75, 0.25), (1,))), "full", 1.0, 0.1)
WIDTH_DEPTH = Stage("width-depth", GRID, "same-width", 1.0, 0.5)
LABELS = Stage("final", GRID)
SHALLOW = Stage("final", (NARROW,))
STATES_ONLY = Stage("width-depth", GRID, "same-width", 0.0, 1.0)
# Bytes of activations: each subnet alone; or two passes for long batches and one for short ones.
ONE_BY_ONE, UNEVEN = 1, 875_000


@dataclass(frozen=True)
class Case:
    """How a stage is trained."""

    stage: Stage
    problem: str = "classification"
    budget: int = 4 << 30
    accumulation: int = 1
    sharded: bool = False


class Steps(TrainerCallback):
    """Keeps the gradients of the first step, and how often the student ran for each."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}
        self.passes: list[int] = []
        self._num_passes = 0

    def count(self, module: torch.nn.Module, *_: Any) -> None:
        self._num_passes += module.training

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            found = {name: parameter.grad for name, parameter in model.named_parameters()}
            self.gradients = {n: whole(grad) for n, grad in found.items() if grad is not None}
        self.passes.append(self._num_passes)
        self._num_passes = 0


def whole(tensor: Tensor) -> Tensor:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone()


def make_model(case: Case, seed: int) -> DynaBertForSequenceClassification:
    torch.manual_seed(seed)
    changes = {"num_labels": 1} if case.problem == "regression" else {}
    return DynaBertForSequenceClassification(tiny_config(**changes))


def make_trainer(
    case: Case, batch_size: int, rows: Any, collator: Any, folder: Path, **settings: Any
) -> DynaBertTrainer:
    options = {k: settings.pop(k) for k in ("callbacks", "evaluator") if k in settings}
    if case.sharded:
        settings |= {"fsdp": True, "fsdp_config": {"version": 2, **settings.pop("sharding", {})}}
    defaults = {
        "num_train_epochs": 1,
        "optim": "sgd",  # Adam would blow up the rounding of gradients that should be zero
        "learning_rate": 0.05,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
    }
    args = TrainingArguments(
        output_dir=str(folder / "trainer"),
        use_cpu=True,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=case.accumulation,
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",
        **{**defaults, **settings},
    )
    return DynaBertTrainer(
        make_model(case, seed=1),
        args,
        stage=case.stage,
        problem=case.problem,  # type: ignore[arg-type]
        train_dataset=rows,
        data_collator=collator,
        teacher=make_model(case, seed=2) if case.stage.teacher else None,
        group_by_length=False,  # so that the processes have different numbers of tokens
        activation_budget=case.budget,
        **options,
    )


def trained(case: Case, batch_size: int, *args: Any) -> dict[str, Any]:
    """Train one epoch; what came of it."""
    if case.sharded:
        allow_sharding_on_the_cpu()
    steps = Steps()
    trainer = make_trainer(case, batch_size, *args, callbacks=[steps])
    trainer.model.register_forward_pre_hook(steps.count)
    trainer.train()
    wrapped = trainer.model_wrapped
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    return {
        "gradients": steps.gradients,
        "passes": steps.passes,
        "weights": {n: whole(p) for n, p in trainer.model.named_parameters()},
        "losses": [
            {k: v for k, v in entry.items() if k.startswith("loss")}
            for entry in trainer.state.log_history[:-1]
        ],
        "is_sharded": isinstance(wrapped, FSDPModule),
        "finds_unused": isinstance(wrapped, DistributedDataParallel)
        and wrapped.find_unused_parameters,
    }


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert float((found[name] - tensor).norm()) <= 1e-6 * float(tensor.norm()), name


CASES = {
    "width": Case(WIDTH),
    "width-depth-one-by-one": Case(WIDTH_DEPTH, budget=ONE_BY_ONE),
    "labels-accumulated": Case(LABELS, accumulation=2),
    "labels-in-uneven-passes": Case(LABELS, budget=UNEVEN, accumulation=2),
    "one-shallow-subnet": Case(SHALLOW),
    "states-only": Case(STATES_ONLY, problem="regression"),
}


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("name", CASES)
def test_two_processes_take_the_steps_of_one(
    name: str, sharded: bool, make_rows: Any, collator: Any, tmp_path: Path, free_port: int
) -> None:
    case = CASES[name]
    rows = make_rows(32, case.problem)
    alone = trained(case, 8, rows, collator, tmp_path)
    case = replace(case, sharded=sharded)
    outcomes = in_two_processes(free_port, tmp_path, trained, case, 4, rows, collator, tmp_path)
    for outcome in outcomes:
        assert outcome["is_sharded"] is sharded
        assert outcome["finds_unused"] is False
        assert_near(outcome["gradients"], alone["gradients"])
        assert_near(outcome["weights"], alone["weights"])
        for found, expected in zip(outcome["losses"], alone["losses"], strict=True):
            assert found == pytest.approx(expected, rel=1e-5)
    first, second = (outcome["passes"] for outcome in outcomes)
    if case.budget == ONE_BY_ONE:
        assert first == second == [len(GRID)] * 4
    # All processes make the same passes where they gather the weights together.
    assert (first == second) is (sharded or case.budget != UNEVEN)


def agreement(rows: Any, collator: Any, folder: Path) -> dict[str, Any]:
    """What a process says that shares decisions with the other, which sees other things."""
    rank = distributed.get_rank()
    case = Case(LABELS, problem="regression")

    def fail() -> None:
        raise OSError("no space left")

    with pytest.raises((OSError, ValueError)) as failure:
        from_first(fail)
    trainer = make_trainer(
        case,
        4,
        rows,
        collator,
        folder,
        evaluator=lambda model: [GridRow(FULL, {"spearman": float(rank)}, float(rank), 1)],
    )
    scores = trainer.evaluate()
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    with pytest.raises(FloatingPointError) as stop:
        trainer.train()
    return {
        "is_first": is_first(),
        "made": from_first(lambda: f"by {rank}"),
        "failure": f"{failure.type.__name__}: {failure.value}",
        "shared": shared_out(range(5), lambda own: [(item, rank) for item in own]),
        "shared_by_one": shared_out([7], lambda own: [(item, rank) for item in own]),
        "score": scores["eval_grid_mean"],
        "stop": str(stop.value),
        "has_moved": any(
            not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters()
        ),
    }


@pytest.mark.slow
def test_processes_agree(make_rows: Any, collator: Any, tmp_path: Path, free_port: int) -> None:
    encoded = make_rows(8, "regression")
    rows = [dict(encoded[index]) for index in range(8)]
    rows[3]["labels"] = math.nan  # a row of one of the two processes
    first, second = in_two_processes(free_port, tmp_path, agreement, rows, collator, tmp_path)
    assert (first.pop("is_first"), second.pop("is_first")) == (True, False)
    assert first.pop("failure") == "OSError: no space left"
    assert second.pop("failure") == "ValueError: no space left"
    assert first == second
    assert first["made"] == "by 0"
    assert first["shared"] == [(0, 0), (1, 1), (2, 0), (3, 1), (4, 0)]
    assert first["shared_by_one"] == [(7, 0)]
    assert first["score"] == 0
    assert "step 1: the loss of subnet w0.25-d0.5 is nan" in first["stop"]
    assert not first["has_moved"]


def resumed(state_dict_type: str, rows: Any, collator: Any, folder: Path) -> dict[str, Any]:
    """Train sharded, and once more from the last checkpoint but one."""
    allow_sharding_on_the_cpu()
    weights, losses = [], []
    for attempt in range(2):
        trainer = make_trainer(
            Case(WIDTH_DEPTH, sharded=True),
            4,
            rows,
            collator,
            folder,
            callbacks=[SaveEvery(3)],
            evaluator=lambda model: evaluate_grid(
                model, rows, collator, SENTIMENT, GRID, progress=False
            ),
            num_train_epochs=2,
            optim="adamw_torch_fused",
            learning_rate=1e-3,
            max_grad_norm=1.0,
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model="eval_grid_mean",
            sharding={"state_dict_type": state_dict_type},
        )
        trainer.train(resume_from_checkpoint=True)
        assert (trainer.resumed_from is not None) is (attempt == 1)
        weights.append({name: whole(p) for name, p in trainer.model.named_parameters()})
        losses.append([entry.get("loss") for entry in trainer.state.log_history])
        if is_first() and attempt == 0:
            shutil.rmtree(folder / "trainer" / "checkpoint-8")
        distributed.barrier()
    batch = collator([rows[index] for index in range(8)])
    with torch.no_grad():
        logits = trainer.model.eval()(**batch, subnet=NARROW).logits
    return {
        "weights": weights,
        "losses": losses,
        "resumed_from": trainer.resumed_from.name,
        "logits": logits,
        "in_one_piece": whole_weights(trainer.model),
    }


@pytest.mark.slow
@pytest.mark.parametrize("state_dict_type", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_sharded_training_resumes_to_the_same_bits(
    state_dict_type: str, make_rows: Any, collator: Any, tmp_path: Path, free_port: int
) -> None:
    rows = make_rows(32)
    first, second = in_two_processes(
        free_port, tmp_path, resumed, state_dict_type, rows, collator, tmp_path
    )
    assert first["resumed_from"] == second["resumed_from"] == "checkpoint-6"
    for outcome in (first, second):
        uninterrupted, other = outcome["weights"]
        assert all(torch.equal(other[name], uninterrupted[name]) for name in uninterrupted)
        assert outcome["losses"][0] == outcome["losses"][1]
    assert second["in_one_piece"] == {}
    model = make_model(Case(WIDTH_DEPTH), seed=3).eval()
    model.load_state_dict(first["in_one_piece"])
    batch = collator([rows[index] for index in range(8)])
    with torch.no_grad():
        torch.testing.assert_close(model(**batch, subnet=NARROW).logits, first["logits"])


def test_two_processes_divide_the_batches_of_one() -> None:
    lengths = [(7 * i) % 29 + 3 for i in range(48)]

    order = RowOrder(lengths, 8, seed=4, epoch=lambda: 1, group_by_length=True)
    alone = list(BatchSampler(order, 8, drop_last=False))
    halves = BatchSampler(order, 4, drop_last=False)
    shards = [BatchSamplerShard(halves, num_processes=2, process_index=rank) for rank in range(2)]
    assert [a + b for a, b in zip(*shards, strict=True)] == alone


def plugin(**changes: Any) -> Any:
    settings = {
        "fsdp_version": 2,
        "cpu_ram_efficient_loading": False,
        "transformer_cls_names_to_wrap": None,
    }
    return SimpleNamespace(**{**settings, **changes})


def test_students_are_sharded_by_layer_unless_told_otherwise() -> None:
    default, chosen = plugin(), plugin(transformer_cls_names_to_wrap=["DynaBertFFN"])
    prepare_sharding(default)
    prepare_sharding(chosen)
    assert default.transformer_cls_names_to_wrap == ["DynaBertLayer"]
    assert chosen.transformer_cls_names_to_wrap == ["DynaBertFFN"]
    with pytest.raises(ValueError, match=r"fsdp_version=1, expected 2"):
        prepare_sharding(plugin(fsdp_version=1))
    with pytest.raises(ValueError, match=r"--fsdp_cpu_ram_efficient_loading false"):
        prepare_sharding(plugin(cpu_ram_efficient_loading=True))
