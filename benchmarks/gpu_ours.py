"""Our own model among the peers: captured graphs, plain calls, and one graph per width.

`OursGraph` is what a server would use, `DynaBertModel.capture`: one graph per depth for all widths,
with or without padding. `OursEager` calls the model from the host. `OursGraphPerWidth` holds the
width fixed in the graph and so says what it costs to leave it open.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import BertModel

from benchmarks.geometry import Geometry, Subnet
from benchmarks.gpu_encoder_peers import Batch, Forward, Peer
from benchmarks.gpu_timing import Variant, eager
from dynabert import DynaBertConfig, DynaBertModel, SubnetConfig
from dynabert.hf_checkpoint import from_hf_state_dict
from dynabert_kernels import use_backend

BACKEND = "triton"


def our_config(geometry: Geometry, **changes: Any) -> DynaBertConfig:
    """The configuration of a geometry."""
    return DynaBertConfig(
        vocab_size=geometry.vocab_size,
        hidden_size=geometry.hidden_size,
        num_hidden_layers=geometry.num_layers,
        num_attention_heads=geometry.num_heads,
        intermediate_size=geometry.intermediate_size,
        **changes,
    )


def our_model(bert: BertModel, geometry: Geometry, dtype: torch.dtype) -> DynaBertModel:
    """The product's model with a Hugging Face model's weights, on its device, in eval mode."""
    config = our_config(geometry)
    model = DynaBertModel(config, add_pooling_layer=False)
    state = {name: tensor.cpu() for name, tensor in bert.state_dict().items()}
    model.load_state_dict(from_hf_state_dict(state, config, prefix=""))
    return model.to(bert.device, dtype).eval().requires_grad_(False)


def backend_of(device: torch.device | str, backend: str = BACKEND) -> str | None:
    """What is forced: the kernels on a GPU, the automatic choice where a test runs without one."""
    return backend if torch.device(device).type == "cuda" else None


def configured(subnet: Subnet) -> SubnetConfig:
    """A subnet as the model takes it."""
    return SubnetConfig(subnet.width, subnet.depth)


def _attention_mask(batch: Batch) -> torch.Tensor | None:
    return None if batch.lengths is None else batch.real.long()


@dataclass
class OursEager(Peer):
    """The model called from the host; padding is removed in the call."""

    model: DynaBertModel
    name: str = "ours eager"
    captured: bool = False
    backend: str = BACKEND

    def prepare(self, subnet: Subnet, batch: Batch) -> Forward:
        """A call at a subnet."""
        mask, chosen = _attention_mask(batch), configured(subnet)
        backend = backend_of(batch.ids.device, self.backend)

        def forward(ids: torch.Tensor) -> torch.Tensor:
            with use_backend(backend):
                output = self.model(ids, attention_mask=mask, subnet=chosen)
            return output.last_hidden_state

        return forward


@dataclass
class OursGraphPerWidth(OursEager):
    """The same call in a graph of its own for each width: full batches only."""

    name: str = "ours graph per width"
    captured: bool = True


@dataclass
class OursGraph(Peer):
    """`DynaBertModel.capture`: the calls of all widths of a depth replay one graph.

    A call copies ids and mask into the graph's input and sets the widths; that is timed, too.
    """

    model: DynaBertModel
    name: str = "ours graph"
    backend: str = BACKEND
    runners: dict[tuple[int, int], Any] = field(default_factory=dict)

    def variant(self, subnet: Subnet, batch: Batch, static: torch.Tensor, device: str) -> Variant:
        """One call of the runner at a subnet."""
        return self._variant(configured(subnet), batch, static, device)

    def mixed(self, subnets: list[Subnet], batch: Batch, device: str) -> Variant:
        """One call with a subnet for each sequence."""
        return self._variant(list(map(configured, subnets)), batch, batch.ids, device)

    def _variant(self, chosen: Any, batch: Batch, static: torch.Tensor, device: str) -> Variant:
        mask = _attention_mask(batch)
        call: Callable[[], torch.Tensor]
        if device != "cuda":
            model = self.model
            return eager([lambda: model(static, mask, subnet=chosen).last_hidden_state])
        runner = self._runner(batch)
        call = lambda: runner(static, mask, subnet=chosen).last_hidden_state  # noqa: E731
        return Variant(call, 1, call(), runner, notes="graph of all widths")

    def _runner(self, batch: Batch) -> Any:
        shape = tuple(batch.ids.shape)
        if shape not in self.runners:
            with use_backend(backend_of(batch.ids.device, self.backend)):
                self.runners[shape] = self.model.capture(*shape)
        return self.runners[shape]
