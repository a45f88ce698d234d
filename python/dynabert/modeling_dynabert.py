"""The DynaBERT encoder: BERT or RoBERTa, its width and depth chosen per call (DynaBERT, section 3).

Reads top to bottom like the figure of the paper: embeddings, a layer of two elastic sublayers
(`dynabert.modeling_sublayers`), the stack that skips layers, the model.

Letters: B sequences, S padded length, T real tokens of the batch, C hidden_size, H heads, D
head_dim, I FFN neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import attrgetter, itemgetter
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dynabert.configuration_dynabert import DynaBertConfig
from dynabert.modeling_embeddings import DynaBertEmbeddings
from dynabert.modeling_inputs import (
    BatchLayout,
    check_ids,
    check_kwargs,
    checked_tokens,
    first_token,
    is_exporting,
    repeated_rows,
)
from dynabert.modeling_pretrained import DynaBertPreTrainedModel
from dynabert.modeling_steps import (
    DeviceSubnet,
    LayerStep,
    device_steps,
    device_widths,
    distinct_shapes,
    layer_steps,
    own_states,
    sent_steps,
    widest_first,
    width_of,
)
from dynabert.modeling_sublayers import DynaBertAttention, DynaBertFFN, takes_spare_rows
from dynabert.modeling_watch import ModuleWatch
from dynabert.subnet import ForEach, LayerShape, SubnetConfig, SubnetShape
from dynabert_kernels.ops.encoder import EncoderLayer, EncoderLayers, encoder
from dynabert_kernels.triton.shared_tiles import shared_tiles
from dynabert_kernels.varlen import Packing

Subnet = SubnetConfig | SubnetShape | None
Subnets = Subnet | Sequence[Subnet] | ForEach | DeviceSubnet
States = bool | Literal["packed"] | None
_SUBLAYERS = ("attention", "ffn")
# Subnets of which a model keeps what they mean; a call with another one resolves it again.
_MOST_KEPT = 64
_HASHABLE = (SubnetConfig, SubnetShape, type(None))
# What the meaning of a subnet depends on.
_network_size = itemgetter(
    "num_hidden_layers", "num_attention_heads", "intermediate_size", "depth_rule"
)
# `DynaBertSublayer._settings`, without a line of Python for each sublayer.
_settings_of = attrgetter("norm_eps", "quantization")
_ffn_settings_of = attrgetter("norm_eps", "activation", "quantization")


class DynaBertLayer(GradientCheckpointingLayer):
    """One encoder layer: attention, then feed-forward, each on its own prefix."""

    def __init__(self, config: DynaBertConfig, shape: LayerShape) -> None:
        super().__init__()
        self.attention = DynaBertAttention(config, shape.num_heads)
        self.ffn = DynaBertFFN(config, shape.intermediate_size)

    def forward(
        self, hidden: Tensor, step: LayerStep, packing: Packing, attn_mask: Tensor | None = None
    ) -> Tensor:
        """``[T, C]`` to ``[T, C]`` at the widths of `step`."""
        hidden = self.attention(hidden, step.num_heads, packing, attn_mask)
        hidden = self.ffn(hidden, step.intermediate_size, packing)
        return hidden


class _NativeLayers(NamedTuple):
    """The layers of `steps` as one native call takes them, and the settings that hold for that."""

    steps: tuple[LayerStep, ...]
    attentions: list[DynaBertAttention]
    ffns: list[DynaBertFFN]
    settings: list[Any]
    layers: EncoderLayers | None

    def current_settings(self) -> list[Any]:
        """The settings of the sublayers as they are now."""
        return [*map(_settings_of, self.attentions), *map(_ffn_settings_of, self.ffns)]


class DynaBertEncoder(nn.Module):
    """The stack of layers, of which a call runs some."""

    _watches: dict[int, ModuleWatch[_NativeLayers]] | None = None

    def __init__(self, config: DynaBertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList([DynaBertLayer(config, shape) for shape in config.layer_shapes])

    def forward(
        self,
        hidden: Tensor,
        steps: tuple[LayerStep, ...],
        packing: Packing,
        attn_mask: Tensor | None = None,
        last_only: bool = False,
    ) -> list[Tensor]:
        """Run `steps` and return the state before the first and after each, ``[T, C]``.

        Sequences that skip a layer are untouched by it: their rows never enter its kernels. With
        `last_only`, states between the first and the last may be missing.
        """
        if last_only and attn_mask is None and not torch.is_grad_enabled():
            whole = self._run_at_once(hidden, steps, packing)
            if whole is not None:
                return [hidden, whole]
        states = [hidden]
        parts: dict[tuple[int, ...], tuple[Packing, Tensor | slice]] = {}
        with _one_call():
            for step in steps:
                layer = self.layer[step.layer]
                if step.rows is None:
                    hidden = layer(hidden, step, packing, attn_mask)
                else:
                    if step.rows not in parts:
                        parts[step.rows] = packing.select(step.rows)
                    part, tokens = parts[step.rows]
                    part_mask = attn_mask[list(step.rows)] if attn_mask is not None else None
                    hidden = _replaced(hidden, tokens, layer(hidden[tokens], step, part, part_mask))
                states.append(hidden)
        return states

    def _run_at_once(
        self, hidden: Tensor, steps: tuple[LayerStep, ...], packing: Packing
    ) -> Tensor | None:
        """The state after the last of `steps` from one call for all, or None where none can."""
        if self.training or torch.compiler.is_compiling():
            return None
        if self._watches is None or len(self._watches) > _MOST_KEPT:
            self._watches = {}
        watch = self._watches.get(id(steps))
        if (
            watch is None
            or watch.made.steps is not steps
            or not watch.is_plain()
            or watch.made.current_settings() != watch.made.settings
        ):
            watch = self._watched(steps)
            if watch is None:
                return None
            self._watches[id(steps)] = watch
        layers = watch.made.layers
        if layers is None:
            return None
        offsets, longest = packing.cu_seqlens, packing.max_seqlen
        return encoder(hidden, layers, cu_seqlens=offsets, max_seqlen=longest)

    def _watched(self, steps: tuple[LayerStep, ...]) -> ModuleWatch[_NativeLayers] | None:
        """None where a layer does more than its two ops, or not all of the batch at one width."""
        widths = device_widths(steps)
        if any(
            rows is not None
            or (widths is None and (isinstance(heads, Tensor) or isinstance(neurons, Tensor)))
            for _, heads, neurons, rows in steps
        ):
            return None
        stack = [cast(DynaBertLayer, self.layer[step.layer]) for step in steps]
        for layer in stack:
            parts = [layer, *map(layer._modules.get, _SUBLAYERS)]
            if list(map(type, parts)) != [DynaBertLayer, DynaBertAttention, DynaBertFFN]:
                return None
        packed = [(layer.attention.packed(), layer.ffn.packed()) for layer in stack]
        runs = [
            EncoderLayer(attention, ffn, attention.num_heads, ffn.intermediate_size)
            if widths is not None
            else EncoderLayer(
                attention, ffn, cast(int, step.num_heads), cast(int, step.intermediate_size)
            )
            for (attention, ffn), step in zip(packed, steps, strict=True)
        ]
        attentions, ffns = [layer.attention for layer in stack], [layer.ffn for layer in stack]
        made = _NativeLayers(steps, attentions, ffns, [], EncoderLayers.of(runs, widths))
        watch = ModuleWatch(
            [self, *[self.layer] * len(steps), *stack],
            [["layer"], *([str(step.layer)] for step in steps), *[_SUBLAYERS] * len(steps)],
            made._replace(settings=made.current_settings()),
        )
        return watch if watch.is_plain() else None

    def for_each(
        self,
        hidden: Tensor,
        shapes: Sequence[SubnetShape],
        packing: Packing,
        attn_mask: Tensor | None = None,
    ) -> list[list[Tensor]]:
        """Run the batch at each of `shapes`; the states of each, as `forward` returns them.

        A layer runs once, on the tokens of all subnets that keep it, the widest first: each part
        of its weights then serves one run of tokens, and gets its gradient in one piece.
        """
        states = [[hidden] for _ in shapes]
        runs: dict[int, list[tuple[int, int, int]]] = {}
        for number, shape in enumerate(shapes):
            for layer in shape.layers:
                run = (layer.num_heads, layer.intermediate_size, number)
                runs.setdefault(layer.index, []).append(run)
        repeated = {count: packing.repeat(count) for count in {len(run) for run in runs.values()}}
        steps, numbers_of = [], []
        for index in sorted(runs):
            heads, neurons, numbers = zip(*sorted(runs[index], reverse=True), strict=True)
            batch_size = packing.batch_size
            widths = width_of(heads, batch_size), width_of(neurons, batch_size)
            steps.append(LayerStep(index, *widths, None))
            numbers_of.append(numbers)
        with _one_call():
            for step, numbers in zip(sent_steps(steps, hidden.device), numbers_of, strict=True):
                mask = attn_mask.repeat(len(numbers), 1, 1, 1) if attn_mask is not None else None
                inputs = torch.cat([states[number][-1] for number in numbers])
                outputs = self.layer[step.layer](inputs, step, repeated[len(numbers)], mask)
                by_subnet = outputs.unflatten(0, (len(numbers), packing.total_tokens))
                for number, output in zip(numbers, by_subnet.unbind(), strict=True):
                    states[number].append(output)
        return states


def _one_call() -> AbstractContextManager[None]:
    """Where the layers of one call run, which share what is made from its widths."""
    return nullcontext() if torch.compiler.is_compiling() else shared_tiles()


class DynaBertPooler(nn.Module):
    """Dense layer and tanh on the first real token of each sequence; never elastic."""

    def __init__(self, config: DynaBertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, first: Tensor) -> Tensor:
        """``[B, C]`` to ``[B, C]``."""
        return torch.tanh(self.dense(first))


class DynaBertModel(DynaBertPreTrainedModel):
    """The encoder, with padding removed before the embeddings and restored after the last layer."""

    weights_prefix = ""
    _kept_steps: dict[tuple[Any, ...], tuple[LayerStep, ...]] | None = None

    def __init__(self, config: DynaBertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = DynaBertEmbeddings(config)
        self.encoder = DynaBertEncoder(config)
        self.pooler = DynaBertPooler(config) if add_pooling_layer else None
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        """The word embeddings."""
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embeddings."""
        self.embeddings.word_embeddings = cast(nn.Embedding, value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        subnet: Subnets = None,
        output_hidden_states: States = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Encode a padded batch with one subnet, or with one per sequence.

        Args:
            input_ids: Token ids, ``[B, S]`` integer.
            attention_mask: Non-zero where a token is real, ``[B, S]``; padding may be left, right
                or in holes. ``[B, S, S]`` and ``[B, 1 or H, S, S]`` (boolean, or additive) select
                pairs of tokens; they run on the reference backend without unpadding.
            token_type_ids: Segments, ``[B, S]`` integer; default 0.
            position_ids: ``[B, S]`` or ``[1, S]`` integer; default as the architecture counts them.
            inputs_embeds: Embeddings in the place of `input_ids`, ``[B, S, C]``.
            subnet: What to run; None is the full network. A sequence holds one per row of the
                batch. `ForEach` runs the batch at each of several: n times the rows come out.
            output_hidden_states: Also return the embeddings and the state after each layer that
                ran. ``"packed"`` leaves them as the encoder has them, without padding.
            return_dict: False returns a tuple.
            **kwargs: Arguments Hugging Face's callers pass along; one that this model cannot honour
                is refused.

        Returns:
            ``last_hidden_state`` ``[B, S, C]``, ``pooler_output`` ``[B, C]`` if the model has a
            pooler, and ``hidden_states``: ``[B, S, C]`` each. Padded positions are zero. The pooler
            reads the first real token of each sequence: position 0, or the first one after left
            padding. With subnets of different depths, entry k of ``hidden_states`` is each
            sequence's own k-th state, zero where it has fewer. With `ForEach`, ``hidden_states``
            holds such a tuple for each subnet. Packed states are ``[T, C]``.

        Raises:
            TypeError: An argument has the wrong type, or is not known.
            ValueError: A shape, a length or a subnet does not fit; or packed states of sequences of
                different depths are asked for.
        """
        check_kwargs(self.config, kwargs)
        tokens = checked_tokens(input_ids, inputs_embeds, self.config)
        batch_size, seq_len = tokens.shape[:2]
        check_ids("token_type_ids", token_type_ids, batch_size, seq_len)
        check_ids("position_ids", position_ids, batch_size, seq_len)
        steps = self._steps(subnet, batch_size)
        has_spare_rows = isinstance(subnet, DeviceSubnet)
        if attention_mask is not None and self._compiles_ragged(attention_mask, steps):
            has_spare_rows, steps = True, device_steps(steps, tokens.device)
        layout = BatchLayout.of(
            attention_mask,
            batch_size,
            seq_len,
            tokens.device,
            has_spare_rows=has_spare_rows,
            order=subnet.order if isinstance(subnet, DeviceSubnet) else None,
        )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        to_run = steps
        if isinstance(subnet, Sequence) and not tokens.is_cpu and not torch.compiler.is_compiling():
            # Short sequences of one width share the tiles of a kernel if they are neighbours. Where
            # the tokens lie is what decides the order, so it costs no copy of the batch.
            order = None
            if output_hidden_states != "packed" and layout.pair_mask is None:
                shapes, of_row = distinct_shapes(subnet, self.subnet_shape)
                order = widest_first(shapes, of_row)
            if order is not None:
                to_run = layer_steps([shapes[of_row[row]] for row in order])
                layout = layout._replace(packing=layout.packing.reordered(order))
            to_run = sent_steps(to_run, tokens.device)

        hidden = self.embeddings(tokens, position_ids, token_type_ids, layout.packing)
        if has_spare_rows and torch.is_grad_enabled():
            # Gradients of spare rows are undefined, and must not reach the embeddings.
            hidden = layout.packing.without_spare_gradients(hidden)
        hidden_states: Any = None
        if isinstance(subnet, ForEach):
            shapes = [self.subnet_shape(entry) for entry in subnet.subnets]
            each = self.encoder.for_each(hidden, shapes, layout.packing, layout.pair_mask)
            last = layout.repeat(len(each)).restore(torch.cat([states[-1] for states in each]))
            if output_hidden_states == "packed":
                hidden_states = tuple(map(tuple, each))
            elif output_hidden_states:
                hidden_states = tuple(tuple(map(layout.restore, states)) for states in each)
        else:
            states = self.encoder(
                hidden, to_run, layout.packing, layout.pair_mask, not output_hidden_states
            )
            last = layout.restore(states[-1])
            if output_hidden_states == "packed":
                hidden_states = _packed_states(states, steps)
            elif output_hidden_states:
                padded = [*map(layout.restore, states[:-1]), last]
                hidden_states = tuple(own_states(padded, steps, batch_size))
        mask = repeated_rows(attention_mask, subnet)
        pooled = self.pooler(first_token(last, mask)) if self.pooler is not None else None
        if not self.wants_dict(return_dict):
            return tuple(part for part in (last, pooled, hidden_states) if part is not None)
        return BaseModelOutputWithPooling(
            last_hidden_state=last, pooler_output=pooled, hidden_states=hidden_states
        )

    def _compiles_ragged(self, mask: Tensor, steps: tuple[LayerStep, ...]) -> bool:
        """Whether the call is being compiled for kernels that never meet its padding."""
        if not torch.compiler.is_compiling() or is_exporting():
            return False
        if mask.dim() != 2 or not steps or any(step.rows is not None for step in steps):
            return False
        layer = cast(DynaBertLayer, self.encoder.layer[steps[0].layer])
        return takes_spare_rows(layer.attention, layer.ffn, self.embeddings.norm.weight)

    def _steps(self, subnet: Subnets, batch_size: int) -> tuple[LayerStep, ...]:
        """What to run with one subnet for the whole batch or one per sequence."""
        if subnet is None:
            subnet = self.default_subnet
        if isinstance(subnet, ForEach):
            return ()
        if isinstance(subnet, DeviceSubnet):
            return subnet.steps
        if isinstance(subnet, Sequence) and not isinstance(subnet, str):
            if len(subnet) != batch_size:
                raise ValueError(
                    f"{type(self).__name__}: subnet has {len(subnet)} entries, expected one per "
                    f"sequence ({batch_size})."
                )
            return layer_steps([self.subnet_shape(entry) for entry in subnet or [None]])
        if torch.compiler.is_compiling() or not isinstance(subnet, _HASHABLE):
            return layer_steps([self.subnet_shape(subnet)])
        if self._kept_steps is None or len(self._kept_steps) > _MOST_KEPT:
            self._kept_steps = {}
        key = subnet, _network_size(vars(self.config))
        steps = self._kept_steps.get(key)
        if steps is None:
            steps = self._kept_steps[key] = layer_steps([self.subnet_shape(subnet)])
        return steps


def _replaced(hidden: Tensor, tokens: Tensor | slice, rows: Tensor) -> Tensor:
    """`hidden` with some of its rows replaced, as a new tensor."""
    if isinstance(tokens, slice):
        return torch.slice_scatter(hidden, rows, 0, tokens.start, tokens.stop)
    return hidden.index_copy(0, tokens, rows)


def _packed_states(states: Sequence[Tensor], steps: Sequence[LayerStep]) -> tuple[Tensor, ...]:
    if any(step.rows is not None for step in steps):
        raise ValueError(
            f"{DynaBertModel.__name__}: output_hidden_states='packed' with sequences of different "
            "depths, expected one depth. Use True, or ForEach for a batch at several subnets."
        )
    return tuple(states)
