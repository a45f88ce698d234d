"""CTranslate2's encoder, built from the subnet's own sizes: float32, or int8 weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
from ctranslate2.specs import common_spec, transformer_spec

from benchmarks.plain_bert import load_state
from benchmarks.runtimes import Job, Session

_EPS = 1e-12


def open_session(job: Job) -> Session:
    """An encoder on the converted weights; int8 is quantised while it loads.

    Raises:
        ValueError: The library's build has no such compute type on this CPU.
    """
    folder = _converted(job)
    encoder = ctranslate2.Encoder(
        str(folder),
        device="cpu",
        compute_type=job.dtype,
        inter_threads=1,
        intra_threads=job.threads,
    )
    ids, mask = job.read_inputs()
    lengths = np.full(ids.shape[0], ids.shape[1]) if mask is None else mask.sum(axis=1)
    tokens = ctranslate2.StorageView.from_array(ids.astype(np.int32))
    counts = ctranslate2.StorageView.from_array(lengths.astype(np.int32))

    def run() -> Any:
        return encoder.forward_batch(tokens, counts).last_hidden_state

    notes = {"ctranslate2": ctranslate2.__version__, "compute_type": encoder.compute_type}
    return Session(run, lambda: np.array(run(), dtype=np.float32), notes)


def _converted(job: Job) -> Path:
    """The model folder of the subnet; heads of BERT's size keep it exact at every width."""
    folder = job.cached("ctranslate2")
    if folder.exists():
        return folder
    state, head_dim = load_state(Path(job.subnet_weights))
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    depth = 1 + max(int(name.split(".")[2]) for name in arrays if name.startswith("encoder."))
    inner = arrays["encoder.layer.0.attention.self.query.weight"].shape[0]
    encoder = transformer_spec.TransformerEncoderSpec(
        depth,
        inner // head_dim,
        pre_norm=False,
        activation=common_spec.Activation.GELU,
        layernorm_embedding=True,
        num_source_embeddings=2,
        embeddings_merge=common_spec.EmbeddingsMerge.ADD,
        head_dim=head_dim,
    )
    encoder.scale_embeddings = False
    for spec, name in zip(encoder.embeddings, ("word", "token_type"), strict=True):
        spec.weight = arrays[f"embeddings.{name}_embeddings.weight"]
    encoder.position_encodings.encodings = arrays["embeddings.position_embeddings.weight"]
    _set_norm(encoder.layernorm_embedding, arrays, "embeddings.LayerNorm")
    for index, layer in enumerate(encoder.layer):
        theirs = f"encoder.layer.{index}."
        attention, ffn = layer.self_attention, layer.ffn
        for kind in ("weight", "bias"):
            parts = [
                arrays[f"{theirs}attention.self.{p}.{kind}"] for p in ("query", "key", "value")
            ]
            setattr(attention.linear[0], kind, np.concatenate(parts))
        _set_linear(attention.linear[1], arrays, f"{theirs}attention.output.dense")
        _set_norm(attention.layer_norm, arrays, f"{theirs}attention.output.LayerNorm")
        _set_linear(ffn.linear_0, arrays, f"{theirs}intermediate.dense")
        _set_linear(ffn.linear_1, arrays, f"{theirs}output.dense")
        _set_norm(ffn.layer_norm, arrays, f"{theirs}output.LayerNorm")
    spec = transformer_spec.TransformerEncoderModelSpec(encoder)
    tokens = [f"token{i}" for i in range(arrays["embeddings.word_embeddings.weight"].shape[0])]
    spec.register_vocabulary(tokens)
    spec.config.unk_token = tokens[0]
    spec.config.layer_norm_epsilon = _EPS
    spec.validate()
    spec.optimize()
    unfinished = folder.with_suffix(".part")
    unfinished.mkdir(parents=True, exist_ok=True)
    spec.save(str(unfinished))
    assert json.loads((unfinished / "config.json").read_text())["layer_norm_epsilon"] == _EPS
    os.replace(unfinished, folder)
    return folder


def _set_norm(spec: Any, arrays: dict[str, Any], name: str) -> None:
    spec.gamma, spec.beta = arrays[f"{name}.weight"], arrays[f"{name}.bias"]


def _set_linear(spec: Any, arrays: dict[str, Any], name: str) -> None:
    spec.weight, spec.bias = arrays[f"{name}.weight"], arrays[f"{name}.bias"]
