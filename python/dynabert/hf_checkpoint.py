"""Hugging Face checkpoints: read any of them, rename and pack weights in both directions.

The only file that knows Hugging Face's weight names. A name here is relative to the encoder
(``encoder.layer.0...``); checkpoints of a model with a head put ``bert.`` or ``roberta.`` before
it, we put ``dynabert.``.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers.utils.hub import cached_file

from dynabert.configuration_dynabert import DynaBertConfig
from dynabert.subnet import LayerShape
from dynabert_kernels import PackedAttention, PackedFFN

StateDict = dict[str, Tensor]

PREFIX = "dynabert."
HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "token",
    "revision",
    "proxies",
    "subfolder",
)

# What safetensors, zip archives and pickles raise on a file that is cut short, damaged or not
# theirs.
UNREADABLE = (SafetensorError, pickle.UnpicklingError, EOFError)

_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # in the order they are looked for

# For each sublayer, its tensors as `from_hf` and `to_hf` call them -> names inside a HF layer.
_HF_NAMES = {
    "attention": {
        "query_weight": "attention.self.query.weight",
        "query_bias": "attention.self.query.bias",
        "key_weight": "attention.self.key.weight",
        "key_bias": "attention.self.key.bias",
        "value_weight": "attention.self.value.weight",
        "value_bias": "attention.self.value.bias",
        "out_weight": "attention.output.dense.weight",
        "out_bias": "attention.output.dense.bias",
        "norm_weight": "attention.output.LayerNorm.weight",
        "norm_bias": "attention.output.LayerNorm.bias",
    },
    "ffn": {
        "up_weight": "intermediate.dense.weight",
        "up_bias": "intermediate.dense.bias",
        "down_weight": "output.dense.weight",
        "down_bias": "output.dense.bias",
        "norm_weight": "output.LayerNorm.weight",
        "norm_bias": "output.LayerNorm.bias",
    },
}
# Our parameters of a sublayer, in the order its packed class takes them.
_FIELDS = {
    "attention": ("qkv_weight", "qkv_bias", "out_weight", "out_bias", "norm_weight", "norm_bias"),
    "ffn": ("up_weight", "up_bias", "down_weight", "down_bias", "norm_weight", "norm_bias"),
}

_OLD_NORM_NAMES = {"gamma": "weight", "beta": "bias"}

_EMBEDDING_NORM = {
    "embeddings.norm.weight": "embeddings.LayerNorm.weight",
    "embeddings.norm.bias": "embeddings.LayerNorm.bias",
}

# Ours -> Hugging Face's, for the masked-language-modelling head. Where two of theirs hold one
# value, both are listed.
_LM_HEAD = {
    "bert": {
        "lm_head.dense.weight": ("cls.predictions.transform.dense.weight",),
        "lm_head.dense.bias": ("cls.predictions.transform.dense.bias",),
        "lm_head.norm.weight": ("cls.predictions.transform.LayerNorm.weight",),
        "lm_head.norm.bias": ("cls.predictions.transform.LayerNorm.bias",),
        "lm_head.decoder.weight": ("cls.predictions.decoder.weight",),
        "lm_head.decoder.bias": ("cls.predictions.bias", "cls.predictions.decoder.bias"),
    },
    "roberta": {
        "lm_head.dense.weight": ("lm_head.dense.weight",),
        "lm_head.dense.bias": ("lm_head.dense.bias",),
        "lm_head.norm.weight": ("lm_head.layer_norm.weight",),
        "lm_head.norm.bias": ("lm_head.layer_norm.bias",),
        "lm_head.decoder.weight": ("lm_head.decoder.weight",),
        "lm_head.decoder.bias": ("lm_head.bias", "lm_head.decoder.bias"),
    },
}


def from_hf_state_dict(
    state: Mapping[str, Tensor], config: DynaBertConfig, *, prefix: str
) -> StateDict:
    """Rename and pack the weights of a BERT or RoBERTa checkpoint, with any head or none.

    Args:
        state: The checkpoint; ``LayerNorm.gamma`` and ``beta`` of old ones are understood.
        config: What the checkpoint is.
        prefix: Put before the encoder's names: `PREFIX` for a model with a head, else ``""``.

    Returns:
        Weights under our names. What has no counterpart, including a sublayer of which a weight is
        missing, keeps its name, so that whoever loads the result reports it.

    Raises:
        ValueError: A weight of a sublayer has a shape that `config` does not describe.
    """
    rest = {_modern_name(name): tensor for name, tensor in state.items()}
    base = f"{config.architecture}."
    is_prefixed = any(name.startswith(base) for name in rest)
    encoder = {
        name.removeprefix(base): rest.pop(name)
        for name in list(rest)
        if name.startswith(base if is_prefixed else ("embeddings.", "encoder.", "pooler."))
    }
    packed: StateDict = {}
    for shape in config.layer_shapes:
        for sublayer in _FIELDS:
            packed |= _pack(encoder, shape, sublayer, config)
    for ours, theirs in _EMBEDDING_NORM.items():
        if theirs in encoder:
            encoder[ours] = encoder.pop(theirs)
    result = {prefix + name: tensor for name, tensor in (encoder | packed).items()}
    for ours, names in _LM_HEAD[config.architecture].items():
        found = [rest.pop(name) for name in names if name in rest]
        if found:
            result[ours] = found[0]
    return result | rest


def to_hf_state_dict(state: Mapping[str, Tensor], config: DynaBertConfig) -> StateDict:
    """Unpack and rename a model for the Hugging Face class of the same kind.

    Whether that class can express the model is for `DynaBertConfig.to_hf` to say.

    Args:
        state: ``state_dict()`` of one of our models.
        config: Its configuration.

    Returns:
        Weights that the corresponding class (``BertModel``, ``RobertaForMaskedLM``, ...) loads with
        ``strict=True``.

    Raises:
        ValueError: A sublayer has a shape that `config` does not describe, or misses a weight.
    """
    has_head = any(name.startswith(PREFIX) for name in state)
    rest = {
        name: tensor for name, tensor in state.items() if has_head and not name.startswith(PREFIX)
    }
    encoder = {
        name.removeprefix(PREFIX): tensor for name, tensor in state.items() if name not in rest
    }
    unpacked: StateDict = {}
    for shape in config.layer_shapes:
        for sublayer in _FIELDS:
            unpacked |= _unpack(encoder, shape, sublayer, config)
    for ours, theirs in _EMBEDDING_NORM.items():
        encoder[theirs] = encoder.pop(ours)
    base = f"{config.architecture}." if has_head else ""
    result = {base + name: tensor for name, tensor in (encoder | unpacked).items()}
    for ours, names in _LM_HEAD[config.architecture].items():
        if ours in rest:
            tensor = rest.pop(ours)
            result |= dict.fromkeys(names, tensor)
    return result | rest


def read_weights(
    name_or_path: str | Path,
    *,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    **hub: Any,
) -> StateDict:
    """Read the weights of a checkpoint directory or hub id into memory, onto the CPU.

    Safetensors are preferred to ``.bin``; both may be in shards. A ``.bin`` is read with
    ``weights_only=True``: nothing in it is executed.

    Args:
        name_or_path: A directory, or a hub id, which is downloaded.
        variant: Which of several sets of files, as in ``model.fp16.safetensors``.
        use_safetensors: True reads nothing else, False reads ``.bin`` only.
        **hub: Some of `HUB_ARGUMENTS`.

    Raises:
        OSError: There are no weights there.
        ValueError: A file is damaged, or holds anything but tensors.
    """
    names = [n for n in _WEIGHT_FILES if use_safetensors in (None, n.endswith("safetensors"))]
    for name in names:
        file = _find(name_or_path, _with_variant(name, variant), **hub)
        if file is not None:
            return _read_file(file)
        index = _find(name_or_path, _with_variant(f"{name}.index.json", variant), **hub)
        if index is not None:
            state: StateDict = {}
            for shard in _shards(index):
                file = _find(name_or_path, shard, **hub)
                if file is None:
                    raise OSError(
                        f"from_pretrained: {name_or_path} has no {shard}, expected every file that "
                        f"{index.name} lists. Copy or download the checkpoint again."
                    )
                state |= _read_file(file)
            return state
    raise OSError(
        f"from_pretrained: {name_or_path} has no weights, expected one of "
        f"{', '.join(_with_variant(name, variant) for name in names)}."
    )


def unreadable(file: str | os.PathLike[str], error: Exception) -> ValueError:
    """The error for a weights file that cannot be read; raise it ``from`` the one in hand."""
    if isinstance(error, pickle.UnpicklingError):
        return ValueError(
            f"from_pretrained: {file} is not a plain file of tensors, expected safetensors or a "
            ".bin without other Python objects. It was not executed; get the checkpoint as "
            "safetensors."
        )
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ValueError(
        f"from_pretrained: {file} cannot be read ({reason}), expected a complete weights file. "
        "Copy or download it again."
    )


def _find(name_or_path: str | Path, filename: str, **hub: Any) -> Path | None:
    found = cached_file(name_or_path, filename, _raise_exceptions_for_missing_entries=False, **hub)
    return None if found is None else Path(found)


def _with_variant(filename: str, variant: str | None) -> str:
    stem, _, suffix = filename.rpartition(".")
    return filename if variant is None else f"{stem}.{variant}.{suffix}"


def _shards(index: Path) -> Iterable[str]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise unreadable(index, error) from error
    for name in names:
        if Path(name).name != name:  # a shard lies beside its index, nowhere else
            raise ValueError(
                f"from_pretrained: {index} lists {name!r}, expected a file name without a folder."
            )
    return names


def _read_file(file: Path) -> StateDict:
    try:
        if file.suffix == ".safetensors":
            # Not memory-mapped: the model must survive its file being overwritten, also by itself.
            return safetensors.torch.load(file.read_bytes())
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (*UNREADABLE, RuntimeError, ValueError) as error:
        raise unreadable(file, error) from error
    if not isinstance(state, dict) or not all(
        isinstance(value, Tensor) for value in state.values()
    ):
        raise ValueError(
            f"from_pretrained: {file} holds more than named tensors, expected a state dict."
        )
    return dict(state)


def _modern_name(name: str) -> str:
    head, _, last = name.rpartition(".")
    return (
        f"{head}.{_OLD_NORM_NAMES[last]}"
        if head.endswith("LayerNorm") and last in _OLD_NORM_NAMES
        else name
    )


def _pack(
    encoder: StateDict, shape: LayerShape, sublayer: str, config: DynaBertConfig
) -> StateDict:
    """Take one sublayer out of `encoder`, packed; one that is incomplete stays there."""
    layer, names = f"encoder.layer.{shape.index}.", _HF_NAMES[sublayer]
    if not all(layer + name in encoder for name in names.values()):
        return {}
    tensors: dict[str, Any] = {role: encoder.pop(layer + n) for role, n in names.items()}
    for role, expected in _hf_shapes(config, shape, sublayer).items():
        if tuple(tensors[role].shape) != expected:
            raise ValueError(
                f"from_pretrained: {layer}{names[role]} has shape {list(tensors[role].shape)}, "
                f"expected {list(expected)}. The weights do not belong to this config.json."
            )
    weights: PackedAttention | PackedFFN
    if sublayer == "attention":
        weights = PackedAttention.from_hf(**tensors, num_heads=shape.num_heads)
    else:
        weights = PackedFFN.from_hf(**tensors)
    return {f"{layer}{sublayer}.{field}": getattr(weights, field) for field in _FIELDS[sublayer]}


def _unpack(
    encoder: StateDict, shape: LayerShape, sublayer: str, config: DynaBertConfig
) -> StateDict:
    """Take one sublayer out of `encoder`, under Hugging Face's names."""
    layer = f"encoder.layer.{shape.index}."
    fields = [f"{layer}{sublayer}.{field}" for field in _FIELDS[sublayer]]
    missing = [field for field in fields if field not in encoder]
    if missing:
        raise ValueError(f"to_hf_state_dict: {missing} missing, expected every weight of a layer.")
    packed_class = PackedAttention if sublayer == "attention" else PackedFFN
    weights: list[Any] = [encoder.pop(field) for field in fields]
    tensors = packed_class(*weights).validate().to_hf()
    for role, expected in _hf_shapes(config, shape, sublayer).items():
        if tuple(tensors[role].shape) != expected:
            raise ValueError(
                f"to_hf_state_dict: {layer}{sublayer} gives {role} of shape "
                f"{list(tensors[role].shape)}, expected {list(expected)}. Pass the configuration "
                "these weights belong to."
            )
    return {layer + name: tensors[role] for role, name in _HF_NAMES[sublayer].items()}


def _hf_shapes(
    config: DynaBertConfig, shape: LayerShape, sublayer: str
) -> dict[str, tuple[int, ...]]:
    hidden, neurons = config.hidden_size, shape.intermediate_size
    if sublayer == "ffn":
        shapes: dict[str, tuple[int, ...]] = {
            "up_weight": (neurons, hidden),
            "up_bias": (neurons,),
            "down_weight": (hidden, neurons),
            "down_bias": (hidden,),
        }
    else:
        inner = shape.num_heads * config.head_dim
        shapes = {f"{role}_weight": (inner, hidden) for role in ("query", "key", "value")}
        shapes |= {f"{role}_bias": (inner,) for role in ("query", "key", "value")}
        shapes |= {"out_weight": (hidden, inner), "out_bias": (hidden,)}
    return shapes | {"norm_weight": (hidden,), "norm_bias": (hidden,)}
