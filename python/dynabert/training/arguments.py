"""Everything a training run is told: `RunArguments` for the whole run, `Stage` for one part of it.

Both are plain data that survive a trip through JSON. Nothing here imports torch or transformers at
run time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from dynabert.subnet import SubnetConfig
from dynabert.training.presets import PRESET_NAMES, PRESETS, PresetName

StageName = Literal["teacher", "width", "width-depth", "final"]
TeacherKind = Literal["full", "same-width"]
SubnetSampling = Literal["all", "sandwich", "sampled"]
ImportanceSource = Literal["holdout", "dev"]
Rule = Literal["paper", "reference"]
Pooling = Literal["mean", "cls"]
LongTexts = Literal["error", "cut"]

STAGE_NAMES: tuple[StageName, ...] = get_args(StageName)
LABEL_FREE_STAGES: tuple[StageName, ...] = ("width", "width-depth")
FULL = SubnetConfig()

# May change between an interrupted run and its resumption: none of them changes a number.
_OPERATIONAL_FIELDS = frozenset(
    {
        "output_dir",
        "stages",
        "eval_batch_size",
        "logging_steps",
        "save_steps",
        "num_workers",
        "progress",
        "report_to",
        "run_name",
        # Its content matters, which `RunFolder` compares.
        "augmented_file",
    }
)
_NARROW_STAGES: tuple[StageName, ...] = ("width", "width-depth", "final")
# Fields that matter to some stages only.
_FIELD_STAGES: dict[str, tuple[StageName, ...]] = {
    "teacher_epochs": ("teacher",),
    "teacher_learning_rate": ("teacher",),
    "width_epochs": ("width",),
    "width_learning_rate": ("width",),
    "width_weights": ("width",),
    "width_depth_epochs": ("width-depth",),
    "width_depth_learning_rate": ("width-depth",),
    "width_depth_weights": ("width-depth",),
    "width_depth_teacher": ("width-depth",),
    "final_epochs": ("final",),
    "final_learning_rate": ("final",),
    "distillation": LABEL_FREE_STAGES,
    "hidden_padding": LABEL_FREE_STAGES,
    "regression_logits": LABEL_FREE_STAGES,
    "rewire": _NARROW_STAGES,
    "importance_rule": _NARROW_STAGES,
    "importance_batch_size": _NARROW_STAGES,
    "probe_subnets": _NARROW_STAGES,
}


@dataclass(frozen=True)
class Stage:
    """One stage of training, as data: which subnets learn, from whom, and for how long.

    With a teacher the loss of a subnet is ``logit_weight * logit loss + hidden_weight * hidden
    state loss`` (DynaBERT, section 3.2); without one it is the model's own loss on the labels.
    """

    name: str
    """Names the stage's folder and its lines in the log."""
    subnets: tuple[SubnetConfig, ...]
    """What is trained: the full network and others, or a single one of any size."""
    teacher: TeacherKind | None = None
    """``full``: the full network of the model the stage starts from. ``same-width``: its subnet of
    equal width and full depth. None: no teacher, learn from labels."""
    logit_weight: float = 1.0
    """Weight of the loss on the logits, or of the pooled output where there are no labels."""
    hidden_weight: float = 0.0
    """Weight of the loss on the hidden states."""
    num_epochs: float = 3.0
    """Passes over the training data."""
    learning_rate: float = 2e-5
    """Highest learning rate; it falls linearly to zero."""
    subnet_sampling: SubnetSampling = "all"
    """Subnets per step. ``all`` of them; ``sandwich``: the full network, the smallest subnet and
    `num_sampled` others; ``sampled``: the full network and `num_sampled` others. The choice depends
    on seed and step only."""
    num_sampled: int = 2
    """How many other subnets a step draws, unless `subnet_sampling` is ``all``."""
    hidden_padding: bool = False
    """Run padding through the network and count it in the loss on the hidden states, as the
    original code does."""
    regression_logits: bool = True
    """Whether logits of a regression are learned from the teacher; the original code leaves them
    out."""

    def __post_init__(self) -> None:
        _check_choice("Stage", "teacher", self.teacher, (None, *get_args(TeacherKind)))
        _check_choice("Stage", "subnet_sampling", self.subnet_sampling, get_args(SubnetSampling))
        if FULL not in self.subnets and len(self.subnets) != 1:
            raise ValueError(
                f"Stage: subnets=[{', '.join(s.name for s in self.subnets)}], expected the full "
                "network among them, or one subnet alone. Add SubnetConfig()."
            )
        if len(set(self.subnets)) != len(self.subnets):
            raise ValueError(
                f"Stage: subnets=[{', '.join(s.name for s in self.subnets)}], expected each only "
                "once. Remove the repeated ones."
            )
        for name in ("logit_weight", "hidden_weight"):
            _check_number("Stage", name, getattr(self, name), 0.0)
        if self.teacher is not None and self.logit_weight == self.hidden_weight == 0:
            raise ValueError(
                "Stage: logit_weight=0 and hidden_weight=0, expected one above 0. Nothing would be "
                "learned."
            )
        for name in ("num_epochs", "learning_rate"):
            _check_number("Stage", name, getattr(self, name), 0.0, above=True)
        _check_number("Stage", "num_sampled", self.num_sampled, 1)


@dataclass(frozen=True)
class RunArguments:
    """A whole training run: stages, data options, optimisation. Checked on construction."""

    output_dir: Path
    """Folder of the run; see docs/training.md for what it holds."""
    stages: tuple[StageName, ...] = STAGE_NAMES
    """Which stages to run, in this order: teacher, width, width-depth, final."""
    widths: tuple[float, ...] | None = None
    """Width multipliers of the grid; default: 1, 3/4, 1/2, 1/4 as far as the head count allows."""
    depths: tuple[float, ...] | None = None
    """Depth multipliers of the grid; default: 1, 3/4, 1/2, taken down to whole numbers of layers.
    A grid has the full network in it, or is one subnet alone."""
    depth_rule: Rule | None = None
    """Which layers a shallower subnet keeps: ``paper`` the last, ``reference`` the first, as the
    original code does; default: what the model's configuration says."""
    seed: int = 42
    """Seeds new heads, data order, dropout, the sampled subnets and the rows held out."""

    batch_size: int = 32
    """Sequences per forward pass and process."""
    gradient_accumulation_steps: int = 1
    """Batches per optimiser step."""
    max_length: int | None = None
    """Longest sequence in tokens; longer ones are cut, or become several where the task allows it.
    Default: 384 for question answering, 128 for the others, or what the model can take."""
    long_texts: LongTexts | None = None
    """A text with more tokens than the model has positions: an ``error`` that names its line, or
    ``cut`` without one. Default: ``error`` for own files, ``cut`` for tasks known by name."""
    augmented_file: Path | None = None
    """Further rows without labels, for the stages that learn from a teacher."""
    group_by_length: bool = True
    """Put sequences of like length into a batch: less padding, a coarser shuffle."""

    learning_rate: float = 2e-5
    """Highest learning rate of every stage without one of its own; it falls linearly to zero."""
    teacher_learning_rate: float | None = None
    """Of the teacher stage; default: `learning_rate`."""
    width_learning_rate: float | None = None
    """Of the width stage; default: `learning_rate`."""
    width_depth_learning_rate: float | None = None
    """Of the width-depth stage; default: `learning_rate`."""
    final_learning_rate: float | None = None
    """Of the final stage; default: `learning_rate`."""
    weight_decay: float = 0.0
    """Of AdamW; never applied to biases and LayerNorm."""
    warmup_ratio: float = 0.0
    """Share of the steps in which the learning rate rises."""
    max_grad_norm: float = 1.0
    """The sum of all subnets' gradients is clipped to this norm."""
    teacher_epochs: float = 3.0
    """Epochs of fine-tuning the full network."""
    width_epochs: float = 3.0
    """Epochs of the width stage."""
    width_depth_epochs: float = 3.0
    """Epochs of the width-depth stage."""
    final_epochs: float = 3.0
    """Epochs of the last fine-tuning on labels."""

    width_weights: tuple[float, float] = (1.0, 0.1)
    """Weights of logits and hidden states in the width stage."""
    width_depth_weights: tuple[float, float] = (1.0, 1.0)
    """Weights of logits and hidden states in the width-depth stage."""
    width_depth_teacher: TeacherKind = "same-width"
    """Teacher of the width-depth stage: ``same-width`` as in the paper, or ``full`` as in the
    original code."""
    distillation: bool = True
    """False: the stages width and width-depth learn from labels, without a teacher."""
    hidden_padding: bool = False
    """Pad every row to `max_length` and count padding in the loss on hidden states, as the original
    code does."""
    regression_logits: bool = True
    """Whether width and width-depth learn the scores of a regression; in the original code the head
    learns nothing until the final stage."""
    subnet_sampling: SubnetSampling = "all"
    """Subnets per step: see `Stage`."""
    num_sampled: int = 2
    """See `Stage`."""

    rewire: bool = True
    """False: narrow subnets start from heads and neurons in the order the model has them."""
    importance_source: ImportanceSource = "holdout"
    """Rows that heads and neurons are scored on: ``holdout`` sets rows of the training data aside
    for it, ``dev`` uses the validation data as the paper does, which makes validation scores
    optimistic."""
    importance_rows: int | None = 1000
    """How many rows; at most a tenth of the training rows are held out. None: as many as may be."""
    importance_rule: Rule = "paper"
    """Formula: see `dynabert.importance.compute_importance`. ``reference`` depends on the order of
    the rows and takes them as they come."""
    importance_batch_size: int | None = None
    """Sequences per batch that is scored; default: `batch_size`."""
    probe_subnets: tuple[SubnetConfig, ...] | None = None
    """Evaluated before and right after rewiring, untrained, to show what rewiring alone does;
    default: the narrowest subnet of full depth. Empty: none."""

    pooling: Pooling = "mean"
    """Sentence embedding of a run without labels: mean over real tokens, or the first token."""
    bf16: bool | None = None
    """Train and evaluate under bfloat16 autocast; default: where the hardware multiplies
    bfloat16."""
    use_cpu: bool = False
    """Stay on the CPU even if there is a GPU."""
    eval_batch_size: int = 64
    """Sequences per forward pass in evaluation."""
    eval_steps: int | None = None
    """Optimiser steps between two evaluations of the grid, the best of which is kept; default: one
    after each epoch."""
    selection_metric: str | None = None
    """Metric whose mean over the grid is the best; default: the task's primary one. ``reference``:
    the first of the original code, which for a score is Pearson's correlation."""
    logging_steps: int = 50
    """Optimiser steps between two lines of the log."""
    save_steps: int = 500
    """Optimiser steps between two checkpoints; there is also one after each evaluation."""
    activation_gib: float = 4.0
    """Memory for what one training pass keeps for its backward pass, estimated, in GiB; subnets
    beyond it wait for the next pass of the step. More passes take longer and need less memory."""
    num_workers: int = 0
    """Processes that collate batches; 0: none, batches are collated in the training process."""
    progress: bool = True
    """Show progress on stderr: bars on a terminal, elsewhere a line now and then."""
    report_to: tuple[str, ...] = ()
    """Where the log goes beside the run's folder: names of integrations of transformers.Trainer,
    such as tensorboard or wandb."""
    run_name: str | None = None
    """Name of the run there, before the stage's; default: the name of `output_dir`."""

    def __post_init__(self) -> None:
        who = "RunArguments"
        object.__setattr__(self, "output_dir", Path(self.output_dir))
        if self.augmented_file is not None:
            object.__setattr__(self, "augmented_file", Path(self.augmented_file))
        ranks = [STAGE_NAMES.index(s) if s in STAGE_NAMES else -1 for s in self.stages]
        if not ranks or min(ranks) < 0 or ranks != sorted(set(ranks)):
            raise ValueError(
                f"{who}: stages={','.join(self.stages)!r}, expected some of "
                f"{','.join(STAGE_NAMES)}, in that order. Each stage starts from the one before."
            )
        for name, kind in _CHOICES.items():
            _check_choice(who, name, getattr(self, name), get_args(kind))
        for name, kind in (("depth_rule", Rule), ("long_texts", LongTexts)):
            if getattr(self, name) is not None:
                _check_choice(who, name, getattr(self, name), get_args(kind))
        for name in _COUNTS:
            _check_number(who, name, getattr(self, name), 1)
        for name in ("max_length", "importance_rows", "importance_batch_size", "eval_steps"):
            if getattr(self, name) is not None:
                _check_number(who, name, getattr(self, name), 1)
        for stage in map(_field_prefix, STAGE_NAMES):
            _check_number(who, f"{stage}_epochs", getattr(self, f"{stage}_epochs"), 0.0, above=True)
            rate = getattr(self, f"{stage}_learning_rate")
            if rate is not None:
                _check_number(who, f"{stage}_learning_rate", rate, 0.0, above=True)
        for name in ("learning_rate", "max_grad_norm", "activation_gib"):
            _check_number(who, name, getattr(self, name), 0.0, above=True)
        for name in ("weight_decay", "warmup_ratio"):
            _check_number(who, name, getattr(self, name), 0.0)
        if self.warmup_ratio >= 1:
            raise ValueError(
                f"{who}: warmup_ratio={self.warmup_ratio}, expected 0 to less than 1. It is a "
                "share of the steps."
            )
        if isinstance(self.report_to, str):
            raise TypeError(
                f"{who}: report_to={self.report_to!r}, expected a tuple of names. "
                f"Write ({self.report_to!r},)."
            )

    @classmethod
    def preset(cls, name: PresetName, output_dir: Path, **changes: Any) -> RunArguments:
        """The arguments a preset stands for, with `changes` on top.

        Args:
            name: ``paper``: the defaults, written down. ``reference``: what the original code does,
                for a BERT; ``reference-roberta``: the same with its warm-up. ``quick``: one epoch
                each without the final stage, four subnets per step.
            output_dir: Folder of the run.
            changes: Fields that differ from the preset.

        Raises:
            ValueError: There is no such preset, or a value is out of range.
        """
        _check_choice("RunArguments", "preset", name, PRESET_NAMES)
        return cls(output_dir, **{**PRESETS[name], **changes})

    def epochs_of(self, stage: StageName) -> float:
        """Epochs of one stage."""
        epochs: float = getattr(self, f"{_field_prefix(stage)}_epochs")
        return epochs

    def learning_rate_of(self, stage: StageName) -> float:
        """Highest learning rate of one stage."""
        rate: float | None = getattr(self, f"{_field_prefix(stage)}_learning_rate")
        return self.learning_rate if rate is None else rate

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, ready for JSON; `from_dict` is its inverse."""
        values = {field.name: _plain(getattr(self, field.name)) for field in fields(self)}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunArguments:
        """Rebuilds what `to_dict` wrote; absent fields take their default."""
        known: dict[str, Any] = dict(values)
        if known.get("probe_subnets") is not None:
            known["probe_subnets"] = [SubnetConfig.from_dict(s) for s in known["probe_subnets"]]
        known = {k: tuple(v) if isinstance(v, list) else v for k, v in known.items()}
        return cls(**known)

    def differences(self, former: RunArguments) -> list[str]:
        """Names of the fields that differ from those of a former call and would change its results.

        Fields of a stage that was not asked for then are free.
        """
        return [
            field.name
            for field in fields(self)
            if field.name not in _OPERATIONAL_FIELDS
            and set(_FIELD_STAGES.get(field.name, STAGE_NAMES)).intersection(former.stages)
            and getattr(self, field.name) != getattr(former, field.name)
        ]


_CHOICES = {
    "width_depth_teacher": TeacherKind,
    "subnet_sampling": SubnetSampling,
    "importance_source": ImportanceSource,
    "importance_rule": Rule,
    "pooling": Pooling,
}
_COUNTS = (
    "batch_size",
    "gradient_accumulation_steps",
    "num_sampled",
    "eval_batch_size",
    "logging_steps",
    "save_steps",
)


def _field_prefix(stage: StageName) -> str:
    return stage.replace("-", "_")


def _plain(value: Any) -> Any:
    if isinstance(value, SubnetConfig):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _check_choice(who: str, name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(
            f"{who}: {name}={value!r}, expected one of {', '.join(map(str, allowed))}. "
            "See docs/training.md."
        )


def _check_number(who: str, name: str, value: float, least: float, *, above: bool = False) -> None:
    in_range = value > least if above else value >= least
    if not in_range or not math.isfinite(value):
        raise ValueError(
            f"{who}: {name}={value}, expected a finite number "
            f"{'above' if above else 'of at least'} {least}. See docs/training.md."
        )
