"""Our training step beside the loops of `gpu_training`: same weights, same losses, one ragged pass.

The losses are those of the product's trainer (`dynabert.training.step`), which runs every subnet of
a step in one forward and one backward pass; clipping and the optimizer are those of the peers.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch

from benchmarks.geometry import DEPTHS, WIDTHS
from benchmarks.gpu_ours import backend_of, our_config
from benchmarks.gpu_timing import relative_error
from dynabert import (
    DynaBertForSequenceClassification,
    SubnetConfig,
    modeling_dynabert,
    subnet_grid,
)
from dynabert.hf_checkpoint import PREFIX, from_hf_state_dict, to_hf_state_dict
from dynabert.modeling_steps import LayerStep, sent_steps
from dynabert.training.arguments import Stage
from dynabert.training.step import Batch, Share, StepLosses
from dynabert.training.subnet_plan import SubnetPlan
from dynabert_kernels import use_backend

if TYPE_CHECKING:
    from benchmarks.gpu_training import Mark, Trainer

HIDDEN_WEIGHT = 0.1
SENT = "sent_steps"
STAGES = {
    "width_stage": Stage("width", tuple(subnet_grid(WIDTHS, (1.0,))), "full", 1.0, HIDDEN_WEIGHT),
    "depth_stage": Stage(
        "width-depth", tuple(subnet_grid(WIDTHS, DEPTHS)), "same-width", 1.0, HIDDEN_WEIGHT
    ),
}


class OurTrainer:
    """Our student and teacher with the weights and the batch of the peers' `Trainer`."""

    def __init__(self, peers: Trainer) -> None:
        self.device, self.peers = peers.device, peers
        config = our_config(peers.geometry, num_labels=2)
        state = {name: tensor.cpu() for name, tensor in peers.model.state_dict().items()}
        self.model = DynaBertForSequenceClassification(config)
        self.model.load_state_dict(from_hf_state_dict(state, config, prefix=PREFIX))
        self.model.to(peers.device)
        self.teacher = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.model.train()
        self.inputs = {"input_ids": peers.ids, "attention_mask": torch.ones_like(peers.ids)}
        self._sent: dict[str, tuple[LayerStep, ...]] = {}
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=2e-5, fused=True, capturable=peers.device == "cuda"
        )
        self.planned = {
            name: SubnetPlan(stage, self.model.subnet_shape, seed=0).at(0)
            for name, stage in STAGES.items()
        }
        self.stage_losses = {
            name: StepLosses(stage, "classification", "mean") for name, stage in STAGES.items()
        }

    def losses(self, stage: str, mark: Mark, *, cached: bool = True) -> torch.Tensor:
        """Forward and backward of every subnet of a stage; the losses in the peers' order.

        Not `cached` is for a graph, which cannot copy from the host: widths are sent once, and that
        no token is padding is said instead of read from the mask.
        """
        self.optimizer.zero_grad(set_to_none=True)
        planned, losses = self.planned[stage], self.stage_losses[stage]
        sends = nullcontext() if cached else patch.object(modeling_dynabert, SENT, self._kept)
        backend = use_backend(backend_of(self.device))
        with self.peers.autocast(cached=cached), backend, sends:
            batch = Batch(self.inputs, Share())
            if not cached:
                del batch.unlabelled["attention_mask"]
            taught_by = [item.teacher for item in planned if item.teacher is not None]
            lessons = losses.lessons(self.teacher, batch, taught_by)
            mark("teacher")
            found = losses(self.model, batch, planned, lessons)
            mark("forward")
        found.sum().backward()
        mark("backward")
        by_subnet = {item.subnet: loss for item, loss in zip(planned, found.detach(), strict=True)}
        depths = (1.0,) if stage == "width_stage" else DEPTHS
        order = [SubnetConfig(width, depth) for width in WIDTHS for depth in depths]
        return torch.stack([by_subnet[subnet] for subnet in order])

    def _kept(self, steps: tuple[LayerStep, ...], device: torch.device) -> tuple[LayerStep, ...]:
        """`sent_steps`, once for each stage."""
        key = repr(steps)
        if key not in self._sent:
            self._sent[key] = sent_steps(steps, device)
        return self._sent[key]

    def step(self, stage: str, mark: Mark, *, cached: bool = True) -> torch.Tensor:
        """One optimizer step of a stage; its losses."""
        losses = self.losses(stage, mark, cached=cached)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        mark("clip")
        self.optimizer.step()
        mark("optimizer")
        return losses

    def gradients(self) -> dict[str, torch.Tensor]:
        """Gradients of the last `losses` under Hugging Face's names."""
        own = {
            name: parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            for name, parameter in self.model.named_parameters()
        }
        return to_hf_state_dict(own, self.model.config)


def check(peers: Trainer, ours: OurTrainer, stage: str) -> dict[str, float]:
    """Relative errors of our losses and gradients, and of the eager loop's, against float32.

    Without dropout. Dropout's masks are none of PyTorch's, so a step with it has no reference here.

    Returns:
        The errors by name.

    Raises:
        ValueError: Ours are more than twice the eager loop's, and above what bfloat16 explains.
    """
    autocast = peers.autocast
    dropout_p, peers.dropout_p = peers.dropout_p, 0.0
    peers.model.eval()
    ours.model.eval()
    try:
        peers.autocast = lambda **_: nullcontext()  # type: ignore[method-assign]
        truth = _results(peers, stage)
        peers.autocast = autocast  # type: ignore[method-assign]
        loop = _results(peers, stage)
        losses = ours.losses(stage, lambda _: None)
        found = losses, _flat(ours.gradients(), truth[2])
    finally:
        peers.autocast = autocast  # type: ignore[method-assign]
        peers.dropout_p = dropout_p
        peers.model.train()
        ours.model.train()
    errors = {}
    for index, what in enumerate(("losses", "gradients")):
        own, plain = (relative_error(part[index], truth[index]) for part in (found, loop))
        errors |= {what: own, f"{what} of the loop": plain}
        if not own <= 2 * plain + 1e-3:
            raise ValueError(
                f"wrong: {stage}, {what} differ from float32's by {own:.2e}, the eager loop's "
                f"by {plain:.2e}"
            )
    return {name: float(f"{error:.3g}") for name, error in errors.items()}


def _results(peers: Trainer, stage: str) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    losses = peers.losses(stage, lambda _: None)
    gradients: dict[str, Any] = {
        name: parameter.grad
        for name, parameter in peers.model.named_parameters()
        if parameter.grad is not None
    }
    names = list(gradients)
    return losses, _flat(gradients, names), names


def _flat(gradients: dict[str, torch.Tensor], names: list[str]) -> torch.Tensor:
    return torch.cat([gradients[name].float().flatten() for name in names])
