"""Training: fine-tuning, and distillation in the two DynaBERT stages. See docs/training.md."""

from dynabert.training.arguments import RunArguments, Stage
from dynabert.training.stages import RunResult, default_stages, run_stages
from dynabert.training.trainer import DynaBertTrainer

__all__ = [
    "DynaBertTrainer",
    "RunArguments",
    "RunResult",
    "Stage",
    "default_stages",
    "run_stages",
]
