"""PyTorch on a plain dense encoder: eager, or compiled with its weights frozen in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from benchmarks.plain_bert import load_plain
from benchmarks.runtimes import Job, Session

COMPILED = "compiled"


def open_session(job: Job) -> Session:
    """The plain model in the job's dtype, compiled if the variant says so."""
    torch.set_num_threads(job.threads)
    model = load_plain(Path(job.subnet_weights)).to(getattr(torch, job.dtype))
    ids, mask = (None if a is None else torch.from_numpy(a) for a in job.read_inputs())
    notes = {"torch": torch.__version__}
    call = model
    if job.variant == COMPILED:
        from torch._inductor import config

        # Constants folded and weights packed for oneDNN; needs gradients off, which they are.
        config.freezing = True
        call = torch.compile(model, fullgraph=True, dynamic=False)
        notes["compiled"] = "inductor, freezing"

    def run() -> torch.Tensor:
        with torch.no_grad():
            return call(ids, mask)

    return Session(run, lambda: run().float().numpy().astype(np.float32), notes)
