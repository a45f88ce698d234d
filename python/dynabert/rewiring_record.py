"""What rewiring did to a model, kept beside its weights: orders, scores, where they came from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FILE_NAME = "rewiring.safetensors"
_TENSORS = ("head_order", "neuron_order", "head_scores", "neuron_scores")


@dataclass(frozen=True, eq=False)
class RewiringRecord:
    """Orders and scores of a rewiring, one entry per layer (DynaBERT, section 3.1).

    Attributes:
        head_order: Which original head now stands at each place, ``[H]``, int64.
        neuron_order: Which original neuron now stands at each place, ``[I]``, int64.
        head_scores: Importance of the heads in their original order, ``[H]``.
        neuron_scores: Importance of the neurons in their original order, ``[I]``.
        provenance: Where the scores come from (data, rule, number of batches, ...).

    Raises:
        ValueError: The fields differ in their number of layers, an order is not a permutation, or a
            score does not have one value per head or neuron.
    """

    head_order: tuple[Tensor, ...]
    neuron_order: tuple[Tensor, ...]
    head_scores: tuple[Tensor, ...]
    neuron_scores: tuple[Tensor, ...]
    provenance: Mapping[str, str | int | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _TENSORS:
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if len(getattr(self, name)) != len(self.head_order):
                raise ValueError(
                    f"RewiringRecord: {name} has {len(getattr(self, name))} layers, expected "
                    f"{len(self.head_order)}."
                )
        for unit in ("head", "neuron"):
            pairs = zip(
                getattr(self, f"{unit}_order"), getattr(self, f"{unit}_scores"), strict=True
            )
            for layer, (order, scores) in enumerate(pairs):
                if order.dtype != torch.int64 or not torch.equal(
                    order.sort().values.cpu(), torch.arange(len(order))
                ):
                    raise ValueError(
                        f"RewiringRecord: {unit}_order of layer {layer} is not a permutation, "
                        f"expected every index from 0 to {len(order) - 1} once, int64."
                    )
                if scores.shape != order.shape:
                    raise ValueError(
                        f"RewiringRecord: {unit}_scores of layer {layer} has shape "
                        f"{list(scores.shape)}, expected {list(order.shape)}."
                    )

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write ``rewiring.safetensors`` into `directory` and return its path."""
        tensors = {
            f"{name}.{layer}": tensor.detach().cpu().contiguous()
            for name in _TENSORS
            for layer, tensor in enumerate(getattr(self, name))
        }
        path = Path(directory) / FILE_NAME
        unfinished = path.with_name(f".{FILE_NAME}.{os.getpid()}")
        save_file(tensors, unfinished, metadata={"provenance": json.dumps(dict(self.provenance))})
        os.replace(unfinished, path)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RewiringRecord:
        """Read what `save` wrote.

        Raises:
            ValueError: The file is damaged or is not a rewiring record.
        """
        try:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())
                num_layers = len(names) // len(_TENSORS)
                fields = {
                    name: tuple(
                        file.get_tensor(f"{name}.{layer}").clone() for layer in range(num_layers)
                    )
                    for name in _TENSORS
                }
                provenance = json.loads((file.metadata() or {})["provenance"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(
                f"RewiringRecord.load: {path} cannot be read ({error}), expected a file written by "
                "save. Copy it again, or delete it to load the model without its record."
            ) from error
        return cls(**fields, provenance=provenance)
