"""What runs on cards have proven of the Triton kernels: data beside this file. Imports no Triton.

An entry holds for cards of its capability and for the minor version of Triton that made its
machine code; every other path checks itself when it is first used, see `ops._trust`.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import torch

from dynabert_kernels.triton import availability

PROVEN = FilePath(__file__).with_name("proven.json")
FORWARD, BACKWARD = "forward", "backward"
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in availability.DTYPES}


class Path(NamedTuple):
    """One way through the kernels; sizes, lengths, widths and dropout do not tell paths apart.

    Attributes:
        op: Name of the op.
        dtype: Dtype of the matrix products, by name.
        head_dim: Size of a head, None for an op without heads.
        direction: ``"forward"`` for calls without gradients; ``"backward"`` for those with, of
            which it covers both passes.
        capability: Of the card, such as ``"sm_90"``.
    """

    op: str
    dtype: str
    head_dim: int | None
    direction: str
    capability: str

    def __str__(self) -> str:
        heads = "" if self.head_dim is None else f" with head_dim {self.head_dim}"
        return f"{self.op} {self.direction} in {self.dtype}{heads} on {self.capability}"


class Proof(NamedTuple):
    """A path that agreed with the reference on a card, and with which software."""

    path: Path
    card: str
    torch: str
    triton: str
    date: str


def all_paths(capability: str) -> list[Path]:
    """Every path that kernels exist for."""
    return [
        Path(op, dtype, head_dim, direction, capability)
        for op, sizes, directions in (
            ("attention", availability.HEAD_DIMS, (FORWARD, BACKWARD)),
            ("ffn", (None,), (FORWARD, BACKWARD)),
            ("embeddings", (None,), (FORWARD,)),
        )
        for dtype in _DTYPES
        for head_dim in sizes
        for direction in directions
    ]


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype in a path."""
    return str(dtype).removeprefix("torch.")


def dtype_of(path: Path) -> torch.dtype:
    """The dtype of a path's matrix products."""
    return _DTYPES[path.dtype]


def capability(device: torch.device) -> str | None:
    """Of a card; None where there is none, as in Triton's interpreter."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def triton_version() -> str | None:
    """The version of the installed Triton, or None."""
    for package in ("triton", "pytorch-triton"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def is_proven(path: Path) -> bool:
    """Whether a recorded run proves a path with the Triton that is installed here."""
    return path in _proven_here()


@functools.cache
def _proven_here() -> frozenset[Path]:
    here = _minor(triton_version() or "")
    return frozenset(proof.path for proof in proofs() if _minor(proof.triton) == here)


def _minor(version: str) -> tuple[str, ...]:
    return tuple(version.split(".")[:2])


@functools.cache
def proofs() -> tuple[Proof, ...]:
    """The recorded proofs, read once. A damaged file proves nothing, which one warning says."""
    try:
        return read(PROVEN)
    except (OSError, ValueError) as error:
        warnings.warn(
            f"triton: no recorded proof can be read, so every path checks itself: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return ()


def read(file: FilePath) -> tuple[Proof, ...]:
    """The proofs in a file.

    Raises:
        OSError: It cannot be read.
        ValueError: It does not hold a list of proofs.
    """
    try:
        return tuple(_proof(entry) for entry in json.loads(file.read_text("utf-8")))
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(
            f"proof: {file.name} is damaged ({type(error).__name__}: {error}), expected a JSON "
            "list of proofs. Reinstall the package, or write it anew with "
            "`python -m dynabert_kernels.triton.prove`."
        ) from error


def _proof(entry: dict[str, Any]) -> Proof:
    path = Path(*(entry[field] for field in Path._fields))
    if path not in all_paths(path.capability):
        raise ValueError(f"there is no path {path}")
    return Proof(path, *(str(entry[field]) for field in Proof._fields[1:]))


def write(file: FilePath, found: Iterable[Proof], *, tried: Sequence[Path] = ()) -> None:
    """Add proofs to a file, in place of older ones of the same paths with the same Triton.

    Args:
        file: May not exist yet.
        found: What to add.
        tried: Paths whose older proofs with the installed Triton go even if none is added.

    Raises:
        ValueError: The file is there and damaged.
    """
    older = read(file) if file.exists() else ()
    found, here = list(found), _minor(triton_version() or "")
    gone = {(proof.path, _minor(proof.triton)) for proof in found} | {(p, here) for p in tried}
    kept = [proof for proof in older if (proof.path, _minor(proof.triton)) not in gone]
    order = {path._replace(capability=""): place for place, path in enumerate(all_paths(""))}
    kept = sorted(
        (*kept, *found),
        key=lambda p: (p.path.capability, _minor(p.triton), order[p.path._replace(capability="")]),
    )
    lines = [json.dumps(as_entry(proof)) for proof in kept]
    text = "[\n  " + ",\n  ".join(lines) + "\n]\n" if lines else "[]\n"
    beside = file.with_name(f"{file.name}.part")
    beside.write_text(text, "utf-8")
    os.replace(beside, file)


def as_entry(proof: Proof) -> dict[str, Any]:
    """A proof as the file holds it."""
    others = proof._asdict()
    return {**others.pop("path")._asdict(), **others}
