"""Write a subnet as files that stand on their own: ours, plain Hugging Face, ONNX, `torch.export`.

`export_subnet` extracts, writes into a folder of its own, checks what it wrote against the model,
and only then puts the folder in its place.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig

import dynabert_kernels
from dynabert import modeling_heads
from dynabert.durable import recover_folder, staged_folder
from dynabert.evaluation import evaluation_mode
from dynabert.export_card import ExportSource, render_card
from dynabert.export_check import ExportCheck, Run, check_export, run_model
from dynabert.export_graph import check_onnx_packages, write_onnx, write_program
from dynabert.extraction import extract
from dynabert.hf_checkpoint import read_weights, to_hf_state_dict
from dynabert.json_file import read_json, write_json
from dynabert.modeling_dynabert import DynaBertModel
from dynabert.modeling_heads import DynaBertForQuestionAnswering
from dynabert.modeling_pretrained import DynaBertPreTrainedModel
from dynabert.subnet import LayerShape, SubnetConfig
from dynabert_kernels import use_backend

FORMATS = ("hf", "transformers", "onnx", "torch-export")
RECORD_FILE = "export.json"
SCHEMA = 1
_WHO = "export_subnet"
# Whatever a tokenizer saves; copied as it is.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True)
class ExportRecord:
    """What was exported, as ``export.json`` beside the files keeps it.

    Attributes:
        format: One of `FORMATS`.
        subnet: What the files are of the source.
        layers: Its layers in the source, with their heads and neurons.
        model_class: Class of the source.
        check: How the files were checked.
        source: Where the source came from.
        versions: Of the packages that wrote the files.
    """

    format: str
    subnet: SubnetConfig
    layers: tuple[LayerShape, ...]
    model_class: str
    check: ExportCheck
    source: dict[str, Any]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {"schema": SCHEMA, **asdict(self), "subnet": self.subnet.to_dict()}


def export_subnet(
    model: DynaBertPreTrainedModel,
    subnet: SubnetConfig | None,
    out: Path | str,
    *,
    format: str = "hf",
    source: Path | str | None = None,
    overwrite: bool = False,
) -> ExportRecord:
    """Write a subnet into a folder of its own, with tokenizer, model card and ``export.json``.

    ``"hf"`` is this package's own fixed-size model, the same bits as the subnet in `model` on the
    same backend, in its dtype; ``AutoModel`` loads it after ``import dynabert``. ``"transformers"``
    is a plain BERT or RoBERTa, for which attention must have its full width. ``"onnx"`` and
    ``"torch-export"`` are graphs in float32 with the number of sequences and their length left
    open.

    The files are read back and run against the model before they are put in their place, whole or
    not at all.

    Args:
        model: The elastic model.
        subnet: What to export; None is the full network, or what a view runs.
        out: Folder to make.
        format: One of `FORMATS`.
        source: Folder of `model`, for the tokenizer and the model card; default: where it was
            loaded from.
        overwrite: Replace a folder that an export made.

    Returns:
        What ``export.json`` holds.

    Raises:
        ValueError: An unknown format, a subnet that does not fit the model or that the format
            cannot express, or a folder that holds anything else.
        ImportError: A package is missing; the message names the extra that brings it.
        RuntimeError: What was written does not compute what the model computes.

    Example:
        >>> half = SubnetConfig(0.5, 0.75)
        >>> export_subnet(model, half, "half", format="onnx")  # doctest: +SKIP
    """
    if format not in FORMATS:
        raise ValueError(f"{_WHO}: format={format!r}, expected one of {', '.join(FORMATS)}.")
    if format == "onnx":
        check_onnx_packages()
    out = Path(out).resolve()
    _check_target(out, overwrite)
    name = str(model.name_or_path or "") if source is None else str(source)
    extracted = extract(model, subnet)
    extracted.quantize(None).train(False)  # files hold numbers as they are
    if format == "transformers":
        extracted.config.to_hf()  # before anything is written
    shape = model.subnet_shape(model.default_subnet if subnet is None else subnet)
    origin = ExportSource.of(name)
    recover_folder(out)
    with staged_folder(out) as folder:
        check = _WRITERS[format](model, extracted, subnet, folder)
        record = ExportRecord(
            format=format,
            subnet=SubnetConfig() if subnet is None else subnet,
            layers=shape.layers,
            model_class=type(model).__name__,
            check=check,
            source=origin.to_dict(),
            versions=_versions(format),
        )
        _copy_tokenizer(Path(name) if name else None, folder)
        card = render_card(
            out.name, format, extracted, record.subnet, origin, check, record.versions
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
        write_json(folder / RECORD_FILE, record.to_dict())
    return record


def load_for_export(folder: Path | str) -> DynaBertPreTrainedModel:
    """The model in a folder as it was saved: with its head, pooler and dtype.

    Args:
        folder: Of a DynaBERT, BERT or RoBERTa model.
    """
    values, _ = PreTrainedConfig.get_config_dict(folder)
    _, _, head = (values.get("architectures") or [""])[0].partition("For")
    kind = getattr(modeling_heads, f"DynaBertFor{head}", None) if head else None
    if kind is not None:
        return cast(DynaBertPreTrainedModel, kind.from_pretrained(folder, dtype="auto"))
    pooled = any(name.endswith("pooler.dense.weight") for name in read_weights(folder))
    return DynaBertModel.from_pretrained(folder, dtype="auto", add_pooling_layer=pooled)


def _write_hf(
    model: DynaBertPreTrainedModel,
    extracted: DynaBertPreTrainedModel,
    subnet: SubnetConfig | None,
    folder: Path,
) -> ExportCheck:
    extracted.save_pretrained(folder)
    options = _beyond_config(extracted)
    loaded = type(model).from_pretrained(folder, dtype="auto", **options)
    read = loaded.state_dict()
    for name, weight in extracted.state_dict().items():
        assert torch.equal(read[name], weight.cpu()), f"{name} was not read as it was written"
    loaded.train(False).to(model.device)
    # Outputs of PyTorch's own products, in the heads, may depend on where a weight lies in memory.
    limit = 4 * torch.finfo(model.dtype).eps
    if model.quantization is not None:
        truth, about = run_model(extracted), "the extracted subnet"
    else:
        truth, about = run_model(model, subnet=subnet), "the subnet in its model"
    with evaluation_mode(model):
        return check_export(_WHO, loaded.config, truth, run_model(loaded), limit, about)


def _write_transformers(
    model: DynaBertPreTrainedModel,
    extracted: DynaBertPreTrainedModel,
    subnet: SubnetConfig | None,
    folder: Path,
) -> ExportCheck:
    config = extracted.config.to_hf()
    family = "Roberta" if extracted.config.architecture == "roberta" else "Bert"
    kind: Any = getattr(transformers, type(model).__name__.replace("DynaBert", family))
    options = _beyond_config(extracted)
    if isinstance(extracted, DynaBertForQuestionAnswering):
        config.num_labels = 2  # a start and an end, whatever else the configuration names
    with torch.device("meta"):
        plain = kind(config, **options)
    state = to_hf_state_dict(extracted.state_dict(), extracted.config)
    plain.load_state_dict(state, assign=True)
    plain.tie_weights()
    plain.save_pretrained(folder)
    loaded = kind.from_pretrained(folder, dtype=torch.float32, **options).eval()
    return _check_float32(extracted, run_model(loaded), 1e-5)


def _beyond_config(model: DynaBertPreTrainedModel) -> dict[str, Any]:
    """What makes a model like `model`, and no configuration says."""
    has_choice = isinstance(model, DynaBertModel)
    return {"add_pooling_layer": model.pooler is not None} if has_choice else {}


def _write_graph(
    write: Callable[[DynaBertPreTrainedModel, Path], Run], limit: float
) -> Callable[..., ExportCheck]:
    def write_and_check(
        model: DynaBertPreTrainedModel,
        extracted: DynaBertPreTrainedModel,
        subnet: SubnetConfig | None,
        folder: Path,
    ) -> ExportCheck:
        _to_float32(extracted)
        run = write(extracted, folder)
        extracted.config.save_pretrained(folder)  # labels, for whoever reads the outputs
        return _check_float32(extracted, run, limit)

    return write_and_check


_WRITERS: dict[str, Callable[..., ExportCheck]] = {
    "hf": _write_hf,
    "transformers": _write_transformers,
    "onnx": _write_graph(write_onnx, 1e-4),
    "torch-export": _write_graph(write_program, 1e-5),
}


def _check_float32(extracted: DynaBertPreTrainedModel, got: Run, limit: float) -> ExportCheck:
    """Compare with the extracted model on the reference backend, in float32 on the CPU."""
    truth = run_model(_to_float32(extracted))
    about = "the subnet in float32 on `reference`"
    with use_backend("reference"):
        return check_export(_WHO, extracted.config, truth, got, limit, about)


def _to_float32(model: DynaBertPreTrainedModel) -> nn.Module:
    """`model` itself, now in float32 on the CPU."""
    module: nn.Module = model
    return module.to("cpu", torch.float32)


def _check_target(out: Path, overwrite: bool) -> None:
    """Refuse a place that holds something an export did not make."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        read_json(out / RECORD_FILE, schema=SCHEMA)
    except (OSError, ValueError):
        raise ValueError(
            f"{_WHO}: out={str(out)!r} exists, expected a new or empty folder. Name another."
        ) from None
    if not overwrite:
        raise ValueError(
            f"{_WHO}: out={str(out)!r} holds an export, expected a new or empty folder. Name "
            "another, or allow to overwrite it."
        )


def _copy_tokenizer(source: Path | None, folder: Path) -> None:
    for name in _TOKENIZER_FILES:
        if source is not None and (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _versions(format: str) -> dict[str, str]:
    versions = {
        "dynabert-kernels": dynabert_kernels.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if format == "onnx":
        versions["onnxruntime"] = version("onnxruntime")
    return versions
