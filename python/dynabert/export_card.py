"""The model card of an exported subnet: how to load it, its scores and latencies, where it came
from. Its metadata are in the form that the Hugging Face Hub reads."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import ModelCardData

from dynabert.data.files import file_digest
from dynabert.export_check import ExportCheck, input_names
from dynabert.flops import count_parameters
from dynabert.json_file import read_json
from dynabert.latency_file import check_latency_file
from dynabert.latency_table import LatencyTable
from dynabert.modeling_pretrained import DynaBertPreTrainedModel
from dynabert.report import GridReport, render_grid
from dynabert.subnet import SubnetConfig

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_RUN_SCHEMA = 1
_TASKS = {  # by the end of the class's name: the Hub's task, and the class that loads it
    "SequenceClassification": ("text-classification", "AutoModelForSequenceClassification"),
    "TokenClassification": ("token-classification", "AutoModelForTokenClassification"),
    "QuestionAnswering": ("question-answering", "AutoModelForQuestionAnswering"),
    "MaskedLM": ("fill-mask", "AutoModelForMaskedLM"),
    "": ("feature-extraction", "AutoModel"),
}
# Arguments of a run that say where it ran, and nothing about the result.
_PRIVATE = ("output_dir", "progress", "report_to", "run_name", "num_workers", "logging_steps")
_USE = {
    "hf": """```python
import dynabert  # registers the architecture; pip install dynabert-kernels
from transformers import {auto}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = {auto}.from_pretrained("{name}")
```""",
    "transformers": """```python
from transformers import {auto}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = {auto}.from_pretrained("{name}")
```""",
    "onnx": """```python
import onnxruntime
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
session = onnxruntime.InferenceSession("{name}/model.onnx")
inputs = tokenizer(["A text."], padding=True, return_tensors="np")
outputs = session.run(None, {{key: inputs[key] for key in {inputs}}})
```""",
    "torch-export": """```python
import torch
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = torch.export.load("{name}/model.pt2").module()
inputs = tokenizer(["A text."], padding=True, return_tensors="pt")
outputs = model(**{{key: inputs[key] for key in {inputs}}})
```""",
}


@dataclass(frozen=True)
class ExportSource:
    """Where a model came from, as far as files tell; nothing in it names a folder of a machine.

    Attributes:
        model: Name of its folder, or its hub id.
        weights: SHA-256 of each file of weights, by name.
        run: Contents of ``run.json`` of the training run; None for a model of another origin.
        stage: Stage of the run the model is of.
        grid: Scores of its subnets, where they were evaluated.
        tables: Latencies of its subnets, on any machine.
    """

    model: str
    weights: Mapping[str, str]
    run: Mapping[str, Any] | None = None
    stage: str | None = None
    grid: GridReport | None = None
    tables: tuple[LatencyTable, ...] = ()

    @classmethod
    def of(cls, name: str | Path) -> ExportSource:
        """What lies in the folder of a model, or in that of the run it is the result of.

        Args:
            name: The folder, or a hub id, of which nothing is read.

        Raises:
            ValueError: ``run.json`` cannot be read. A report that cannot is left out, with a
                warning.
        """
        folder = Path(name).resolve()
        if not str(name) or not folder.is_dir():
            return cls(public(str(name)), {})
        files = sorted([*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")])
        parent = folder.parent
        run = stage = None
        if (parent / "run.json").is_file():
            run = read_json(parent / "run.json", schema=_RUN_SCHEMA)
            stages = run["arguments"].get("stages") or [None]
            stage = stages[-1] if folder.name == "model" else folder.name
        is_result = run is not None and folder.name == "model"
        reports = parent if is_result and not (folder / "grid.json").is_file() else folder
        grid = None
        if (reports / "grid.json").is_file():
            grid = _read_or_warn(GridReport.load, reports / "grid.json")
        tables = _read_or_warn(check_latency_file, reports / "latency.json")
        return cls(
            model=parent.name if is_result else folder.name,
            weights={file.name: file_digest(file) for file in files},
            run=run,
            stage=stage,
            grid=grid,
            tables=tuple(tables or ()),
        )

    def to_dict(self) -> dict[str, Any]:
        """Origin in plain values; scores and latencies have files of their own."""
        run = None if self.run is None else public({**self.run, "arguments": self.arguments()})
        return {
            "model": self.model,
            "weights_sha256": dict(self.weights),
            "stage": self.stage,
            "run": run,
        }

    def arguments(self) -> dict[str, Any]:
        """Arguments of the run that decided the result."""
        given = (self.run or {}).get("arguments", {})
        return {
            name: public(value)
            for name, value in given.items()
            if name not in _PRIVATE and value is not None
        }


def _read_or_warn(read: Callable[[Path], _T], path: Path) -> _T | None:
    try:
        return read(path)
    except ValueError as error:
        _log.warning("not in the model card: %s", error)
        return None


def public(value: Any) -> Any:
    """A value without the folders of this machine: of a path that is absolute, the end."""
    if isinstance(value, Mapping):
        return {name: public(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [public(entry) for entry in value]
    if not isinstance(value, str) or not Path(value).expanduser().is_absolute():
        return value
    path = Path(value)
    return f"{path.parent.name}/{path.name}" if path.name == "model" else path.name


def render_card(
    name: str,
    export_format: str,
    model: DynaBertPreTrainedModel,
    subnet: SubnetConfig,
    source: ExportSource,
    check: ExportCheck,
    versions: Mapping[str, str],
) -> str:
    """The card, Markdown with metadata in front.

    Args:
        name: Of the exported folder.
        export_format: One of `dynabert.export.FORMATS`.
        model: The extracted model.
        subnet: What it is of the source.
        source: Where that came from.
        check: How the files were checked.
        versions: Of the packages that wrote them.
    """
    task, auto = _TASKS[type(model).__name__.partition("For")[2]]
    use = _USE[export_format].format(auto=auto, name=name, inputs=list(input_names(model.config)))
    sections = [
        _metadata(export_format, model, source, task),
        f"# {name}",
        f"A fixed-size subnet of the elastic {model.config.architecture.upper()} encoder "
        f"`{source.model or 'unnamed'}`, made with dynabert-kernels (DynaBERT, Hou et al., "
        "NeurIPS 2020).",
        "## Use",
        use,
        "## Size",
        _size(model, subnet),
        *_results(subnet, source),
        "## Provenance",
        _provenance(export_format, source, check, versions),
        "## Licence",
        "Not stated. Whoever publishes this model chooses one that the licences of the original "
        "weights and data allow, and fills in `license` in the metadata above.",
    ]
    return "\n\n".join(sections) + "\n"


def _metadata(
    export_format: str, model: DynaBertPreTrainedModel, source: ExportSource, task: str
) -> str:
    began_with = str((source.run or {}).get("model", source.model))
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", began_with) and not Path(began_with).exists()
    data = ModelCardData(
        library_name="transformers" if export_format in ("hf", "transformers") else None,
        pipeline_tag=task,
        tags=["dynabert", model.config.architecture, *_TAGS.get(export_format, [])],
        base_model=began_with if is_hub_id else None,
    )
    return f"---\n{data.to_yaml()}\n# license: to be filled in before publishing\n---"


_TAGS = {"onnx": ["onnx"], "torch-export": ["torch.export"]}


def _size(model: DynaBertPreTrainedModel, subnet: SubnetConfig) -> str:
    shapes = model.config.layer_shapes
    parameters = count_parameters(model, model.subnet_shape(SubnetConfig()))
    heads, neurons = (
        _span([getattr(layer, field) for layer in shapes])
        for field in ("num_heads", "intermediate_size")
    )
    rows = [
        ("subnet", f"`{subnet.name}`"),
        ("layers", str(len(shapes))),
        ("heads per layer", f"{heads} of {model.config.head_dim}"),
        ("neurons per layer", neurons),
        ("hidden size", str(model.config.hidden_size)),
        ("parameters", f"{parameters / 1e6:.1f} M"),
        ("dtype", str(next(model.parameters()).dtype).removeprefix("torch.")),
    ]
    return _table(("", ""), rows)


def _span(counts: Sequence[int]) -> str:
    return str(counts[0]) if len(set(counts)) == 1 else ", ".join(map(str, counts))


def _results(subnet: SubnetConfig, source: ExportSource) -> list[str]:
    sections = []
    if source.grid is not None:
        scored = next((r.metrics for r in source.grid.rows if r.subnet.name == subnet.name), {})
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in scored.items())
        own = f"`{subnet.name}`: {metrics}." if metrics else "This subnet has not been evaluated."
        sections += ["## Scores", f"{own} All evaluated subnets of the source:"]
        sections.append(render_grid(source.grid).strip())
    timed = [(table, row) for table in source.tables if (row := table.row(subnet)) is not None]
    if timed:
        rows = [
            (table.setting.describe(), *(f"{row.at(p):.2f}" for p in ("median", "p80", "p99")))
            for table, row in timed
        ]
        header = ("measured in the source model, for", "median ms", "p80 ms", "p99 ms")
        sections += ["## Latency", _table(header, rows)]
    return sections


def _provenance(
    export_format: str, source: ExportSource, check: ExportCheck, versions: Mapping[str, str]
) -> str:
    run: Mapping[str, Any] = source.run or {}
    data: Mapping[str, Any] = run.get("data", {})
    shapes = ", ".join(f"{batch} x {length}" for batch, length in check.shapes)
    rows = [
        ("format", f"`{export_format}`"),
        ("checked", f"against {check.compared_with} on batches of {shapes} tokens"),
        (
            "largest difference",
            f"{check.max_error:.2g}" if check.max_error else "none, bit for bit",
        ),
        *((f"SHA-256 of `{file}`", f"`{digest}`") for file, digest in source.weights.items()),
        *((f"{name} version", version) for name, version in versions.items()),
    ]
    trained = {
        "started from": public(run.get("model")),
        "task": run.get("task"),
        "data": public(data.get("source")),
        "data fingerprint": data.get("fingerprint"),
        "stage": source.stage,
        "seed": run.get("arguments", {}).get("seed"),
        **{f"trained with {name}": v for name, v in run.get("versions", {}).items()},
    }
    rows += [(name, f"{value}") for name, value in trained.items() if value is not None]
    table = _table(("", ""), rows)
    if not run:
        return table
    arguments = json.dumps(source.arguments(), indent=2)
    return f"{table}\n\nArguments of the training run:\n\n```json\n{arguments}\n```"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
