"""One model, many threads, a random subnet per call: nothing is shared that a call could change."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from dynabert import SubnetConfig

NUM_THREADS = 8
SUBNETS = [
    SubnetConfig(width, depth) for width in (1.0, 0.75, 0.5, 0.25) for depth in (1.0, 2 / 3, 0.5)
]


@pytest.mark.parametrize(
    "num_calls", [100, pytest.param(2000, marks=pytest.mark.slow)], ids=["100", "2000"]
)
def test_threads_sharing_a_model_never_get_each_others_subnet(
    make_hf: Any, ours: Any, make_batch: Any, num_calls: int
) -> None:
    model = ours(make_hf("bert", hidden_size=24, intermediate_size=24))
    batch = make_batch(model.config, lengths=(5, 2))
    mixed: list[Any] = [SubnetConfig(0.25, 0.5), SubnetConfig()]
    choices = [*SUBNETS, None, mixed]
    with torch.inference_mode():
        expected = [model(**batch, subnet=subnet).logits for subnet in choices]
    views = [model.with_subnet(subnet) for subnet in SUBNETS]

    def work(seed: int) -> int:
        draw = random.Random(seed)
        num_wrong = 0
        with torch.inference_mode():
            for _ in range(num_calls):
                chosen = draw.randrange(len(choices))
                if chosen < len(views) and draw.random() < 0.25:
                    logits = views[chosen](**batch).logits
                else:
                    logits = model(**batch, subnet=choices[chosen]).logits
                num_wrong += not torch.equal(logits, expected[chosen])
        return num_wrong

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        assert sum(pool.map(work, range(NUM_THREADS))) == 0
    for first in range(len(SUBNETS)):
        for second in range(first):
            assert not torch.equal(expected[first], expected[second])
