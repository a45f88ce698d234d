"""How near int8 is to float32 on a trained model: the logits of every subnet on validation rows.

    python -m benchmarks.int8_quality --model RUN --data-dir DATA \\
      --out benchmarks/results/int8_quality.jsonl

One row per subnet: the error of the int8 logits relative to the float32 ones (Frobenius norms over
all rows), the share of rows for which both prefer the same class, and the score of each. Ends with
status 1 if a subnet misses `LARGEST_ERROR` or `LEAST_AGREEMENT`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from benchmarks.records import commit_of_checkout, describe_machine
from dynabert.cli._place import ModelPlace
from dynabert.data.collators import DynamicPadCollator, EncodedDataset
from dynabert.data.examples import TaskSpec
from dynabert.data.tasks import load_task
from dynabert.evaluation import GridRow, evaluate_grid
from dynabert.json_file import write_bytes
from dynabert.latency_table import hardware_name
from dynabert.subnet import SubnetConfig
from dynabert.training.problems import encode_examples, row_length
from dynabert_kernels import use_backend

LARGEST_ERROR = 0.02
LEAST_AGREEMENT = 0.99
_BACKENDS = ("cpu", "reference")


class _Listener(nn.Module):
    """A model that keeps the logits it has given, by subnet."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.heard: dict[SubnetConfig, list[Tensor]] = {}

    def forward(self, *, subnet: SubnetConfig, **inputs: Tensor) -> Any:
        output = self.model(**inputs, subnet=subnet)
        self.heard.setdefault(subnet, []).append(output.logits.double())
        return output

    def logits(self, subnet: SubnetConfig) -> Tensor:
        """``[rows, num_labels]``, in an order that is the same for every model."""
        return torch.cat(self.heard[subnet])


def compare(
    model: Any,
    dataset: EncodedDataset,
    collator: DynamicPadCollator,
    spec: TaskSpec,
    subnets: Sequence[SubnetConfig],
    *,
    backend: str = "cpu",
) -> list[dict[str, Any]]:
    """One row per subnet; the model is left as it came.

    Args:
        model: A classifier in float32.
        dataset: Its validation rows, tokenised.
        collator: Makes a batch of rows.
        spec: Their task.
        subnets: What to compare.
        backend: Runs both precisions.

    Raises:
        ValueError: The task is no classification.
    """
    if spec.problem != "classification":
        raise ValueError(
            f"int8_quality: task {spec.name} is {spec.problem}, expected classification. "
            "Only there do two models prefer the same class."
        )

    def scored(quantization: str | None) -> tuple[_Listener, list[GridRow]]:
        listener = _Listener(model.quantize(quantization))
        return listener, evaluate_grid(listener, dataset, collator, spec, subnets, progress=False)

    before = model.quantization
    try:
        with use_backend(backend):
            exact, exact_rows = scored(None)
            quantized, quantized_rows = scored("int8")
    finally:
        model.quantize(before)
    rows = []
    for subnet, of_exact, of_quantized in zip(subnets, exact_rows, quantized_rows, strict=True):
        expected, actual = exact.logits(subnet), quantized.logits(subnet)
        same = expected.argmax(1) == actual.argmax(1)
        rows.append(
            {
                "width": subnet.width_mult,
                "depth": subnet.depth_mult,
                "relative_error": ((actual - expected).norm() / expected.norm()).item(),
                "agreement": same.double().mean().item(),
                "num_disagreeing": int((~same).sum()),
                "num_rows": len(same),
                "metric": spec.primary_metric,
                "score_float32": of_exact.primary,
                "score_int8": of_quantized.primary,
            }
        )
    return rows


def holds(row: dict[str, Any]) -> bool:
    """Whether a row is within both limits."""
    return bool(row["relative_error"] <= LARGEST_ERROR and row["agreement"] >= LEAST_AGREEMENT)


def measure(place: ModelPlace, task: str | None, data_dir: Path, backend: str) -> list[Any]:
    """The rows of a trained model, with all that a reader of one needs.

    Args:
        place: The model, or its run.
        task: Task of the rows; None: the run's own.
        data_dir: Holds GLUE's folders.
        backend: Runs both precisions.

    Raises:
        ValueError: No task is given, and a model alone tells none.
    """
    trained: dict[str, Any] = place.run or {"task": None, "arguments": {}}
    task = task or trained["task"]
    if task is None:
        raise ValueError("int8_quality: --task is missing. A model alone does not tell its task.")
    data = load_task(task, data_dir, with_train=False)
    model: Any = place.load_model()
    tokenizer = AutoTokenizer.from_pretrained(place.model_dir)
    length = row_length(trained["arguments"].get("max_length"), data.spec.problem, model.config)
    dataset = encode_examples(data.validation, data.spec.problem, tokenizer, length)
    subnets = place.subnets(model, None, None)
    collator = DynamicPadCollator(tokenizer)
    rows = compare(model, dataset, collator, data.spec, subnets, backend=backend)
    config, arguments = model.config, trained["arguments"]
    common = {
        "model": {
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "intermediate_size": config.intermediate_size,
            "stages": arguments.get("stages"),
            "train_rows": trained.get("data", {}).get("train_rows"),
            "seed": arguments.get("seed"),
        },
        "backend": backend,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit_of_checkout(),
        "machine": {
            **describe_machine("cpu"),
            "hardware": hardware_name(torch.device("cpu")),
            "threads": torch.get_num_threads(),
        },
    }
    return [{"task": task, **row, "holds": holds(row), **common} for row in rows]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; 1 if a subnet misses a limit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a run or a model")
    parser.add_argument("--data-dir", type=Path, required=True, help="holds GLUE's folders")
    parser.add_argument("--task", help="default: the run's own")
    parser.add_argument("--backend", choices=_BACKENDS, default="cpu")
    parser.add_argument("--out", type=Path, help="rows are added to this file")
    options = parser.parse_args(arguments)
    place = ModelPlace.find(options.model)
    rows = measure(place, options.task, options.data_dir, options.backend)
    for row in rows:
        print(
            f"width {row['width']:<5.3g} depth {row['depth']:<5.3g} "
            f"error {row['relative_error']:7.3%}  agreement {row['agreement']:7.2%}  "
            f"{row['metric']} {row['score_float32']:.4f} -> {row['score_int8']:.4f}  "
            f"{'holds' if row['holds'] else 'MISSED'}"
        )
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        former = options.out.read_bytes() if options.out.exists() else b""
        write_bytes(options.out, former + "".join(json.dumps(row) + "\n" for row in rows).encode())
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
