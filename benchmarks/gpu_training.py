"""Section E: training steps of a DynaBERT in plain PyTorch and of ours, and full fine-tuning.

The width stage follows DynaBERT, algorithm 1: one teacher forward without gradient, then forward
and backward of each width on views of one full model's weights, gradients summed, one clipped
AdamW step. The depth stage runs 4 teacher widths and 12 subnets. Losses are the soft
cross-entropy of the logits plus the mean squared differences of the hidden states.
Weights are float32 under bf16 autocast; dropout is on. Ours (`gpu_training_ours`) runs all subnets
of a step in one ragged pass. Letters: see `benchmarks.geometry`.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers import BertForSequenceClassification

from benchmarks import peer_models
from benchmarks.geometry import BASE, DEPTHS, TINY, WIDTHS, Subnet
from benchmarks.gpu_encoder_peers import compiled
from benchmarks.gpu_timing import Variant, graphed, heat_up, measure, relative_error
from benchmarks.records import Deadline, Recorder

SECTION = "E training"
Layer = Callable[..., torch.Tensor]
Mark = Callable[[str], None]


def sliced_layer(
    hidden: torch.Tensor,
    num_heads: int,
    head_dim: int,
    neurons: int,
    dropout_p: float,
    query_weight: torch.Tensor,
    query_bias: torch.Tensor,
    key_weight: torch.Tensor,
    key_bias: torch.Tensor,
    value_weight: torch.Tensor,
    value_bias: torch.Tensor,
    out_weight: torch.Tensor,
    out_bias: torch.Tensor,
    attention_norm_weight: torch.Tensor,
    attention_norm_bias: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor,
    ffn_norm_weight: torch.Tensor,
    ffn_norm_bias: torch.Tensor,
) -> torch.Tensor:
    """One layer at a width, on views of the full weights: hidden ``[B, S, C]``."""
    batch_size, seq_len, channels = hidden.shape
    inner = num_heads * head_dim

    def project(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        x = F.linear(hidden, weight[:inner], bias[:inner])
        return x.view(batch_size, seq_len, num_heads, head_dim).transpose(1, 2)

    context = F.scaled_dot_product_attention(
        project(query_weight, query_bias),
        project(key_weight, key_bias),
        project(value_weight, value_bias),
        dropout_p=dropout_p,
    )
    context = context.transpose(1, 2).reshape(batch_size, seq_len, inner)
    x = F.dropout(F.linear(context, out_weight[:, :inner], out_bias), dropout_p) + hidden
    x = F.layer_norm(x, (channels,), attention_norm_weight, attention_norm_bias, 1e-12)
    up = F.gelu(F.linear(x, up_weight[:neurons], up_bias[:neurons]))
    y = F.dropout(F.linear(up, down_weight[:, :neurons], down_bias), dropout_p) + x
    return F.layer_norm(y, (channels,), ffn_norm_weight, ffn_norm_bias, 1e-12)


def _layer_parameters(layer: torch.nn.Module) -> list[torch.Tensor]:
    attention, output = layer.attention.self, layer.attention.output
    modules = (attention.query, attention.key, attention.value, output.dense, output.LayerNorm)
    modules += (layer.intermediate.dense, layer.output.dense, layer.output.LayerNorm)
    return [tensor for module in modules for tensor in (module.weight, module.bias)]


@dataclass
class Outputs:
    """What the losses compare: hidden states (embeddings first), ``[B, S, C]`` each, and logits."""

    hidden_states: list[torch.Tensor]
    logits: torch.Tensor


def forward_subnet(
    model: BertForSequenceClassification,
    ids: torch.Tensor,
    subnet: Subnet,
    layer: Layer,
    dropout_p: float,
) -> Outputs:
    """The full model's weights, sliced at run time; ids ``[B, S]``."""
    embeddings = model.bert.embeddings
    hidden = embeddings(ids)
    states = [hidden]
    for index in subnet.layers:
        hidden = layer(
            hidden,
            subnet.num_heads,
            subnet.geometry.head_dim,
            subnet.intermediate_size,
            dropout_p,
            *_layer_parameters(model.bert.encoder.layer[index]),
        )
        states.append(hidden)
    pooled = F.dropout(model.bert.pooler(hidden), dropout_p)
    return Outputs(states, model.classifier(pooled))


def hidden_targets(num_layers: int, kept: int) -> list[int]:
    """Teacher state matched by each student state: embeddings, then every kept layer's target."""
    return [0, *(i * num_layers // kept for i in range(1, kept + 1))]


def distillation_loss(student: Outputs, teacher: Outputs) -> torch.Tensor:
    """DynaBERT, equations 5 to 7: soft cross-entropy plus squared hidden-state differences."""
    soft = F.softmax(teacher.logits.float(), -1)
    loss = -(soft * F.log_softmax(student.logits.float(), -1)).sum(-1).mean()
    kept, available = len(student.hidden_states) - 1, len(teacher.hidden_states) - 1
    targets = hidden_targets(available, kept)
    for state, target in zip(student.hidden_states, targets, strict=True):
        loss = loss + 0.1 * F.mse_loss(state.float(), teacher.hidden_states[target].float())
    return loss


class Trainer:
    """Model, teacher, optimizer and the measured steps."""

    def __init__(self, device: str, *, smoke: bool) -> None:
        self.device = device
        self.geometry = TINY if smoke else BASE
        self.batch_size, self.seq_len = (2, 8) if smoke else (32, 128)
        torch.manual_seed(0)
        config = peer_models.hf_config(self.geometry, num_labels=2)
        self.model = BertForSequenceClassification(config).to(device)
        peer_models.randomize(self.model)
        self.teacher = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.model.train()
        self.dropout_p = 0.1
        shape = (self.batch_size, self.seq_len)
        self.ids = torch.randint(0, self.geometry.vocab_size, shape, device=device)
        self.labels = torch.randint(0, 2, shape[:1], device=device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=2e-5, fused=True, capturable=device == "cuda"
        )

    def subnet(self, width: float, depth: float = 1.0) -> Subnet:
        """One of the geometry's subnets."""
        return Subnet(self.geometry, width, depth)

    def autocast(self, *, cached: bool = True) -> Any:
        """bf16 autocast; the cache of cast weights must be off inside a CUDA graph."""
        return torch.autocast(self.device, torch.bfloat16, cache_enabled=cached)

    def update(self, mark: Mark) -> None:
        """Clip and step; official code clips at norm 1."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        mark("clip")
        self.optimizer.step()
        mark("optimizer")

    def fine_tuning_step(self, mark: Mark) -> None:
        """Hugging Face's own model at full size, labels' loss."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            loss = self.model(self.ids, labels=self.labels).loss
        mark("forward")
        loss.backward()
        mark("backward")
        self.update(mark)

    def losses(
        self, stage: str, mark: Mark, layer: Layer = sliced_layer, *, cached: bool = True
    ) -> torch.Tensor:
        """Forward and backward of every subnet of a stage; the losses, in order of width, depth.

        The width stage has one teacher, at full width; the depth stage one of each width.
        """
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        teacher = None
        for width in WIDTHS:
            if teacher is None or stage == "depth_stage":
                subnet = self.subnet(1.0 if stage == "width_stage" else width)
                with torch.no_grad(), self.autocast(cached=cached):
                    teacher = forward_subnet(self.teacher, self.ids, subnet, layer, 0.0)
                mark("teacher")
            for depth in (1.0,) if stage == "width_stage" else DEPTHS:
                subnet, dropout_p = self.subnet(width, depth), self.dropout_p
                with self.autocast(cached=cached):
                    student = forward_subnet(self.model, self.ids, subnet, layer, dropout_p)
                    losses.append(distillation_loss(student, teacher))
                mark(f"w{width:g} forward")
                losses[-1].backward()
                mark(f"w{width:g} backward")
        return torch.stack([loss.detach() for loss in losses])

    def step(
        self, stage: str, mark: Mark, layer: Layer = sliced_layer, *, cached: bool = True
    ) -> torch.Tensor:
        """One optimizer step of a stage; its losses."""
        losses = self.losses(stage, mark, layer, cached=cached)
        self.update(mark)
        return losses

    def flops(self, stage: str) -> float:
        """Encoder operations of a step; a backward pass counts twice its forward."""

        def forward(width: float, depth: float = 1.0) -> float:
            return self.subnet(width, depth).flops(self.batch_size, self.seq_len)

        if stage == "fine_tuning":
            return 3 * forward(1.0)
        if stage == "width_stage":
            return forward(1.0) + 3 * sum(forward(w) for w in WIDTHS)
        students = sum(forward(w, d) for w in WIDTHS for d in DEPTHS)
        return sum(forward(w) for w in WIDTHS) + 3 * students

    def slicing_error(self, width: float) -> float:
        """Sliced forward against the extracted dense Hugging Face model, float32, no dropout."""
        subnet = self.subnet(width, 0.5)
        with torch.no_grad():
            output = forward_subnet(self.teacher, self.ids, subnet, sliced_layer, 0.0)
            small = peer_models.extract(self.teacher.bert, subnet)
            reference = small(self.ids).last_hidden_state
        return relative_error(output.hidden_states[-1], reference)

    def layer_error(self, layer: Layer, width: float) -> float:
        """Largest difference a layer implementation makes, gradients included; no dropout."""

        def run(implementation: Layer) -> list[torch.Tensor]:
            self.model.zero_grad(set_to_none=True)
            with self.autocast():
                out = forward_subnet(
                    self.teacher_in_training, self.ids, self.subnet(width), implementation, 0.0
                )
            state = out.hidden_states[-1]
            weight = self.teacher_in_training.bert.encoder.layer[0].intermediate.dense.weight
            (gradient,) = torch.autograd.grad((state.float() ** 2 * self.probe).mean(), weight)
            return [state.detach(), gradient]

        self.teacher_in_training = copy.deepcopy(self.teacher).requires_grad_(True)
        generator = torch.Generator().manual_seed(1)
        shape = (self.batch_size, self.seq_len, self.geometry.hidden_size)
        self.probe = torch.randn(shape, generator=generator).to(self.device)
        pairs = zip(run(layer), run(sliced_layer), strict=True)
        return max(relative_error(a, b) for a, b in pairs)


def _ignore(_: str) -> None:
    """A mark that records nothing."""


def phase_shares(step: Callable[[Mark], None], device: str) -> dict[str, float]:
    """Fraction of one step's stream time spent up to each mark; marks of one name are summed."""
    if device != "cuda":
        return {}
    events: list[tuple[str, torch.cuda.Event]] = []

    def mark(name: str) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        events.append((name, event))

    mark("start")
    step(mark)
    torch.cuda.synchronize()
    shares: dict[str, float] = {}
    total = events[0][1].elapsed_time(events[-1][1])
    for (_, before), (name, after) in itertools.pairwise(events):
        shares[name] = shares.get(name, 0.0) + before.elapsed_time(after) / total
    return {name: round(share, 4) for name, share in shares.items()}


def time_steps(
    recorder: Recorder,
    trainer: Trainer,
    stage: str,
    steps: dict[str, Callable[[Mark], None]],
    variants: dict[str, Variant] | None = None,
) -> None:
    """Time the implementations of one stage against each other, twice, with their phases.

    The clock is the stream from the first to the last kernel of a step without a backlog: where
    the host cannot keep up, its time is the step's time, as in training.
    """
    device = trainer.device
    competitors = {name: Variant(partial(step, _ignore)) for name, step in steps.items()}
    competitors |= variants or {}
    for repeat in (1, 2):
        timings = measure(competitors, device, samples=8, max_s=2.5, backlog_ms=0)
        for name, timing in timings.items():
            recorder.add(
                SECTION,
                stage,
                peer=name,
                dtype="bf16 autocast",
                shape={"B": trainer.batch_size, "S": trainer.seq_len},
                subnet="all" if stage != "fine_tuning" else "w1-d1",
                timing=timing,
                flops=trainer.flops(stage),
                ceiling_of="bf16",
                phases=phase_shares(steps[name], device) if name in steps else None,
                repeat=repeat,
            )


def capture_step(
    recorder: Recorder, device: str, stage: str, name: str, step: Callable[..., torch.Tensor]
) -> dict[str, Variant]:
    """A step as one CUDA graph, or nothing after recording why not."""
    if device != "cuda":
        return {}
    with recorder.guarded(SECTION, stage, peer=name):
        expected = step(_ignore)
        variant = graphed([partial(step, _ignore, cached=False)], device, fall_back=False)
        for _ in range(2):
            variant.output.fill_(float("nan"))
            variant.run()
            wrong = relative_error(variant.output, expected)
            # Dropout and the steps in between move the losses by hundredths.
            if not wrong < 0.2:
                raise ValueError(f"wrong: losses of the graph differ by {wrong:.2e}")
        return {name: variant}
    return {}


def run(
    recorder: Recorder, device: str, *, budget_s: float, smoke: bool, with_ours: bool = True
) -> None:
    """Section E within `budget_s` seconds."""
    deadline = Deadline(budget_s)
    trainer = Trainer(device, smoke=smoke)
    heat_up(device)
    for width in WIDTHS:
        wrong = trainer.slicing_error(width)
        if not wrong < 1e-4:
            message = f"wrong: sliced forward differs from Hugging Face's by {wrong:.2e}"
            recorder.add(SECTION, "check", error=message, subnet=f"w{width:g}")
            return
        recorder.add(SECTION, "check", rel_err=wrong, subnet=f"w{width:g}-d0.5")
    ours = checked_ours(recorder, trainer) if with_ours else None
    stages = ("width_stage", "depth_stage")
    steps: dict[str, dict[str, Any]] = {
        stage: {"sliced eager": partial(trainer.step, stage)} for stage in stages
    }
    for stage in stages if ours is not None else ():
        steps[stage]["ours"] = partial(ours.step, stage)
    layer = None
    with recorder.guarded(SECTION, "check compiled"):
        layer = compiled(sliced_layer, None, device)
        # One width only: without dropout each width would be compiled once more for its check.
        wrong = trainer.layer_error(layer, 0.5)
        if not wrong < 5e-2:
            raise ValueError(f"compiled layer differs from the eager one by {wrong:.2e}")
        recorder.add(SECTION, "check compiled", rel_err=wrong, subnet="w0.5-d1")
        steps["width_stage"]["sliced compiled"] = partial(trainer.step, "width_stage", layer=layer)
    with recorder.guarded(SECTION, "width_stage"):
        time_steps(recorder, trainer, "width_stage", steps["width_stage"])
    time_graphs(recorder, trainer, "width_stage", steps["width_stage"], deadline)
    if layer is not None and deadline.left_s() > 15:
        steps["depth_stage"]["sliced compiled"] = partial(trainer.step, "depth_stage", layer=layer)
    with recorder.guarded(SECTION, "depth_stage"):
        time_steps(recorder, trainer, "depth_stage", steps["depth_stage"])
    time_graphs(recorder, trainer, "depth_stage", steps["depth_stage"], deadline)
    with recorder.guarded(SECTION, "fine_tuning"):
        time_steps(recorder, trainer, "fine_tuning", {"hf eager": trainer.fine_tuning_step})


def time_graphs(
    recorder: Recorder,
    trainer: Trainer,
    stage: str,
    steps: dict[str, Callable[..., torch.Tensor]],
    deadline: Deadline,
) -> None:
    """The steps of a stage again, each in a CUDA graph, ours last: a capture that fails can leave
    the random generator unusable."""
    graphs: dict[str, Variant] = {}
    for name in sorted(steps, key=lambda name: name == "ours"):
        if deadline.left_s() < 5:
            recorder.add(SECTION, stage, peer=f"{name} graph", error="shed: no time left")
            continue
        graphs |= capture_step(recorder, trainer.device, stage, f"{name} graph", steps[name])
    if graphs:
        with recorder.guarded(SECTION, stage):
            time_steps(recorder, trainer, stage, {}, graphs)


def checked_ours(recorder: Recorder, trainer: Trainer) -> Any:
    """Our trainer if its losses and gradients are right; None after recording why not."""
    from benchmarks.gpu_training_ours import OurTrainer, check

    with recorder.guarded(SECTION, "check ours", peer="ours"):
        ours = OurTrainer(trainer)
        for stage in ("width_stage", "depth_stage"):
            errors = check(trainer, ours, stage)
            recorder.add(SECTION, "check ours", peer="ours", notes=f"{stage}: {errors}")
        return ours
    return None
