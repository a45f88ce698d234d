"""One stage of training: `DynaBertTrainer`, a `transformers.Trainer` whose step trains several
subnets.

Stands above the losses and the plan of subnets, below `stages`, which strings stages together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from time import perf_counter
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainingArguments,
)

from dynabert.data.examples import Problem
from dynabert.evaluation import EncodedRows, GridRow, grid_mean
from dynabert.modeling_pretrained import DynaBertPreTrainedModel
from dynabert.subnet import SubnetConfig
from dynabert.training.arguments import Pooling, Stage
from dynabert.training.processes import from_first
from dynabert.training.progress import StageProgress
from dynabert.training.resumable_trainer import ResumableTrainer
from dynabert.training.row_order import RowOrder
from dynabert.training.sharding import prepare_sharding
from dynabert.training.step import (
    Batch,
    Lesson,
    Share,
    StepLosses,
    activation_bytes,
    micro_groups,
)
from dynabert.training.subnet_plan import PlannedSubnet, SubnetPlan

Inputs = dict[str, Any]
Evaluator = Callable[[nn.Module], Sequence[GridRow]]


class DynaBertTrainer(ResumableTrainer):
    """Trains the subnets of one `Stage` together: one optimiser step for the sum of their losses.

    All subnets of a step run in one forward and one backward pass, and so do their teachers. Where
    memory is short they run in groups, the full network in the last; with several processes
    (DistributedDataParallel or FSDP2) only that last pass exchanges gradients, which is exact and
    needs no ``find_unused_parameters``.

    Gradient accumulation, and several processes with ``average_tokens_across_devices``, give the
    step of one large batch: every batch is weighed by its share of the sequences, and in hidden
    states of the real tokens.

    The log has the mean loss of every subnet as ``loss_<subnet>`` beside their sum, ``loss``. A
    loss that is not finite stops training before the optimiser step. `evaluate` reports
    ``eval_grid_mean`` and ``eval_<subnet>_<metric>``.

    Args:
        model: The student; rewired, if subnets are to be trained.
        args: As for any Trainer, but `group_by_length` takes the place of the fields of that kind.
        stage: Subnets, teacher and weights of the losses.
        problem: ``classification``, ``regression``, or ``none`` to learn hidden states and pooled
            output.
        train_dataset: Tokenised rows.
        data_collator: Makes a batch of rows.
        teacher: Model to learn from, needed if the stage has one; frozen and put in eval mode.
        evaluator: Scores the model on the stage's subnets; needed by `evaluate`. Every process
            calls it, and what it returns in the first one counts.
        pooling: How `problem` ``none`` pools hidden states.
        group_by_length: Put rows of like length into a batch.
        activation_budget: Bytes that the activations of one forward pass may take, estimated;
            subnets beyond it wait for the next pass of the step.
        callbacks: Further callbacks.

    Raises:
        ValueError: Stage and teacher do not fit each other, a subnet does not fit the network, or
            there are several GPUs in one process.

    Example:
        >>> widths = tuple(subnet_grid(depths=(1.0,)))  # doctest: +SKIP
        >>> stage = Stage("width", widths, "full", 1.0, 0.1)  # doctest: +SKIP
        >>> trainer = DynaBertTrainer(
        ...     student, args, stage=stage, problem="classification", train_dataset=rows,
        ...     data_collator=collator, teacher=teacher,
        ... )  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    # The loss comes out of `training_step` as its part of the whole optimiser step.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: DynaBertPreTrainedModel,
        args: TrainingArguments,
        *,
        stage: Stage,
        problem: Problem,
        train_dataset: EncodedRows,
        data_collator: Callable[[list[Any]], dict[str, Any]],
        teacher: DynaBertPreTrainedModel | None = None,
        evaluator: Evaluator | None = None,
        pooling: Pooling = "mean",
        group_by_length: bool = True,
        activation_budget: int = 4 << 30,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        if (teacher is None) != (stage.teacher is None):
            raise ValueError(
                f"DynaBertTrainer: teacher={type(teacher).__name__} with "
                f"stage.teacher={stage.teacher!r}, expected both or neither. Pass the model the "
                "stage learns from."
            )
        if stage.teacher is None and problem == "none":
            raise ValueError(
                "DynaBertTrainer: problem='none' with stage.teacher=None, expected a teacher. "
                "There is nothing else to learn from without labels."
            )
        if args.n_gpu > 1:
            raise ValueError(
                f"DynaBertTrainer: {args.n_gpu} GPUs in one process, expected one in each. "
                "Start with torchrun, or set CUDA_VISIBLE_DEVICES."
            )
        self._plan = SubnetPlan(stage, model.subnet_shape, args.seed)
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            # The evaluator holds its own rows; the Trainer only asks whether there are any.
            eval_dataset=train_dataset if evaluator is not None else None,
            callbacks=callbacks,
        )
        if self.is_fsdp_enabled:
            prepare_sharding(self.accelerator.state.fsdp_plugin)
        # The Trainer has seeded all processes alike, and each shall drop activations of its own.
        torch.manual_seed(args.seed + args.process_index)
        # Keeps the Trainer from counting labels for a normalisation that is done here.
        self.model_accepts_loss_kwargs = False
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        if not args.disable_tqdm:
            self.add_callback(StageProgress(stage.name))
        self._stage = stage
        self._losses = StepLosses(stage, problem, pooling)
        self._config = model.config
        self._activation_budget = activation_budget
        self._group_by_length = group_by_length
        self._evaluator = evaluator
        self._rows = train_dataset
        self._teacher = cast("nn.Module | None", teacher)
        if self._teacher is not None:
            self._teacher.to(args.device).eval().requires_grad_(False)
        num_subnets = len(stage.subnets)
        self._step_losses = torch.zeros(num_subnets, device=args.device)
        self._logged_losses = torch.zeros(num_subnets, device=args.device)
        self._logged_steps = [0] * num_subnets
        self._step_totals: Tensor | None = None
        self._largest_batch: tuple[int, int] | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `ResumableTrainer` does. Parameters that no loss reaches are frozen meanwhile;
        DistributedDataParallel would wait for their gradients."""
        model = cast(DynaBertPreTrainedModel, self.model)
        names = [
            name
            for name in self._losses.untaught(model, self._plan.at(0))
            if model.get_parameter(name).requires_grad
        ]
        for name in names:
            model.get_parameter(name).requires_grad_(False)
        try:
            return super().train(*args, **kwargs)
        finally:
            for name in names:
                model.get_parameter(name).requires_grad_(True)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches in the order of `RowOrder`, the same whether training was interrupted or not."""
        args = self.args
        rows = self._rows
        lengths = getattr(rows, "lengths", None)
        if lengths is None:
            lengths = [len(rows[index]["input_ids"]) for index in range(len(rows))]
        batch_size = self._train_batch_size
        order = RowOrder(
            lengths,
            batch_size * args.world_size,  # a batch of one process that all divide among them
            args.data_seed if args.data_seed is not None else args.seed,
            lambda: int(self.state.epoch or 0),
            group_by_length=self._group_by_length,
        )
        loader: DataLoader[Any] = DataLoader(
            cast("Dataset[Any]", rows),
            batch_size=batch_size,
            sampler=order,
            collate_fn=self.data_collator,
            drop_last=args.dataloader_drop_last,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
        )
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Inputs], None]:
        """The batches of one optimiser step; what each weighs is noted for `training_step`."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        if not batches:
            return [], None
        spread = self.args.world_size > 1 and self.args.average_tokens_across_devices
        self._step_totals = None
        if spread or len(batches) > 1:
            totals = torch.stack([_counts(batch) for batch in batches]).sum(dim=0)
            if spread:
                # DistributedDataParallel divides the sum of gradients by the number of processes.
                gathered = self.accelerator.gather(totals.to(self.args.device)[None])
                totals = gathered.sum(dim=0) / self.args.world_size
            self._step_totals = totals
        if self.is_fsdp_enabled:
            # All processes gather the weights of a pass together, so all must make the same passes.
            shapes = torch.tensor([batch["attention_mask"].shape for batch in batches])
            shapes = self.accelerator.gather(shapes.to(self.args.device))
            self._largest_batch = tuple(shapes.amax(dim=0).tolist())
        return batches, None

    def training_step(
        self, model: nn.Module, inputs: Inputs, num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward of every subnet of this step on one batch.

        Args:
            model: The student as the Trainer has wrapped it.
            inputs: One batch.
            num_items_in_batch: Not used.

        Returns:
            Sum of the losses of all subnets, scalar, detached.

        Raises:
            FloatingPointError: The loss of a subnet is not finite.
        """
        model.train()
        batch = self._batch(inputs)
        planned = self._plan.at(self.state.global_step)
        lessons: dict[SubnetConfig, Lesson] = {}
        if self._teacher is not None:
            taught_by = [item.teacher for item in planned if item.teacher is not None]
            with self.accelerator.autocast():
                lessons = self._losses.lessons(self._teacher, batch, taught_by)
        total = torch.zeros((), device=self.args.device)
        groups = self._micro_groups(planned, batch)
        for group in groups:
            is_last = group is groups[-1]
            exchanges = is_last and self.accelerator.sync_gradients
            with nullcontext() if exchanges else self.accelerator.no_sync(model):
                losses = self._losses(model, batch, group, lessons)
                self.accelerator.backward(losses.sum())
            numbers = torch.tensor([item.index for item in group], device=losses.device)
            self._step_losses.index_add_(0, numbers, losses.detach())
            total += losses.detach().sum()
        if self.accelerator.sync_gradients:
            self._end_step(planned)
        return total

    def _batch(self, inputs: Inputs) -> Batch:
        inputs = self._prepare_inputs(inputs)
        share = Share()
        if self._step_totals is not None:
            share = Share(*(_counts(inputs) / self._step_totals.to(self.args.device)))
        return Batch(inputs, share, with_padding=self._stage.hidden_padding)

    def _micro_groups(
        self, planned: list[PlannedSubnet], batch: Batch
    ) -> list[list[PlannedSubnet]]:
        # Padded positions are an upper bound of the tokens that needs no wait for the device.
        num_rows, seq_len = self._largest_batch or batch.mask.shape
        itemsize = 2 if self.args.bf16 or self.args.fp16 else 4
        sizes = [
            activation_bytes(item.shape, self._config, num_rows * seq_len, seq_len, itemsize)
            for item in planned
        ]
        return micro_groups(planned, sizes, self._activation_budget)

    def _end_step(self, planned: list[PlannedSubnet]) -> None:
        # The one point where a step waits for the device: an optimiser step with a bad gradient
        # cannot be undone. It is the same mean in all processes, so that none goes on alone.
        means = self.accelerator.reduce(self._step_losses, "mean")
        if not bool(means.isfinite().all()):
            losses = means.tolist()
            bad = [
                f"{item.subnet.name} is {losses[item.index]}"
                for item in planned
                if not math.isfinite(losses[item.index])
            ]
            raise FloatingPointError(
                f"DynaBertTrainer: stage {self._stage.name}, step {self.state.global_step + 1}: "
                f"the loss of subnet {', '.join(bad)}, expected finite numbers. The optimiser step "
                "was not taken; lower learning_rate, or check the data and the weights the stage "
                "started from."
            )
        self._logged_losses += means
        self._step_losses.zero_()
        for item in planned:
            self._logged_steps[item.index] += 1

    def log_state(self) -> dict[str, Any]:
        """The sums behind the mean loss of each subnet, besides the Trainer's own."""
        return {
            **super().log_state(),
            "subnet_loss_sums": self._logged_losses.tolist(),
            "subnet_steps": list(self._logged_steps),
        }

    def load_log_state(self, state: dict[str, Any]) -> None:
        """Go on gathering from what `log_state` returned."""
        super().load_log_state(state)
        self._logged_losses.copy_(torch.tensor(state["subnet_loss_sums"]))
        self._logged_steps = list(state["subnet_steps"])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the Trainer does, with the mean loss of each subnet since the last time."""
        if "loss" in logs:
            sums = self._logged_losses.tolist()
            for subnet, value, count in zip(
                self._stage.subnets, sums, self._logged_steps, strict=True
            ):
                if count:
                    logs[f"loss_{subnet.name}"] = value / count
            self._logged_losses.zero_()
            self._logged_steps = [0] * len(self._logged_steps)
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Score the stage's subnets with the evaluator given on construction; the arguments but the
        last are not used.

        Returns:
            ``<prefix>_grid_mean``, ``<prefix>_<subnet>_<metric>`` and ``<prefix>_seconds``.

        Raises:
            ValueError: There is no evaluator.
        """
        if self._evaluator is None:
            raise ValueError(
                "DynaBertTrainer: evaluator=None, expected one. Pass evaluator= on construction."
            )
        start = perf_counter()
        assert isinstance(self.model, nn.Module)
        rows = self._evaluator(self.model)
        # The best model is chosen by these numbers, and must be the same in all processes.
        rows = from_first(lambda: rows)
        metrics = {
            f"{metric_key_prefix}_{row.subnet.name}_{name}": value
            for row in rows
            for name, value in row.metrics.items()
        }
        metrics[f"{metric_key_prefix}_grid_mean"] = grid_mean(rows)
        metrics[f"{metric_key_prefix}_seconds"] = perf_counter() - start
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Weights of two or more dimensions that are no bias: LayerNorm and biases never decay,
        whatever their names."""
        return [
            name
            for name, parameter in model.named_parameters()
            if parameter.dim() > 1 and "bias" not in name.rpartition(".")[2]
        ]

    def floating_point_ops(self, inputs: Inputs) -> int:
        """0: the Trainer's estimate counts the whole network once, whatever runs; see
        `dynabert.flops`."""
        return 0


def _counts(batch: Mapping[str, Tensor]) -> Tensor:
    """Sequences, real tokens and labels of a batch, ``[3]`` float32, on the batch's device."""
    mask = batch["attention_mask"]
    num_sequences = torch.tensor(float(len(mask)), device=mask.device)
    labels = batch.get("labels")
    if labels is None or labels.is_floating_point():
        num_labels = num_sequences
    else:
        num_labels = (labels != -100).sum().float()
    return torch.stack([num_sequences, mask.sum().float(), num_labels])
