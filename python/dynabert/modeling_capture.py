"""CUDA graphs of a model: one for each depth, whose width is read on the device at every replay.

A graph replays kernels with the addresses they were recorded with. So ids, mask and widths lie in
tensors that stay where they are, with room for one size of batch (`StaticBatch`), and where the
real tokens are is found on the device. `CapturedModel` is what `DynaBertPreTrainedModel.capture`
returns.

Letters: B sequences, S padded length, L layers kept.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    TokenClassifierOutput,
)
from transformers.utils.generic import ModelOutput

from dynabert.modeling_inputs import check_ids, checked_tokens
from dynabert.modeling_steps import (
    ALIGNMENT,
    DeviceSubnet,
    LayerStep,
    distinct_shapes,
    widest_first,
)
from dynabert.modeling_watch import ModuleWatch
from dynabert.subnet import SubnetConfig, SubnetShape
from dynabert_kernels.ops import OPS, forced_backend, use_backend

if TYPE_CHECKING:
    from dynabert.modeling_pretrained import DynaBertPreTrainedModel

Subnet = SubnetConfig | SubnetShape | None
_WHO = "CapturedModel"
# Subnets of which a runner keeps what they mean.
_MOST_KEPT = 256
# Fields of an output with one row per token; the others have one per sequence.
_TOKEN_FIELDS: dict[type, tuple[str, ...]] = {
    BaseModelOutputWithPooling: ("last_hidden_state",),
    TokenClassifierOutput: ("logits",),
    MaskedLMOutput: ("logits",),
    QuestionAnsweringModelOutput: ("start_logits", "end_logits"),
}


class GraphKey(NamedTuple):
    """What a graph is made for; everything else may differ from replay to replay.

    Attributes:
        layers: Indices of the layers it runs.
        per_row: Widths are read for each layer and sequence; else two numbers hold for all.
        dense: There is no padding.
    """

    layers: tuple[int, ...]
    per_row: bool
    dense: bool


class StaticBatch:
    """The inputs of a graph in tensors that stay where they are, and the call that reads them.

    Args:
        model: The model to run, on any device: on the CPU it is how graphs are tested.
        batch_size: Most sequences.
        seq_len: Most positions of a sequence.
        output_hidden_states: Whether outputs hold the state after each layer.
    """

    def __init__(
        self,
        model: DynaBertPreTrainedModel,
        batch_size: int,
        seq_len: int,
        *,
        output_hidden_states: bool = False,
    ) -> None:
        self.model = model
        self.batch_size, self.seq_len = batch_size, seq_len
        self.output_hidden_states = output_hidden_states
        self.device = model.device
        shape, device = (batch_size, seq_len), self.device
        # Stale ids and types where a smaller batch leaves them are valid ones, and masked out.
        self.input_ids = torch.zeros(shape, dtype=torch.int64, device=device)
        self.token_type_ids = torch.zeros_like(self.input_ids)
        self.mask = torch.ones(shape, dtype=torch.bool, device=device)
        self.order = torch.arange(batch_size, device=device)
        row = batch_size + -batch_size % ALIGNMENT
        num_layers = model.config.num_hidden_layers
        self._one_width = torch.ones(2, ALIGNMENT, dtype=torch.int32, device=device)
        self._row_widths = torch.ones(num_layers, 2, row, dtype=torch.int32, device=device)
        self._types_are_zero = True
        self._one_width_loaded = (1, 1)
        self._one_width_keys: dict[SubnetConfig, tuple[GraphKey, tuple[int, int]]] = {}
        self._subnets: dict[GraphKey, DeviceSubnet] = {}

    def load(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        subnet: Subnet | Sequence[Subnet] = None,
    ) -> GraphKey:
        """Copy the inputs of a call in, without waiting for the device.

        Returns:
            The key of the graph that takes them.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: A shape or a subnet does not fit.
        """
        rows, columns = self._check(input_ids, attention_mask, token_type_ids)
        key = self._load_subnet(subnet, rows)
        is_whole = (rows, columns) == (self.batch_size, self.seq_len)

        def part(buffer: Tensor) -> Tensor:
            return buffer if is_whole else buffer[:rows, :columns]

        part(self.input_ids).copy_(input_ids, non_blocking=True)
        if token_type_ids is not None:
            part(self.token_type_ids).copy_(token_type_ids, non_blocking=True)
            self._types_are_zero = False
        elif not self._types_are_zero:
            self.token_type_ids.zero_()
            self._types_are_zero = True
        if attention_mask is None and is_whole and not key.per_row:
            return key._replace(dense=True)
        if not is_whole:
            self.mask.zero_()
        if attention_mask is None:
            part(self.mask).fill_(True)
        else:
            part(self.mask).copy_(attention_mask, non_blocking=True)
        return key

    def run(self, key: GraphKey) -> ModelOutput:
        """What a graph records: the model on these tensors, nothing read back from the device."""
        if key not in self._subnets:
            self._subnets[key] = self._subnet(key)
        output = self.model(
            input_ids=self.input_ids,
            attention_mask=None if key.dense else self.mask,
            token_type_ids=self.token_type_ids,
            subnet=self._subnets[key],
            output_hidden_states=self.output_hidden_states,
            return_dict=True,
        )
        return cast(ModelOutput, output)

    def _subnet(self, key: GraphKey) -> DeviceSubnet:
        """The layers of a graph, at widths read where `load` writes them."""
        if key.per_row:
            each = self._row_widths[:, :, : self.batch_size]
            widths = [each[k].unbind() for k in range(len(key.layers))]
        else:
            widths = [self._one_width[:, :1].unbind()] * len(key.layers)
        steps = tuple(
            LayerStep(layer, heads, neurons, None)
            for layer, (heads, neurons) in zip(key.layers, widths, strict=True)
        )
        return DeviceSubnet(steps, self.order if key.per_row else None)

    def _check(
        self, input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None
    ) -> tuple[int, int]:
        checked_tokens(input_ids, None, self.model.config)
        rows, columns = input_ids.shape
        if not 1 <= rows <= self.batch_size or columns > self.seq_len:
            raise ValueError(
                f"{_WHO}: input_ids.shape={[rows, columns]}, expected 1 to {self.batch_size} "
                f"sequences of at most {self.seq_len} positions. Capture a larger batch."
            )
        check_ids("token_type_ids", token_type_ids, rows, columns)
        if attention_mask is not None and not isinstance(attention_mask, Tensor):
            raise TypeError(
                f"{_WHO}: attention_mask={type(attention_mask).__name__}, expected a Tensor. Pass "
                "the one the tokenizer made."
            )
        if attention_mask is not None and tuple(attention_mask.shape) != (rows, columns):
            raise ValueError(
                f"{_WHO}: attention_mask.shape={list(attention_mask.shape)}, expected "
                f"{[rows, columns]}. Call the model itself for masks over pairs of tokens."
            )
        return rows, columns

    def _shapes(
        self, subnet: Subnet | Sequence[Subnet], rows: int
    ) -> tuple[list[SubnetShape], list[int]]:
        """The different shapes of a batch, and which of them each sequence has."""
        if not isinstance(subnet, Sequence) or isinstance(subnet, str):
            return [self._shape(subnet)], [0] * rows
        if len(subnet) != rows:
            raise ValueError(
                f"{_WHO}: subnet has {len(subnet)} entries, expected one per sequence ({rows})."
            )
        shapes, of_row = distinct_shapes(subnet, self._shape)
        layers = {tuple(layer.index for layer in shape.layers) for shape in shapes}
        if len(layers) > 1:
            raise ValueError(
                f"{_WHO}: subnet keeps {len(layers)} sets of layers, expected one for the batch. "
                "A graph has one depth; group the sequences by depth, or call the model itself."
            )
        return shapes, of_row

    def _shape(self, subnet: Subnet) -> SubnetShape:
        return self.model.subnet_shape(self.model.default_subnet if subnet is None else subnet)

    def _load_subnet(self, subnet: Subnet | Sequence[Subnet], rows: int) -> GraphKey:
        """Copy the widths of a call in; the key of its graph, if that has padding."""
        if isinstance(subnet, SubnetConfig) and subnet in self._one_width_keys:
            key, widths = self._one_width_keys[subnet]
        else:
            shapes, of_row = self._shapes(subnet, rows)
            layers = tuple(layer.index for layer in shapes[0].layers)
            all_widths = {(w.num_heads, w.intermediate_size) for s in shapes for w in s.layers}
            if len(all_widths) > 1:
                self._load_row_widths(shapes, of_row)
                return GraphKey(layers, per_row=True, dense=False)
            key, widths = GraphKey(layers, per_row=False, dense=False), all_widths.pop()
            if isinstance(subnet, SubnetConfig) and len(self._one_width_keys) < _MOST_KEPT:
                self._one_width_keys[subnet] = key, widths
        if widths != self._one_width_loaded:
            values = torch.tensor(widths, dtype=torch.int32)[:, None].expand(2, ALIGNMENT)
            self._one_width.copy_(values, non_blocking=True)
            self._one_width_loaded = widths
        return key

    def _load_row_widths(self, shapes: list[SubnetShape], of_row: list[int]) -> None:
        order = widest_first(shapes, of_row) or [*range(len(of_row))]
        # The sequences of a smaller batch come first; those it lacks have no tokens.
        order += range(len(of_row), self.batch_size)
        of_place = [of_row[row] if row < len(of_row) else of_row[-1] for row in order]
        by_shape = torch.tensor(
            [[(w.num_heads, w.intermediate_size) for w in shape.layers] for shape in shapes],
            dtype=torch.int32,
        )  # [shapes, L, 2]
        values = torch.ones(self._row_widths.shape, dtype=torch.int32)
        values[: by_shape.shape[1], :, : self.batch_size] = by_shape[of_place].permute(1, 2, 0)
        self._row_widths.copy_(values, non_blocking=True)
        self.order.copy_(torch.tensor(order), non_blocking=True)


class CapturedModel:
    """A model for batches of up to one size, each call one replay of a CUDA graph.

    There is a graph for each depth (set of kept layers) that serves every width, with one subnet
    for the batch or one for each sequence; it is captured by the first call that needs it. Graphs
    share one pool of memory and read the live parameters: an optimiser step or `load_state_dict`
    shows at the next call. What moves or replaces parameters (``to``, new modules) or puts a module
    in training is refused.

    The tensors of an output are overwritten by the next call with the same depth; ask for a
    `clone` to keep them. Calls from several threads and streams wait for each other.

    Args:
        model: The model, in evaluation mode on a CUDA device.
        batch_size: Most sequences of a call.
        seq_len: Most positions of a sequence.
        subnets: Capture the graphs of these at once.
        lazy: Whether calls may capture further depths. False leaves no capture, which takes time,
            to chance: calls with another depth are refused.
        clone: Whether calls return copies, which later calls leave alone.
        output_hidden_states: Whether outputs hold the state after each layer.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The model is not on a GPU, in training or quantised; or a size is out of range.
        NotImplementedError: The kernels that would run cannot be captured.
    """

    def __init__(
        self,
        model: DynaBertPreTrainedModel,
        batch_size: int,
        seq_len: int,
        *,
        subnets: Sequence[Subnet] = (),
        lazy: bool = True,
        clone: bool = False,
        output_hidden_states: bool = False,
    ) -> None:
        _check_model(model, batch_size, seq_len)
        self.clone, self._lazy = clone, True
        self._device = model.device
        with torch.inference_mode(False):  # whose tensors could not be written to outside it
            self._batch = StaticBatch(
                model, batch_size, seq_len, output_hidden_states=output_hidden_states
            )
        self._watch, self._tensors = _watched(model), [*model.parameters(), *model.buffers()]
        self._addresses = list(map(Tensor.data_ptr, self._tensors))
        # A later capture runs as the first one would have.
        self._backend = forced_backend()
        self._autocast = (
            torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        )
        self._graphs: dict[GraphKey, tuple[torch.cuda.CUDAGraph, ModelOutput]] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._lock = threading.Lock()
        self._num_replays = 0
        with torch.cuda.device(self._device):
            self._stream = torch.cuda.current_stream()
            for subnet in subnets:
                layers = tuple(layer.index for layer in model.subnet_shape(subnet).layers)
                for per_row, dense in ((False, True), (False, False), (True, False)):
                    self._graph(GraphKey(layers, per_row, dense))
        self._lazy = lazy

    @property
    def num_graphs(self) -> int:
        """Graphs captured so far: up to three for a depth, by what a call needs.

        One without padding, one with, and one whose widths differ between sequences or layers.
        """
        return len(self._graphs)

    @property
    def num_replays(self) -> int:
        """Calls served so far."""
        return self._num_replays

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        subnet: Subnet | Sequence[Subnet] = None,
        *,
        clone: bool | None = None,
    ) -> Any:
        """Run a batch of up to the captured size, at one subnet or one per sequence of one depth.

        Args:
            input_ids: Token ids, ``[B, S]`` integer, on the CPU or the model's device, as all.
            attention_mask: Non-zero where a token is real, ``[B, S]``.
            token_type_ids: Segments, ``[B, S]`` integer; default 0.
            subnet: As for the model's forward.
            clone: Overrides the runner's own.

        Returns:
            The model's output object. Its tensors belong to the graph unless cloned.

        Raises:
            RuntimeError: The model is no longer as it was captured.
            TypeError: An argument has the wrong type.
            ValueError: A shape or a subnet does not fit; or its depth was not captured, and no
                further ones may be.
        """
        with self._lock, torch.cuda.device(self._device), torch.no_grad():
            stream = torch.cuda.current_stream()
            if stream != self._stream:
                stream.wait_stream(self._stream)
                self._stream = stream
            key = self._batch.load(input_ids, attention_mask, token_type_ids, subnet)
            self._check_unchanged()
            graph, output = self._graph(key)
            graph.replay()
            self._num_replays += 1
            clone = self.clone if clone is None else clone
            rows, columns = input_ids.shape
            if not clone and (rows, columns) == (self._batch.batch_size, self._batch.seq_len):
                return output
            return _part(output, rows, columns, clone=clone)

    def _graph(self, key: GraphKey) -> tuple[torch.cuda.CUDAGraph, ModelOutput]:
        made = self._graphs.get(key)
        if made is None:
            if not self._lazy:
                captured = sorted({known.layers for known in self._graphs})
                raise ValueError(
                    f"{_WHO}: subnet keeps layers {key.layers}, expected one of {captured}. List "
                    "it in subnets, or capture with lazy=True."
                )
            made = self._graphs[key] = self._capture(key)
        return made

    def _capture(self, key: GraphKey) -> tuple[torch.cuda.CUDAGraph, ModelOutput]:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        autocast = torch.autocast(
            "cuda", self._autocast, enabled=self._autocast is not None, cache_enabled=False
        )
        backend = use_backend(self._backend)
        with torch.inference_mode(False), torch.no_grad(), autocast, backend:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._batch.run(key)  # compiles and loads the kernels, which no capture may
            torch.cuda.current_stream().wait_stream(stream)
            try:
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
                ):
                    output = self._batch.run(key)
            except RuntimeError as error:
                table = "; ".join(
                    f"{name}: {why_not}" if why_not else name
                    for name, why_not in OPS["attention"].status("cuda")
                )
                raise NotImplementedError(
                    f"{_WHO}: the call cannot be captured, expected kernels that never wait for "
                    f"the host. Backends: {table}. The reference reads widths back; see why it was "
                    "chosen with use_backend('triton')."
                ) from error
        return graph, output

    def _check_unchanged(self) -> None:
        model = self._batch.model
        has_hooks = model._forward_hooks or model._forward_pre_hooks
        if model.training or has_hooks or not self._watch.is_plain():
            raise RuntimeError(
                f"{_WHO}: a module was replaced, hooked or put in training since capture, expected "
                "the model as it was. Put it back with eval(), or capture again."
            )
        if list(map(Tensor.data_ptr, self._tensors)) != self._addresses:
            raise RuntimeError(
                f"{_WHO}: parameters were moved since capture, expected them where they were. "
                "Capture again after to(), half() and the like."
            )


def _check_model(model: DynaBertPreTrainedModel, batch_size: int, seq_len: int) -> None:
    who = f"{type(model).__name__}.capture"
    if model.device.type != "cuda":
        raise ValueError(
            f"{who}: device={model.device}, expected a CUDA device. CUDA graphs exist only there; "
            "move the model with to('cuda'), or call it as it is."
        )
    if any(module.training for module in model.modules() if type(module) is not nn.ModuleList):
        raise ValueError(f"{who}: training=True, expected evaluation mode. Call eval() first.")
    if model.quantization is not None:
        raise ValueError(
            f"{who}: quantization={model.quantization!r}, expected None. No kernel computes in "
            "integers on a GPU; dequantise with model.quantize(None)."
        )
    limits = {"batch_size": (batch_size, None), "seq_len": (seq_len, model.config.max_seq_len)}
    for name, (value, most) in limits.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{who}: {name}={value!r}, expected an int.")
        if value < 1 or (most is not None and value > most):
            allowed = "at least 1" if most is None else f"1 to {most}"
            raise ValueError(f"{who}: {name}={value}, expected {allowed}.")


def _watched(model: nn.Module) -> ModuleWatch[None]:
    parents = list(model.modules())
    names = [[name for name, child in p._modules.items() if child is not None] for p in parents]
    return ModuleWatch(parents, names, None)


def _part(output: ModelOutput, rows: int, columns: int, *, clone: bool) -> Any:
    """The first sequences and positions of an output, as views or copies."""
    token_fields = _TOKEN_FIELDS.get(type(output), ())

    def part(value: Tensor, per_token: bool) -> Tensor:
        value = value[:rows, :columns] if per_token else value[:rows]
        return value.clone() if clone else value

    return type(output)(
        **{
            name: tuple(part(state, True) for state in value)
            if name == "hidden_states"
            else part(value, name in token_fields)
            for name, value in output.items()
        }
    )
