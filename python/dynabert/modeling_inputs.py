"""From what callers pass to what the encoder runs: checks, and where the real tokens are.

Letters: B sequences, S padded length, T real tokens, C hidden_size, H heads.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynabert.configuration_dynabert import DynaBertConfig
from dynabert.subnet import ForEach
from dynabert_kernels.varlen import Packing, sent, unpad, unpad_on_device

_WHO = "DynaBertModel"

# What Hugging Face's Trainer and older code pass to any model, and this one can do without.
_HARMLESS_ARGUMENTS = ("num_items_in_batch", "use_cache", "output_attentions")


class BatchLayout(NamedTuple):
    """How the tokens of a padded batch lie in what the encoder runs.

    Attributes:
        packing: Where the tokens are; of all positions, where padding stays in.
        pair_mask: Which keys each query sees where padding stays in, ``[B, 1 or H, 1 or S, S]``.
        real: Which positions are real where padding stays in and they are known, ``[B, S]``.
    """

    packing: Packing
    pair_mask: Tensor | None = None
    real: Tensor | None = None

    @classmethod
    def of(
        cls,
        mask: Tensor | None,
        batch_size: int,
        seq_len: int,
        device: torch.device,
        *,
        has_spare_rows: bool = False,
        order: Tensor | None = None,
    ) -> BatchLayout:
        """The layout that an ``attention_mask`` asks for, on the `device` of the tokens.

        `has_spare_rows` asks for one whose shapes no number read back from the device decides, with
        the sequences in `order`.

        Raises:
            TypeError: The mask is not a tensor.
            ValueError: It does not fit the tokens.
        """
        if mask is None:
            return cls(Packing.dense(batch_size, seq_len, device))
        if not isinstance(mask, Tensor):
            raise TypeError(
                f"{_WHO}: attention_mask={type(mask).__name__}, expected a Tensor. Pass the one "
                "the tokenizer made."
            )
        if mask.dim() in (3, 4):
            pair_mask = sent(_checked_pair_mask(mask, batch_size, seq_len), device)
            return cls(Packing.dense(batch_size, seq_len, device), pair_mask)
        if tuple(mask.shape) != (batch_size, seq_len):
            raise ValueError(
                f"{_WHO}: attention_mask.shape={list(mask.shape)}, expected "
                f"[{batch_size}, {seq_len}], one value per token, or a mask over pairs of tokens."
            )
        if has_spare_rows:
            packing = unpad_on_device(sent(mask, device), order)
            # Ops called on the CPU take none, and reading the number of tokens costs no wait there.
            trims = device.type == "cpu" and not is_graph()
            return cls(packing.without_spare_rows() if trims else packing)
        if is_graph():
            # The number of real tokens is data, on which a graph made once cannot depend.
            real = sent(mask, device) != 0
            packing = Packing.dense(batch_size, seq_len, device)
            return cls(packing, real[:, None, None, :], real)
        return cls(unpad(mask, device))

    def repeat(self, count: int) -> BatchLayout:
        """The layout of this batch `count` times, for `restore`."""
        real = self.real.repeat(count, 1) if self.real is not None else None
        return BatchLayout(self.packing.repeat(count), None, real)

    def pack(self, padded: Tensor) -> Tensor:
        """``[B, S, ...]`` to ``[T, ...]``."""
        return self.packing.pack(padded)

    def restore(self, packed: Tensor) -> Tensor:
        """``[T, C]`` to ``[B, S, C]`` with zeros at padding."""
        padded = self.packing.restore(packed)
        return padded if self.real is None else padded.masked_fill(~self.real.unsqueeze(-1), 0.0)


def first_token(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The first real token of each sequence, ``[B, S, C]`` to ``[B, C]``.

    Hugging Face takes position 0: the same token, unless padding is on the left. There position 0
    is padding, which holds zeros here.
    """
    if attention_mask is None or attention_mask.dim() != 2:
        return hidden[:, 0]
    first = sent((attention_mask != 0).int().argmax(dim=1), hidden.device)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), first]


def repeated_rows(rows: Tensor | None, subnet: object) -> Tensor | None:
    """What belongs to the rows of a batch, ``[B, ...]``, for the rows of its output.

    ``[n * B, ...]`` if `subnet` is a `ForEach` of n, else as it is.
    """
    if rows is None or not isinstance(subnet, ForEach):
        return rows
    return rows.repeat(len(subnet.subnets), *[1] * (rows.dim() - 1))


def checked_tokens(
    input_ids: Tensor | None, inputs_embeds: Tensor | None, config: DynaBertConfig
) -> Tensor:
    """Whichever of the two a call gives, ``[B, S]`` integer or ``[B, S, C]`` floating-point.

    Raises:
        TypeError: It is not such a tensor.
        ValueError: There are both or none, or the shape is wrong. `check_range` is for the values.
    """
    if (input_ids is None) == (inputs_embeds is None):
        got = "neither" if input_ids is None else "both"
        raise ValueError(
            f"{_WHO}: {got} of input_ids and inputs_embeds, expected one. Pass the token ids."
        )
    if input_ids is not None:
        tokens, name, kind, trailing = input_ids, "input_ids", "an integer", []
    else:
        assert inputs_embeds is not None
        tokens, name, kind = inputs_embeds, "inputs_embeds", "a floating-point"
        trailing = [config.hidden_size]
    if not isinstance(tokens, Tensor) or tokens.is_floating_point() != bool(trailing):
        raise TypeError(f"{_WHO}: {name}={_kind_of(tokens)}, expected {kind} Tensor.")
    if tokens.dim() != 2 + len(trailing) or list(tokens.shape[2:]) != trailing:
        expected = ", ".join(["batch_size", "seq_len", *map(str, trailing)])
        raise ValueError(f"{_WHO}: {name}.shape={list(tokens.shape)}, expected [{expected}].")
    if not 1 <= tokens.shape[1] <= config.max_seq_len:
        raise ValueError(
            f"{_WHO}: {name} has seq_len={tokens.shape[1]}, expected 1 to {config.max_seq_len}. "
            "Truncate longer texts; the position embeddings end there."
        )
    return tokens


def check_ids(name: str, ids: Tensor | None, batch_size: int, seq_len: int) -> None:
    """Check the form of token types or positions; `check_range` is for their values.

    Raises:
        TypeError: They are not an integer tensor.
        ValueError: There is not one per token.
    """
    if ids is None:
        return
    if not isinstance(ids, Tensor) or ids.is_floating_point():
        raise TypeError(f"{_WHO}: {name}={_kind_of(ids)}, expected an integer Tensor.")
    if tuple(ids.shape) not in ((batch_size, seq_len), (1, seq_len)):
        raise ValueError(
            f"{_WHO}: {name}.shape={list(ids.shape)}, expected [{batch_size}, {seq_len}], one per "
            "token."
        )


def check_range(name: str, ids: Tensor | None, limit: int) -> None:
    """Name what is out of range, where looking costs no wait for a device.

    Raises:
        ValueError: An id is not from 0 to below `limit`.
    """
    if ids is None or ids.device.type != "cpu" or ids.numel() == 0 or is_graph():
        return
    for extreme in torch.stack(ids.aminmax()).tolist():
        if not 0 <= extreme < limit:
            raise ValueError(
                f"{_WHO}: {name} holds {extreme}, expected 0 to {limit - 1}. The tokenizer may be "
                "that of another model."
            )


def check_kwargs(config: DynaBertConfig, kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments that would silently have no effect, a misspelt ``subnet`` among them.

    Raises:
        NotImplementedError: Attention probabilities are asked for.
        TypeError: An argument is not known.
    """
    wants_attentions = kwargs.get("output_attentions")
    if wants_attentions is None:
        wants_attentions = getattr(config, "output_attentions", False)
    if wants_attentions:
        raise NotImplementedError(
            f"{_WHO}: output_attentions=True, expected False. The attention sublayer does not keep "
            "its probabilities; distil from hidden states (output_hidden_states=True)."
        )
    for name, value in kwargs.items():
        if value is not None and name not in _HARMLESS_ARGUMENTS:
            raise TypeError(
                f"{_WHO}: {name}={_kind_of(value)}, expected only arguments that forward lists. "
                "Check its spelling."
            )


def _checked_pair_mask(mask: Tensor, batch_size: int, seq_len: int) -> Tensor:
    """A mask over pairs of tokens as the kernels take it, ``[B, 1 or H, 1 or S, S]``."""
    if (
        mask.shape[0] not in (1, batch_size)
        or mask.shape[-1] != seq_len
        or mask.shape[-2] not in (1, seq_len)
    ):
        raise ValueError(
            f"{_WHO}: attention_mask.shape={list(mask.shape)}, expected [{batch_size}, {seq_len}], "
            f"[{batch_size}, {seq_len}, {seq_len}] or "
            f"[{batch_size}, 1 or heads, {seq_len}, {seq_len}]."
        )
    warnings.warn(
        f"{_WHO}: a mask over pairs of tokens runs on the reference backend, padding included. "
        "Pass a [batch_size, seq_len] mask where that is enough.",
        stacklevel=2,
    )
    if mask.dim() == 3:
        mask = mask.unsqueeze(1) != 0
    elif not mask.is_floating_point():  # numbers are additive only in four dimensions, as HF has it
        mask = mask != 0
    return mask.expand(batch_size, -1, -1, -1)


def is_graph() -> bool:
    """Whether this call is being recorded, to be run again on other data."""
    if torch.compiler.is_compiling():
        return True
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def is_exporting() -> bool:
    """Whether this call is being recorded to run where the kernels do not exist."""
    # Up to torch 2.11 Dynamo takes `torch.compiler.is_exporting()` for true wherever it traces.
    return bool(torch.compiler._is_exporting_flag)


def _kind_of(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else repr(value)
