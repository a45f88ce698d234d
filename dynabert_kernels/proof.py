"""What runs on cards have proven of the GPU kernels: data beside this file. Imports no Triton.

An entry holds for cards of its capability and for what made the machine code: the minor version of
Triton, or the very sources and compiler of the CUDA kernels. Every other path checks itself when it
is first used, see `ops._trust`.
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

from dynabert_kernels import _cuda_extension
from dynabert_kernels.triton import availability

PROVEN = FilePath(__file__).with_name("proven.json")
CUDA, TRITON = BACKENDS = ("cuda", "triton")
FORWARD, BACKWARD = "forward", "backward"
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in availability.DTYPES}


class Path(NamedTuple):
    """One way through the kernels; sizes, lengths, widths and dropout do not tell paths apart.

    Attributes:
        backend: Whose kernels.
        op: Name of the op.
        dtype: Dtype of the matrix products, by name.
        head_dim: Size of a head, None for an op without heads.
        direction: ``"forward"`` for calls without gradients; ``"backward"`` for those with, of
            which it covers both passes.
        capability: Of the card, such as ``"sm_90"``.
    """

    backend: str
    op: str
    dtype: str
    head_dim: int | None
    direction: str
    capability: str

    def __str__(self) -> str:
        """Without the backend, which whoever speaks of a path has named."""
        heads = "" if self.head_dim is None else f" with head_dim {self.head_dim}"
        return f"{self.op} {self.direction} in {self.dtype}{heads} on {self.capability}"


class Proof(NamedTuple):
    """A path that agreed with the reference on a card, and with which software.

    Attributes:
        path: What agreed.
        card: Name of the card.
        torch: Version of torch.
        kernels: What made the machine code, see `kernels_version`.
        date: Of the run.
    """

    path: Path
    card: str
    torch: str
    kernels: str
    date: str


class _Kind(NamedTuple):
    """The paths of one op."""

    dtypes: Sequence[torch.dtype]
    head_dims: Sequence[int | None]
    directions: Sequence[str]


def all_paths(backend: str, capability: str) -> list[Path]:
    """Every path that a backend has kernels for on cards of a capability; ``""`` for any."""
    if backend == CUDA:
        sublayer = _Kind(_cuda_extension.DTYPES, (None,), (FORWARD,))
        head_dims = _cuda_extension.HEAD_DIMS
        others = {}
        if capability in ("", _cuda_extension.ENCODER_CAPABILITY):
            sizes = _cuda_extension.ENCODER_HEAD_DIMS
            others["encoder"] = _Kind((torch.bfloat16,), sizes, (FORWARD,))
    else:
        sublayer = _Kind(availability.DTYPES, (None,), (FORWARD, BACKWARD))
        head_dims = availability.HEAD_DIMS
        others = {"embeddings": sublayer._replace(directions=(FORWARD,))}
    kinds = {"attention": sublayer._replace(head_dims=head_dims), "ffn": sublayer, **others}
    return [
        Path(backend, op, name_of(dtype), head_dim, direction, capability)
        for op, kind in kinds.items()
        for dtype in kind.dtypes
        for head_dim in kind.head_dims
        for direction in kind.directions
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


def kernels_version(backend: str) -> str | None:
    """What makes a backend's machine code here: Triton's version, or sources and nvcc; or None."""
    return _cuda_extension.kernels_version() if backend == CUDA else triton_version()


def is_proven(path: Path) -> bool:
    """Whether a recorded run proves a path with the kernels that are installed here."""
    return path in _proven_here()


@functools.cache
def _proven_here() -> frozenset[Path]:
    here = _versions_here()
    return frozenset(
        proof.path for proof in proofs() if _version(proof) == here[proof.path.backend]
    )


def _versions_here() -> dict[str, str]:
    return {backend: _decisive(backend, kernels_version(backend) or "") for backend in BACKENDS}


def _version(proof: Proof) -> str:
    return _decisive(proof.path.backend, proof.kernels)


def _decisive(backend: str, version: str) -> str:
    """The part of a version that a proof depends on: Triton's third number changes no kernel."""
    return version if backend == CUDA else ".".join(version.split(".")[:2])


@functools.cache
def proofs() -> tuple[Proof, ...]:
    """The recorded proofs, read once. A damaged file proves nothing, which one warning says."""
    try:
        return read(PROVEN)
    except (OSError, ValueError) as error:
        warnings.warn(
            f"proof: no recorded proof can be read, so every path checks itself: {error}",
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
            "`python -m dynabert_kernels.prove`."
        ) from error


def _proof(entry: dict[str, Any]) -> Proof:
    path = Path(*(entry[field] for field in Path._fields))
    if path not in all_paths(path.backend, path.capability):
        raise ValueError(f"there is no path {path}")
    return Proof(path, *(str(entry[field]) for field in Proof._fields[1:]))


def write(file: FilePath, found: Iterable[Proof], *, tried: Sequence[Path] = ()) -> None:
    """Add proofs to a file, in place of older ones of the same paths with the same kernels.

    Args:
        file: May not exist yet.
        found: What to add.
        tried: Paths whose older proofs with the installed kernels go even if none is added.

    Raises:
        ValueError: The file is there and damaged.
    """
    older = read(file) if file.exists() else ()
    found, here = list(found), _versions_here()
    gone = {(proof.path, _version(proof)) for proof in found}
    gone |= {(path, here[path.backend]) for path in tried}
    kept = [proof for proof in older if (proof.path, _version(proof)) not in gone]
    everything = [path for backend in BACKENDS for path in all_paths(backend, "")]
    order = {path: place for place, path in enumerate(everything)}
    kept = sorted(
        (*kept, *found),
        key=lambda p: (p.path.capability, _version(p), order[p.path._replace(capability="")]),
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
