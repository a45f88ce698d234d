"""Weights of which only prepared forms are left: what a process keeps that does nothing but serve.

The kernels of backend ``cpu`` read a packed tensor once, to build its prepared form. `release`
builds the forms that are asked for, and returns the sublayer with stand-ins for its tensors. A
stand-in has shape, dtype and device, and no numbers: the calls that read a kept form run, with the
bits they had before, and whatever else would look at it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from dynabert_kernels import _extension
from dynabert_kernels.layout import PackedAttention, PackedFFN
from dynabert_kernels.ops import encoder as _encoder  # defines the op of the same name
from dynabert_kernels.ops._cpu import COMPUTE, kernels_missing
from dynabert_kernels.ops.attention import ATTENTION, AttentionCall
from dynabert_kernels.ops.ffn import FFN, FFNCall

PackedT = TypeVar("PackedT", PackedAttention, PackedFFN)

_OPS = torch.ops.dynabert
# What reads prepared forms. The last argument of each names the form.
_READERS = {
    _OPS.attention.cpu: "attention",
    _OPS.ffn.cpu: "ffn",
    _encoder.NATIVE: "encoder",
}


class ReleasedWeightsError(RuntimeError):
    """Something needs the numbers of a weight of which only prepared forms are left."""


class ReleasedWeight(torch.Tensor):
    """The stand-in for one packed tensor: a CPU tensor without memory.

    Attributes:
        field: What the tensor is called in its sublayer.
        forms: The prepared forms that are left.
        prepared_key: The tensor that the forms were made from, since emptied. For kernels that look
            for a form alone: they do not read it, and anything else would read address 0.
    """

    field: str
    forms: tuple[str, ...]
    prepared_key: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, key: Tensor, field: str, forms: tuple[str, ...]) -> ReleasedWeight:
        made: ReleasedWeight = torch.Tensor._make_wrapper_subclass(
            cls, key.shape, strides=key.stride(), dtype=key.dtype, device=key.device
        )
        made.prepared_key, made.field, made.forms = key, field, forms
        made._is_param = True  # a parameter to nn.Module
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        weight = next(_released_in((*args, *kwargs.values())))
        reader = _READERS.get(func)
        if reader is None:
            weight._refuse(str(func))
        compute = kwargs.get("compute", args[-1])
        if compute not in weight.forms:
            raise ReleasedWeightsError(
                f"{reader}: compute={compute}, expected {' or '.join(weight.forms)}. The weights "
                "were released with these prepared forms alone; load the model again and release "
                "it with the form that is needed."
            )
        return func(*map(_keys, args), **{name: _keys(value) for name, value in kwargs.items()})

    def _refuse(self, who: str) -> NoReturn:
        raise ReleasedWeightsError(
            f"{who}: {self.field} was released, expected a weight with its numbers. What is left "
            f"are its prepared forms ({', '.join(self.forms)}), for inference on backend cpu under "
            "torch.no_grad(). Load the model again to train, save, move, convert or rewire it, or "
            "to run another backend or dtype."
        )

    @property
    def data(self) -> Tensor:
        """Refused, as is setting it: the forms would not follow."""
        self._refuse("data")

    @data.setter
    def data(self, _: Tensor) -> None:
        self._refuse("data")

    def __deepcopy__(self, memo: dict[int, Any]) -> ReleasedWeight:
        copied = ReleasedWeight(self.prepared_key, self.field, self.forms)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        self._refuse("pickle")

    def __dlpack__(self, *_: Any, **__: Any) -> NoReturn:
        self._refuse("dlpack")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"ReleasedWeight({self.field}, {list(self.shape)}, {self.dtype}, {self.forms})"


def _released_in(arguments: Sequence[Any]) -> Iterator[ReleasedWeight]:
    for argument in arguments:
        if isinstance(argument, ReleasedWeight):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from _released_in(argument)


def _keys(argument: Any) -> Any:
    if isinstance(argument, ReleasedWeight):
        return argument.prepared_key
    if type(argument) is list:
        return list(map(_keys, argument))
    return argument


def is_released(weights: PackedAttention | PackedFFN | Tensor) -> bool:
    """Whether only prepared forms are left of some weights.

    Args:
        weights: A sublayer, or one of its tensors.
    """
    return isinstance(weights if isinstance(weights, Tensor) else _first(weights), ReleasedWeight)


def _first(weights: PackedAttention | PackedFFN) -> Tensor:
    return weights.elastic()[0]


def refuse_released(who: str, tensors: Sequence[Tensor] | Iterator[Tensor]) -> None:
    """Refuse to begin what would fail halfway at a released weight.

    Args:
        who: What is about to be done.
        tensors: What it needs, such as the parameters of a model.

    Raises:
        ReleasedWeightsError: One of them was released.
    """
    for tensor in tensors:
        if isinstance(tensor, ReleasedWeight):
            tensor._refuse(who)


def check_stays(weight: Tensor, convert: Callable[[Tensor], Tensor]) -> None:
    """Refuse a conversion of a model that would change its released weights.

    Args:
        weight: A released weight.
        convert: What `torch.nn.Module.to` and its like do to each parameter.

    Raises:
        ReleasedWeightsError: The conversion is to another device or dtype.
    """
    like = torch.empty(0, dtype=weight.dtype, device=weight.device)
    converted = convert(like)
    if (converted.device, converted.dtype) != (like.device, like.dtype):
        refuse_released(f"a move to {converted.device}, {converted.dtype}", [weight])


def release(weights: PackedT, forms: Sequence[str]) -> PackedT:
    """Build prepared forms of a sublayer, and give it back without its packed tensors.

    The memory of these is freed with the last reference to them; forms made from them go too, at
    the latest when another form is built. Calls on the result compute, to the bit, what they
    computed before, at every width. It cannot be undone: load the weights again.

    Args:
        weights: The sublayer, on the CPU.
        forms: What to keep: ``"float32"``, ``"bfloat16"``, ``"int8"``, one or several. A call
            computes in the dtype of its tokens, under autocast in that one's, or in the
            quantisation of the weights.

    Returns:
        The sublayer, its tensors replaced by `ReleasedWeight`.

    Raises:
        TypeError: `weights` is no sublayer.
        ValueError: No such form; or int8 of weights that hold NaN or infinity.
        NotImplementedError: Backend ``cpu`` cannot run these weights; the message says why.
        ReleasedWeightsError: They were released before.

    Example:
        >>> weights = release(weights, ["int8"])  # doctest: +SKIP
    """
    forms = check_forms("release", forms)
    if not isinstance(weights, (PackedAttention, PackedFFN)):
        raise TypeError(
            f"release: weights={type(weights).__name__}, expected PackedAttention or PackedFFN. "
            "For a model, use its release_packed()."
        )
    tensors = {name: t for name, t in vars(weights).items() if isinstance(t, Tensor)}
    refuse_released("release", list(tensors.values()))
    weights.validate()
    # Its own tensors: the caller's may be read elsewhere, and these are emptied.
    with torch.inference_mode(False), torch.no_grad():
        keys = {name: _contiguous_copy(tensor) for name, tensor in tensors.items()}
        source = replace(weights, **keys)  # type: ignore[arg-type]  # mypy: of a TypeVar
        for form in forms:
            _build(source, form)
        for key in keys.values():
            key.untyped_storage().resize_(0)
        stand_ins = {name: ReleasedWeight(key, name, forms) for name, key in keys.items()}
    return replace(weights, **stand_ins)  # type: ignore[arg-type]


def check_forms(who: str, forms: Sequence[str]) -> tuple[str, ...]:
    """Names of prepared forms, each once.

    Raises:
        ValueError: There are none, or one is not known.
    """
    names = (forms,) if isinstance(forms, str) else tuple(dict.fromkeys(forms))
    if not names or not set(names) <= set(COMPUTE):
        raise ValueError(
            f"{who}: forms={list(names)}, expected one or several of {', '.join(COMPUTE)}."
        )
    return names


def _contiguous_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _build(weights: PackedAttention | PackedFFN, form: str) -> None:
    """Have the kernels prepare a form, by running one token."""
    missing = kernels_missing()
    if missing is None and not hasattr(_extension.cpu_extension(), "prepared_forms"):
        missing = "the extension was built from older sources. Reinstall the package"
    if missing is not None:
        raise NotImplementedError(f"release: no prepared forms without the C++ kernels: {missing}")
    hidden = torch.zeros(1, weights.hidden_size, device=_first(weights).device)
    if isinstance(weights, PackedFFN):
        feed = FFNCall(hidden, weights, 1, None, None, 0.0, None, form)
        reason = FFN.why_not("cpu", feed)
        reader, arguments = _OPS.ffn.cpu, feed.arguments()
    else:
        offsets = torch.tensor([0, 1], dtype=torch.int32)
        heads = AttentionCall(hidden, weights, 1, None, offsets, 1, 0.0, 0.0, None, None, form)
        reason = ATTENTION.why_not("cpu", heads)
        reader, arguments = _OPS.attention.cpu, heads.arguments()
    if reason is not None:
        raise NotImplementedError(f"release: backend cpu cannot run these weights: {reason}")
    reader(*arguments)
