"""Named sets of `RunArguments`: the paper's method, the original code's, and a quick one.

A preset sets plain fields, so what it meant stays on record in ``run.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

PresetName = Literal["paper", "reference", "reference-roberta", "quick"]
PRESET_NAMES: tuple[PresetName, ...] = get_args(PresetName)

# What the paper and the original code agree on (its README, and the defaults of its script).
_COMMON: dict[str, Any] = {
    "seed": 42,
    "batch_size": 32,
    "gradient_accumulation_steps": 1,
    "learning_rate": 2e-5,
    "weight_decay": 0.0,
    "warmup_ratio": 0.0,
    "max_grad_norm": 1.0,
    "teacher_epochs": 3.0,
    "width_epochs": 3.0,
    "width_depth_epochs": 3.0,
    "final_epochs": 3.0,
    "width_weights": (1.0, 0.1),
    "width_depth_weights": (1.0, 1.0),
    "distillation": True,
    "rewire": True,
    "subnet_sampling": "all",
}
_PAPER: dict[str, Any] = {
    **_COMMON,
    "depth_rule": "paper",
    "width_depth_teacher": "same-width",
    "importance_rule": "paper",
    "importance_source": "holdout",
    "hidden_padding": False,
    "regression_logits": True,
}
_REFERENCE: dict[str, Any] = {
    **_COMMON,
    "depth_rule": "reference",
    "width_depth_teacher": "full",
    "importance_rule": "reference",
    "importance_source": "dev",
    "importance_rows": None,
    "importance_batch_size": 8,
    "hidden_padding": True,
    "regression_logits": False,
    "max_length": 128,
    "group_by_length": False,
    "eval_steps": 50,
    "selection_metric": "reference",
    "bf16": False,
}
PRESETS: Mapping[PresetName, Mapping[str, Any]] = {
    "paper": _PAPER,
    "reference": _REFERENCE,
    # The original code overrides its --warmup_steps for RoBERTa.
    "reference-roberta": {**_REFERENCE, "warmup_ratio": 0.06},
    "quick": {
        **_PAPER,
        "stages": ("teacher", "width", "width-depth"),
        "subnet_sampling": "sandwich",
        "learning_rate": 5e-5,
        "teacher_epochs": 1.0,
        "width_epochs": 1.0,
        "width_depth_epochs": 1.0,
        "final_epochs": 1.0,
    },
}
