"""What a search chooses from: for every layer whether it is kept, its heads and its neurons.

A point of the space is a dict of small whole numbers (`Genes`), three for each layer of the full
network, which is what a sampler draws and crosses. The same subnet has many of them, since what is
drawn for a layer that is left out does not matter.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dynabert.latency_predictor import PANEL, knots, refuse_uneven
from dynabert.modeling_pretrained import DynaBertPreTrainedModel
from dynabert.subnet import SubnetConfig, SubnetShape

Genes = dict[str, int]
# How far a layer's width is from that of its subnet at first, as a share of the full width.
_SPREAD = 0.15


@dataclass(frozen=True)
class SearchSpace:
    """Subnets with heads and neurons of their own in every layer.

    Attributes:
        num_layers: Layers of the full network.
        num_heads: Heads of each of them; every count from 1 is in the space.
        neurons: The numbers of neurons a layer can have, increasing.
    """

    num_layers: int
    num_heads: int
    neurons: tuple[int, ...]

    @classmethod
    def of(
        cls, model: DynaBertPreTrainedModel, uniform: Sequence[SubnetConfig] = ()
    ) -> SearchSpace:
        """The space of a model: neurons in 16 steps, and as many as the `uniform` subnets have.

        Raises:
            ValueError: A subnet does not fit the model, or the model's own layers differ in size.
        """
        config = model.config
        refuse_uneven("SearchSpace", config)
        shapes = [model.subnet_shape(subnet) for subnet in uniform]
        trained = {layer.intermediate_size for shape in shapes for layer in shape.layers}
        neurons = sorted({*knots(config.intermediate_size, PANEL), *trained})
        return cls(config.num_hidden_layers, config.num_attention_heads, tuple(neurons))

    @property
    def bounds(self) -> dict[str, tuple[int, int]]:
        """The lowest and the highest number of every gene, by name."""
        highest = len(self.neurons) - 1
        return {
            name: bound
            for layer in range(self.num_layers)
            for name, bound in (
                (f"keep{layer}", (0, 1)),
                (f"heads{layer}", (1, self.num_heads)),
                (f"neurons{layer}", (0, highest)),
            )
        }

    def subnet(self, genes: Mapping[str, int]) -> SubnetConfig:
        """The subnet that genes stand for; where no layer is kept the last one alone."""
        layers = [layer for layer in range(self.num_layers) if genes[f"keep{layer}"]]
        layers = layers or [self.num_layers - 1]
        return SubnetConfig(
            num_heads=tuple(genes[f"heads{layer}"] for layer in layers),
            intermediate_size=tuple(self.neurons[genes[f"neurons{layer}"]] for layer in layers),
            layers=tuple(layers),
        )

    def genes(self, shape: SubnetShape) -> Genes:
        """Genes of a subnet; a layer left out has those of the first layer that is kept.

        Raises:
            ValueError: It has a number of neurons that is not in the space.
        """
        kept = {layer.index: layer for layer in shape.layers}
        genes = {}
        for index in range(self.num_layers):
            layer = kept.get(index, shape.layers[0])
            if layer.intermediate_size not in self.neurons:
                raise ValueError(
                    f"SearchSpace: intermediate_size={layer.intermediate_size}, expected one of "
                    f"{', '.join(map(str, self.neurons))}. Make the space with this subnet."
                )
            genes[f"keep{index}"] = int(index in kept)
            genes[f"heads{index}"] = layer.num_heads
            genes[f"neurons{index}"] = self.neurons.index(layer.intermediate_size)
        return genes

    def draw(self, count: int, seed: int) -> list[Genes]:
        """Genes to begin with: of all sizes alike, layers of a subnet about equally wide.

        Genes drawn evenly would nearly all be half as deep and half as wide as the full network.
        """
        source = random.Random(seed)
        highest = len(self.neurons) - 1

        def near(width: float, most: int, least: int) -> int:
            share = width + source.uniform(-_SPREAD, _SPREAD)
            return min(max(round(share * most), least), most)

        drawn = []
        for _ in range(count):
            width = source.random()
            depth = source.randint(1, self.num_layers)
            kept = source.sample(range(self.num_layers), depth)
            drawn.append(
                {
                    name: value
                    for layer in range(self.num_layers)
                    for name, value in (
                        (f"keep{layer}", int(layer in kept)),
                        (f"heads{layer}", near(width, self.num_heads, 1)),
                        (f"neurons{layer}", near(width, highest, 0)),
                    )
                }
            )
        return drawn
