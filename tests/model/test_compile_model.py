"""Graphs of the whole model: compiled without a break, and exported, with padding in the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynabert import SubnetConfig, subnet_grid
from dynabert_kernels import use_backend
from dynabert_kernels.triton import availability

TOLERANCE = {"atol": 1e-5, "rtol": 0.0}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("architecture", "subnet"),
    [("bert", None), ("roberta", SubnetConfig(0.5, 0.5))],
    ids=["bert-full", "roberta-half"],
)
def test_fullgraph_compile_equals_eager(
    make_hf: Any, ours: Any, make_batch: Any, architecture: str, subnet: Any
) -> None:
    model = ours(make_hf(architecture, num_hidden_layers=2))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for lengths in ((7, 1, 5), (3, 9, 2)):
        batch = make_batch(model.config, lengths=lengths)
        labels = torch.tensor([0, 2, 1])
        expected = model(**batch, subnet=subnet, labels=labels, output_hidden_states=True)
        got = compiled(**batch, subnet=subnet, labels=labels, output_hidden_states=True)
        torch.testing.assert_close(got.logits, expected.logits, **TOLERANCE)
        for state, expected_state in zip(got.hidden_states, expected.hidden_states, strict=True):
            torch.testing.assert_close(state, expected_state, **TOLERANCE)
        got.loss.backward()
        compiled_grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        expected.loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(
                    compiled_grads[name], parameter.grad, atol=1e-5, rtol=1e-4
                )
        model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("subnet", [None, SubnetConfig(0.5)], ids=["full", "half"])
def test_fullgraph_compile_for_kernels_stays_unpadded(
    make_hf: Any, ours: Any, make_batch: Any, subnet: Any, training: bool
) -> None:
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 64}
    model = ours(make_hf("bert", **sizes)).requires_grad_(training)
    device = "cpu" if availability.INTERPRETED else "cuda"
    model.to(device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    lengths = (5, 0, 3)
    batch = {
        name: ids.to(device) for name, ids in make_batch(model.config, lengths=lengths).items()
    }
    gradients = []
    with use_backend("triton"), torch.set_grad_enabled(training):
        expected = model(**batch, subnet=subnet, output_hidden_states=True)
        for call in (model, compiled):
            got = call(**batch, subnet=subnet, output_hidden_states=True)
            torch.testing.assert_close(got.logits, expected.logits, **TOLERANCE)
            for state, other in zip(got.hidden_states, expected.hidden_states, strict=True):
                torch.testing.assert_close(state, other, **TOLERANCE)
            if training:
                got.logits.square().sum().backward()
                gradients.append({name: p.grad for name, p in model.named_parameters()})
                model.zero_grad(set_to_none=True)
    if training:
        eager, found = gradients
        for name, gradient in eager.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-4, rtol=1e-4, msg=name)


def test_compiled_sequence_without_tokens_is_defined(
    make_hf: Any, ours: Any, make_batch: Any
) -> None:
    model = ours(make_hf("bert", "Model", num_hidden_layers=2), "Model")
    batch = make_batch(model.config, lengths=(5, 0, 3))
    expected = model(**batch)
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(**batch)
    torch.testing.assert_close(got.last_hidden_state, expected.last_hidden_state, **TOLERANCE)
    got.pooler_output.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_widths_of_one_depth_compile_a_bounded_number_of_graphs(
    make_hf: Any, ours: Any, make_batch: Any
) -> None:
    model = ours(make_hf("bert", num_hidden_layers=2))
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=count)
    batch = make_batch(model.config)
    widths = [heads / 12 for heads in range(1, 13)]
    for subnet in subnet_grid(widths, (1.0,)):
        with torch.no_grad():
            expected = model(**batch, subnet=subnet).logits
            torch.testing.assert_close(compiled(**batch, subnet=subnet).logits, expected)
    assert len(graphs) <= 3  # the first width, any width, and one head, on which torch specialises
    num_graphs = len(graphs)
    for subnet in subnet_grid(widths, (1.0,)):
        with torch.no_grad():
            compiled(**batch, subnet=subnet)
    assert len(graphs) == num_graphs  # nothing recompiles once every width was seen


class Half(nn.Module):
    """Export takes tensors only, so the subnet is fixed from outside."""

    def __init__(self, model: nn.Module, subnet: SubnetConfig | None) -> None:
        super().__init__()
        self.model, self.subnet = model, subnet

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, subnet=self.subnet)
        logits: Tensor = output.logits
        return logits


@pytest.mark.parametrize("subnet", [None, SubnetConfig(0.5, 0.5)], ids=["full", "half"])
def test_export_with_dynamic_batch_and_length_equals_eager(
    make_hf: Any, ours: Any, make_batch: Any, architecture: str, subnet: Any
) -> None:
    model = Half(ours(make_hf(architecture, num_hidden_layers=2)), subnet).eval()
    config = model.model.config
    batch = make_batch(config)
    names = ("input_ids", "attention_mask")
    batch_dim, seq_dim = (
        torch.export.Dim("batch", min=2, max=64),
        torch.export.Dim("seq", max=config.max_seq_len),
    )
    program = torch.export.export(
        model,
        tuple(batch[name] for name in names),
        dynamic_shapes={name: {0: batch_dim, 1: seq_dim} for name in names},
        strict=False,
    )
    exported = program.module()
    for lengths in ((7, 1, 5), (3, 9), (12, 0, 4, 1)):
        other = make_batch(config, lengths=lengths)
        inputs = tuple(other[name] for name in names)
        with torch.no_grad():
            torch.testing.assert_close(exported(*inputs), model(*inputs), **TOLERANCE)
