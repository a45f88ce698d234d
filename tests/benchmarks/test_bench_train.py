"""The peers of the step benchmark do the same work, and its records say what ran."""

from __future__ import annotations

import pytest
import torch

from benchmarks import bench_train
from dynabert import DynaBertConfig, DynaBertForSequenceClassification


def load() -> DynaBertForSequenceClassification:
    torch.manual_seed(0)
    config = DynaBertConfig(
        vocab_size=40,
        hidden_size=48,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=96,
        max_position_embeddings=24,
        initializer_range=0.2,
    )
    return DynaBertForSequenceClassification(config)


def batch() -> dict[str, torch.Tensor]:
    mask = (torch.arange(9) < torch.tensor([[9], [4], [1], [7]])).long()
    ids = torch.randint(0, 40, (4, 9), generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 1, 0])
    types = torch.zeros_like(ids)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types, "labels": labels}


@pytest.mark.parametrize("stage", bench_train.stages(), ids=lambda stage: stage.name)
def test_the_peers_do_the_same_work(stage: bench_train.Stage) -> None:
    peers = bench_train.make_peers(stage, ["loop", "ours"], load)
    bench_train.check_agreement(peers, batch())
    timings = bench_train.measure(peers, [batch(), batch()], progress=lambda _: None)
    for parts in timings.values():
        taught = set() if stage.teacher is None else {"teacher"}
        assert set(parts) == {"step", "forward", "backward", "optimiser"} | taught
        assert len(parts["step"].samples_ms) == 2
        others = sum(timing.median_ms for part, timing in parts.items() if part != "step")
        assert 0 < others < 1.5 * parts["step"].median_ms


def test_a_peer_that_does_other_work_is_found() -> None:
    stage = bench_train.stages()[1]
    peers = bench_train.make_peers(stage, ["loop", "ours"], load)
    with torch.no_grad():
        peers["loop"].student.layers[2].up.bias[3] += 5.0
    with pytest.raises(AssertionError):
        bench_train.check_agreement(peers, batch())
