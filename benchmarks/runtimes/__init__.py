"""One small file per runtime: each opens a `Session` on a job's weights and input.

A runtime is imported only in the worker process that runs it (`benchmarks.peer_worker`), so that no
two share a thread pool, an allocator or a clock. It sees dense weights already cut to the subnet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from benchmarks.cases import MODELS
from benchmarks.geometry import Geometry


@dataclass(frozen=True)
class Job:
    """What one worker runs.

    Attributes:
        runtime: Name of the module in this package.
        variant: What tells two peers of one runtime apart; "" for the plain one.
        dtype: "float32", "bfloat16" or "int8".
        threads: Threads the runtime may use.
        model: Name of the geometry.
        width: Of the subnet.
        depth: Of the subnet.
        full_weights: Weights of the full network, Hugging Face's names (safetensors).
        subnet_weights: The same of the dense subnet; exported files are kept beside it.
        inputs: Archive with ``ids`` and ``mask``, ``[B, S]`` int64, and ``is_padded``.
        backend: Backend to force for our own kernels; "" leaves the choice automatic.
    """

    runtime: str
    variant: str
    dtype: str
    threads: int
    model: str
    width: float
    depth: float
    full_weights: str
    subnet_weights: str
    inputs: str
    backend: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; ``Job(**values)`` is the inverse."""
        return asdict(self)

    def read_inputs(self) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
        """Token ids, and the mask if some positions are padding."""
        with np.load(self.inputs) as archive:
            return archive["ids"], archive["mask"] if bool(archive["is_padded"]) else None

    def cached(self, name: str) -> Path:
        """A file beside the subnet's weights that outlives the worker."""
        return Path(self.subnet_weights).with_suffix(f".{name}")


@dataclass
class Session:
    """A model ready to run on its input.

    Attributes:
        run: One call, from token ids to the last hidden state; back when the result is there.
        output: The hidden state of a call, float32 ``[B, S, C]``; anything at padded positions.
        notes: What to record about how it runs: versions, settings, proof of the dtype.
    """

    run: Callable[[], object]
    output: Callable[[], NDArray[np.float32]]
    notes: dict[str, Any] = field(default_factory=dict)


def geometry_of(job: Job) -> Geometry:
    """Sizes of the job's full network."""
    return next(model for model in MODELS if model.name == job.model)


class Runtime(Protocol):
    """What a module of this package has."""

    def open_session(self, job: Job) -> Session:
        """Load the weights, set the threads, and be ready to run."""
        ...
