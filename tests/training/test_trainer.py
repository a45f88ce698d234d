"""The trainer's step: what runs in which order, what it costs, and what stops it."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainingArguments

from dynabert import DynaBertForSequenceClassification, SubnetConfig, subnet_grid
from dynabert.evaluation import evaluate_grid
from dynabert.training import DynaBertTrainer, Stage
from dynabert.training.losses import hidden_state_loss, logit_loss
from dynabert.training.row_order import RowOrder
from dynabert.training.subnet_plan import SubnetPlan
from tests.training.conftest import SENTIMENT

FULL = SubnetConfig()
GRID = tuple(subnet_grid((1, 0.5, 0.25), (1, 0.5)))
WIDTHS = tuple(subnet_grid((1, 0.75, 0.25), (1,)))
MakeModel = Callable[..., DynaBertForSequenceClassification]
MakeArguments = Callable[..., TrainingArguments]
_OPTIONS = ("callbacks", "evaluator", "model", "activation_budget")


@pytest.fixture
def make_trainer(
    make_model: MakeModel, make_arguments: MakeArguments, make_rows: Any, collator: Any
) -> Callable[..., DynaBertTrainer]:
    def make(
        stage: Stage, num_rows: int = 16, problem: str = "classification", **settings: Any
    ) -> DynaBertTrainer:
        changes = {"num_labels": 1} if problem == "regression" else {}
        options = {k: settings.pop(k) for k in _OPTIONS if k in settings}
        return DynaBertTrainer(
            options.pop("model", None) or make_model(seed=1, **changes),
            make_arguments(**settings),
            stage=stage,
            problem=problem,  # type: ignore[arg-type]
            train_dataset=make_rows(num_rows, problem),
            data_collator=collator,
            teacher=make_model(seed=2, **changes) if stage.teacher else None,
            **options,
        )

    return make


def grid_stage(**changes: Any) -> Stage:
    settings: dict[str, Any] = {"teacher": "same-width", "hidden_weight": 0.5}
    return Stage("width-depth", **{"subnets": GRID, **settings, **changes})


def run_step(trainer: DynaBertTrainer, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Gradients of one optimiser step on `batches`, without taking it."""
    model = trainer.model
    trainer.get_batch_samples(iter(batches), len(batches), trainer.args.device)
    for index, batch in enumerate(batches):
        trainer.accelerator.gradient_state._set_sync_gradients(index == len(batches) - 1)
        trainer.training_step(model, batch)
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("problem", ["classification", "regression"])
@pytest.mark.parametrize("teacher", ["same-width", "full"])
def test_a_step_is_the_sum_of_the_subnets_losses(
    teacher: Any, problem: str, make_trainer: Any, make_model: MakeModel, make_batches: Any
) -> None:
    (batch,) = make_batches((8,), problem)
    stage = grid_stage(teacher=teacher, logit_weight=2.0)
    trainer = make_trainer(stage, problem=problem)
    gradients = run_step(trainer, [batch])

    changes = {"num_labels": 1} if problem == "regression" else {}
    student, taught = make_model(seed=1, **changes), make_model(seed=2, **changes)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    num_tokens = int(batch["attention_mask"].sum())
    total = torch.zeros(())
    for subnet in GRID:
        source = FULL if teacher == "full" else SubnetConfig(subnet.width_mult)
        with torch.no_grad():
            lesson = taught(**inputs, subnet=source, output_hidden_states=True)
        output = student(**inputs, subnet=subnet, output_hidden_states=True)
        targets = student.subnet_shape(subnet).hidden_targets
        total = total + 2 * logit_loss(output.logits, lesson.logits, problem)  # type: ignore[arg-type]
        total = total + 0.5 * hidden_state_loss(
            output.hidden_states, lesson.hidden_states, targets, num_tokens
        )
    total.backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, msg=name)


def test_without_a_teacher_the_loss_is_the_models_own(
    make_trainer: Any, make_model: MakeModel, make_batches: Any
) -> None:
    (batch,) = make_batches((8,))
    gradients = run_step(make_trainer(Stage("final", GRID)), [batch])
    student = make_model(seed=1)
    sum(student(**batch, subnet=subnet).loss for subnet in GRID).backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, msg=name)


@pytest.mark.parametrize(
    "stage",
    [Stage("final", GRID), grid_stage(), Stage("width", WIDTHS, "full", 1.0, 0.1)],
    ids=["labels", "width-depth", "width"],
)
def test_accumulating_4x8_equals_1x32(stage: Stage, make_trainer: Any, make_batches: Any) -> None:
    # Ragged rows: the four batches have different numbers of real tokens.
    (whole,) = make_batches((32,))
    parts = [{k: v[i : i + 8] for k, v in whole.items()} for i in range(0, 32, 8)]
    assert len({int(part["attention_mask"].sum()) for part in parts}) > 1
    at_once = run_step(make_trainer(stage, num_rows=32), [whole])
    in_parts = run_step(make_trainer(stage, num_rows=32), parts)
    for name, gradient in at_once.items():
        torch.testing.assert_close(in_parts[name], gradient, msg=name, rtol=1e-4, atol=1e-6)


def test_the_whole_loop_accumulates_4x8_as_1x32(make_trainer: Any) -> None:
    trained = []
    for size, parts in ((32, 1), (8, 4)):
        trainer = make_trainer(
            grid_stage(),
            num_rows=64,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=parts,
            max_grad_norm=0.5,
            logging_steps=2,
        )
        trainer._group_by_length = False  # grouping would put other rows together
        trainer.train()
        trained.append(trainer)
    at_once, in_parts = trained
    assert at_once.state.global_step == in_parts.state.global_step == 2
    for key in ("loss", "grad_norm", "loss_w0.25-d0.5"):
        first, second = (t.state.log_history[0][key] for t in trained)
        assert first == pytest.approx(second, rel=1e-4), key
    pairs = zip(at_once.model.parameters(), in_parts.model.parameters(), strict=True)
    for a, b in pairs:
        # Adam's first steps are lr times the sign of the gradient, whatever its size.
        assert (a - b).abs().max() < 1e-4


class Calls(torch.nn.Module):
    """A student that notes which subnets ran and whether gradients would be exchanged."""

    def __init__(self, model: DynaBertForSequenceClassification) -> None:
        super().__init__()
        self.model = model
        self.syncing = True
        self.seen: list[tuple[list[str], bool]] = []

    @contextmanager
    def no_sync(self) -> Any:
        self.syncing = False
        yield
        self.syncing = True

    def forward(self, **inputs: Any) -> Any:
        self.seen.append(([subnet.name for subnet in inputs["subnet"].subnets], self.syncing))
        return self.model(**inputs)


@pytest.mark.parametrize("teacher", ["same-width", "full", None], ids=str)
@pytest.mark.parametrize("budget", [0, 400_000, 4 << 30])
def test_only_the_last_pass_with_the_full_network_exchanges_gradients(
    teacher: Any,
    budget: int,
    make_trainer: Any,
    make_batches: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = make_trainer(grid_stage(teacher=teacher), activation_budget=budget)
    student = Calls(trainer.model)
    monkeypatch.setattr(type(trainer.accelerator), "use_distributed", property(lambda self: True))
    trainer.training_step(student, make_batches((4,))[0])
    passes = {0: len(GRID), 400_000: 3, 4 << 30: 1}[budget]
    assert [syncing for _, syncing in student.seen] == [False] * (passes - 1) + [True]
    names = [name for group, _ in student.seen for name in group]
    assert sorted(names) == sorted(subnet.name for subnet in GRID)
    assert (names[0], names[-1]) == ("w0.25-d0.5", FULL.name)


@pytest.mark.parametrize("problem", ["classification", "regression"])
def test_passes_of_a_step_add_up_to_one(problem: str, make_trainer: Any, make_batches: Any) -> None:
    batches = make_batches((4, 4), problem)
    at_once, in_parts = (
        run_step(make_trainer(grid_stage(), problem=problem, activation_budget=budget), batches)
        for budget in (4 << 30, 400_000)
    )
    for name, gradient in at_once.items():
        torch.testing.assert_close(in_parts[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(("teacher", "taught_by"), [("same-width", 3), ("full", 1)])
def test_all_teachers_run_in_one_pass(
    teacher: Any, taught_by: int, make_trainer: Any, make_batches: Any
) -> None:
    trainer = make_trainer(grid_stage(teacher=teacher))
    seen: list[list[str]] = []
    forward = trainer._teacher.forward

    def noted(**inputs: Any) -> Any:
        assert "labels" not in inputs
        assert not trainer._teacher.training and not torch.is_grad_enabled()
        seen.append([subnet.name for subnet in inputs["subnet"].subnets])
        return forward(**inputs)

    trainer._teacher.forward = noted
    trainer.training_step(trainer.model, make_batches((4,))[0])
    assert len(seen) == 1
    assert len(seen[0]) == len(set(seen[0])) == taught_by
    assert all(name.endswith("-d1") for name in seen[0])
    assert trainer.model.training
    assert all(p.grad is None and not p.requires_grad for p in trainer._teacher.parameters())


def test_embeddings_run_once_in_a_step(make_trainer: Any, make_batches: Any) -> None:
    trainer = make_trainer(grid_stage())
    calls = []
    trainer.model.dynabert.embeddings.register_forward_hook(lambda *_: calls.append(1))
    trainer.training_step(trainer.model, make_batches((4,))[0])
    assert len(calls) == 1


def test_hidden_states_are_asked_for_only_where_they_count(
    make_trainer: Any, make_batches: Any
) -> None:
    trainer = make_trainer(Stage("width", WIDTHS, "full", 1.0, 0.0))
    asked = []
    forward = trainer.model.forward

    def noted(**inputs: Any) -> Any:
        asked.append(inputs["output_hidden_states"])
        return forward(**inputs)

    trainer.model.forward = noted
    trainer.training_step(trainer.model, make_batches((4,))[0])
    assert asked == [False]


@pytest.mark.parametrize("sampling", ["sandwich", "sampled"])
def test_sampled_subnets_depend_on_seed_and_step_only(sampling: Any, make_model: MakeModel) -> None:
    stage = grid_stage(subnet_sampling=sampling, num_sampled=2)
    resolve = make_model().subnet_shape
    plan, again = SubnetPlan(stage, resolve, seed=1), SubnetPlan(stage, resolve, seed=1)
    steps = [[item.index for item in plan.at(step)] for step in range(40)]
    assert [[item.index for item in again.at(step)] for step in reversed(range(40))] == steps[::-1]
    assert all(step[-1] == GRID.index(FULL) for step in steps)
    assert all(len(step) == (4 if sampling == "sandwich" else 3) for step in steps)
    assert {index for step in steps for index in step} == set(range(len(GRID)))
    if sampling == "sandwich":
        assert all(GRID.index(SubnetConfig(0.25, 0.5)) in step for step in steps)
    other = SubnetPlan(stage, resolve, seed=2)
    assert [[item.index for item in other.at(step)] for step in range(40)] != steps


def test_a_width_for_each_layer_has_no_teacher_of_the_same_width(make_model: MakeModel) -> None:
    uneven = SubnetConfig(num_heads=(1, 2), intermediate_size=(12, 24))
    resolve = make_model().subnet_shape
    with pytest.raises(ValueError, match="width for each layer"):
        SubnetPlan(grid_stage(subnets=(FULL, uneven)), resolve, seed=0)
    plan = SubnetPlan(grid_stage(subnets=(FULL, uneven), teacher="full"), resolve, seed=0)
    assert [item.subnet for item in plan.at(0)] == [uneven, FULL]


def test_a_loss_that_is_not_finite_stops_before_the_optimiser_step(make_trainer: Any) -> None:
    trainer = make_trainer(Stage("width", WIDTHS, "full", 1.0, 0.1))
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    with torch.no_grad():  # reached by the two wider subnets only
        trainer.model.dynabert.encoder.layer[0].ffn.up_weight[20] = float("nan")
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    message = str(error.value)
    assert "stage width, step 1" in message
    assert "w0.75-d1 is nan, w1-d1 is nan" in message
    assert "w0.25" not in message
    for name, parameter in trainer.model.named_parameters():
        if not name.endswith("layer.0.ffn.up_weight"):
            assert torch.equal(parameter, before[name]), name


def test_the_log_has_the_mean_loss_of_every_subnet(make_trainer: Any) -> None:
    trainer = make_trainer(Stage("width", WIDTHS, "full", 1.0, 0.1), num_rows=32, logging_steps=2)
    seen: list[float] = []
    step = trainer.training_step
    trainer.training_step = lambda *args, **kw: seen.append(step(*args, **kw)) or seen[-1]
    trainer.train()
    first, second, *_ = trainer.state.log_history
    names = [f"loss_{subnet.name}" for subnet in WIDTHS]
    for entry, losses in ((first, seen[:2]), (second, seen[2:])):
        assert entry["loss"] == pytest.approx(float(sum(losses)) / 2, rel=1e-4)
        assert sum(entry[name] for name in names) == pytest.approx(entry["loss"], rel=1e-4)


def test_subnets_not_drawn_are_not_in_the_mean(make_trainer: Any) -> None:
    stage = grid_stage(subnet_sampling="sampled", num_sampled=1)
    trainer = make_trainer(stage, num_rows=32, logging_steps=1)
    trainer.train()
    for entry in trainer.state.log_history[:4]:
        losses = [value for name, value in entry.items() if name.startswith("loss_")]
        assert len(losses) == 2
        assert sum(losses) == pytest.approx(entry["loss"], rel=1e-4)


def test_biases_and_layer_norms_do_not_decay(make_trainer: Any, make_model: MakeModel) -> None:
    trainer = make_trainer(Stage("teacher", (FULL,)), weight_decay=0.1)
    decaying = set(trainer.get_decay_parameter_names(make_model()))
    attention = "dynabert.encoder.layer.0.attention."
    assert {attention + "qkv_weight", attention + "out_weight", "classifier.weight"} <= decaying
    for name in ("norm_weight", "norm_bias", "qkv_bias", "out_bias"):
        assert attention + name not in decaying
    assert "dynabert.embeddings.norm.weight" not in decaying
    optimizer = trainer.create_optimizer()
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}


def test_the_teacher_stage_overfits(make_trainer: Any) -> None:
    trainer = make_trainer(Stage("teacher", (FULL,)), num_train_epochs=12, learning_rate=5e-3)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize(
    ("stage", "problem"),
    [
        (Stage("width", WIDTHS, "full", 1.0, 0.1), "classification"),
        (Stage("width", WIDTHS, "full", 1.0, 0.1), "regression"),
        (grid_stage(hidden_weight=1.0), "classification"),
        (Stage("final", GRID), "regression"),
    ],
    ids=["width", "width-regression", "width-depth", "final-regression"],
)
def test_a_stage_with_subnets_overfits(stage: Stage, problem: str, make_trainer: Any) -> None:
    trainer = make_trainer(stage, problem=problem, num_train_epochs=25, learning_rate=5e-3)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    for name in [f"loss_{subnet.name}" for subnet in stage.subnets]:
        start, end = entries[0][name], entries[-1][name]
        # Soft cross entropy does not fall below the teacher's own entropy.
        assert end < (0.8 if stage.teacher and problem == "classification" else 0.4) * start, name


def test_bf16_autocast_trains_on_the_cpu(make_trainer: Any) -> None:
    trainer = make_trainer(grid_stage(), bf16=True)
    dtypes = []
    head = trainer.model.classifier
    head.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    trainer._teacher.classifier.register_forward_hook(
        lambda module, inputs, output: dtypes.append(output.dtype)
    )
    trainer.train()
    assert set(dtypes) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert all(entry["loss"] < 100 for entry in trainer.state.log_history if "loss" in entry)


def test_evaluate_reports_every_subnet_and_the_grid_mean(
    make_trainer: Any, make_rows: Any, collator: Any
) -> None:
    rows = make_rows(20, seed=9)

    def evaluator(model: Any) -> Any:
        return evaluate_grid(model, rows, collator, SENTIMENT, WIDTHS, progress=False)

    trainer = make_trainer(Stage("final", WIDTHS), evaluator=evaluator)
    metrics = trainer.evaluate()
    scores = [metrics[f"eval_{subnet.name}_accuracy"] for subnet in WIDTHS]
    assert metrics["eval_grid_mean"] == pytest.approx(sum(scores) / len(scores))
    assert trainer.state.log_history[-1]["eval_grid_mean"] == metrics["eval_grid_mean"]


def test_teacher_and_stage_have_to_agree(
    make_model: MakeModel, make_arguments: MakeArguments, make_rows: Any, collator: Any
) -> None:
    def build(stage: Stage, teacher: Any, problem: Any) -> DynaBertTrainer:
        return DynaBertTrainer(
            make_model(),
            make_arguments(),
            stage=stage,
            problem=problem,
            train_dataset=make_rows(8),
            data_collator=collator,
            teacher=teacher,
        )

    with pytest.raises(ValueError, match=r"teacher=NoneType with stage\.teacher='full'"):
        build(Stage("width", WIDTHS, "full"), None, "classification")
    with pytest.raises(ValueError, match="problem='none'"):
        build(Stage("final", WIDTHS), None, "none")
    with pytest.raises(ValueError, match=r"width_mult=0\.3"):
        build(Stage("final", (FULL, SubnetConfig(0.3))), None, "classification")


@pytest.mark.parametrize(
    ("stage", "asleep"),
    [
        (Stage("final", (SubnetConfig(0.5, 0.5),)), r"\.layer\.0\."),
        (grid_stage(logit_weight=0.0), r"pooler|classifier"),
        (grid_stage(), "nothing"),
    ],
    ids=["shallow", "states-only", "grid"],
)
def test_parameters_no_loss_reaches_are_frozen_while_training(
    stage: Stage, asleep: str, make_trainer: Any
) -> None:
    trainer = make_trainer(stage, weight_decay=0.1)
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, parameter in trainer.model.named_parameters():
        sleeps = re.search(asleep, name) is not None
        assert (id(parameter) in held) is not sleeps, name
        assert torch.equal(parameter, before[name]) is sleeps, name
        assert parameter.requires_grad


def test_rows_of_like_length_share_a_batch() -> None:
    lengths = [(7 * i) % 29 + 3 for i in range(103)]
    epochs = [
        list(RowOrder(lengths, 8, seed=4, epoch=lambda e=epoch: e, group_by_length=True))
        for epoch in (0, 1, 0)
    ]
    assert sorted(epochs[0]) == list(range(103))
    assert epochs[0] == epochs[2] != epochs[1]
    batches = [epochs[0][i : i + 8] for i in range(0, 103, 8)]
    padded = sum(max(lengths[r] for r in batch) * len(batch) for batch in batches)
    assert padded < 1.1 * sum(lengths)
    assert max(lengths) == lengths[epochs[0][0]]
    assert len(batches[-1]) == 103 % 8
    spans = [max(lengths[r] for r in batch) for batch in batches[1:-1]]
    assert spans != sorted(spans, reverse=True)


def test_rows_are_only_shuffled_without_grouping() -> None:
    order = list(RowOrder([5] * 50, 8, seed=4, epoch=lambda: 0, group_by_length=False))
    assert sorted(order) == list(range(50)) and order != sorted(order)
