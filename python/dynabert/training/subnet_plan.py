"""Which subnets a training step runs, in which order, and who teaches each: a pure function of seed
and step."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from dynabert.subnet import SubnetConfig, SubnetShape
from dynabert.training.arguments import FULL, Stage


@dataclass(frozen=True)
class PlannedSubnet:
    """One subnet of a step.

    Attributes:
        index: Its position in ``stage.subnets``.
        subnet: The subnet.
        shape: The same in whole numbers.
        teacher: What of the teacher it learns from; None: it learns from labels.
    """

    index: int
    subnet: SubnetConfig
    shape: SubnetShape
    teacher: SubnetConfig | None


class SubnetPlan:
    """The order of a stage's subnets: from small to large, the full network last.

    Full last makes training exact under DistributedDataParallel where a step takes several passes:
    gradients are exchanged in the one backward pass that reaches every parameter.
    """

    def __init__(
        self, stage: Stage, resolve: Callable[[SubnetConfig], SubnetShape], seed: int
    ) -> None:
        """Order the subnets of `stage`; `resolve` gives the shape of a subnet.

        Raises:
            ValueError: A subnet does not fit the network, or has no teacher of the same width.
        """
        self._seed = seed
        self._stage = stage
        planned = [
            PlannedSubnet(index, subnet, resolve(subnet), _teacher_subnet(stage, subnet))
            for index, subnet in enumerate(stage.subnets)
        ]
        self._ordered = sorted(planned, key=lambda item: _size(item.shape))
        self._smallest = self._ordered[0]
        # A subnet may be written in another way and still be the whole network; the sort then
        # leaves its place open.
        self._full = planned[stage.subnets.index(FULL)] if FULL in stage.subnets else planned[0]
        self._ordered.remove(self._full)
        self._ordered.append(self._full)

    def at(self, step: int) -> list[PlannedSubnet]:
        """The subnets of one optimiser step, in training order."""
        stage = self._stage
        if stage.subnet_sampling == "all":
            return self._ordered
        always = {self._full.index}
        if stage.subnet_sampling == "sandwich":
            always.add(self._smallest.index)
        others = [item.index for item in self._ordered if item.index not in always]
        # A string seed is hashed with SHA-512, the same in every Python process and version.
        generator = random.Random(f"{self._seed}:{step}")
        drawn = generator.sample(others, min(stage.num_sampled, len(others)))
        chosen = always.union(drawn)
        return [item for item in self._ordered if item.index in chosen]


def _teacher_subnet(stage: Stage, subnet: SubnetConfig) -> SubnetConfig | None:
    if stage.teacher is None:
        return None
    if stage.teacher == "full":
        return FULL
    if isinstance(subnet.num_heads, tuple) or isinstance(subnet.intermediate_size, tuple):
        raise ValueError(
            f"SubnetPlan: subnet {subnet.name} has a width for each layer, expected one width with "
            "teacher='same-width'. Use teacher='full'."
        )
    return replace(subnet, depth_mult=1.0, layers=None)


def _size(shape: SubnetShape) -> int:
    # A head and a neuron are compared by their weights up to a common factor: 4 x 64 against 2
    # columns.
    return sum(128 * layer.num_heads + layer.intermediate_size for layer in shape.layers)
