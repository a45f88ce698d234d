"""transformers' BertModel, its linear layers cut to the subnet: what everyone would write first."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from benchmarks.geometry import Subnet
from benchmarks.peer_models import bert_with_weights, extract
from benchmarks.plain_bert import load_state
from benchmarks.runtimes import Job, Session, geometry_of


def open_session(job: Job) -> Session:
    """The sliced model in the job's dtype, eager with fused attention."""
    torch.set_num_threads(job.threads)
    geometry = geometry_of(job)
    full = bert_with_weights(geometry, load_state(Path(job.full_weights))[0])
    model = extract(full, Subnet(geometry, job.width, job.depth)).to(getattr(torch, job.dtype))
    ids, mask = (None if a is None else torch.from_numpy(a) for a in job.read_inputs())

    def run() -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=mask).last_hidden_state

    notes = {"torch": torch.__version__, "transformers": transformers.__version__}
    return Session(run, lambda: run().float().numpy(), notes)
