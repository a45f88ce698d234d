"""The op table: every op has one reference and any number of native backends.

A native backend is an overload of one packet, ``torch.ops.dynabert.<op>.<backend>``, with the
schema and fake of its op and, where it has one, its own backward, or overloads of its own for calls
that need gradients (`Training`). The reference is plain PyTorch, called directly, so that autograd,
Inductor and exporters see through it; ``torch.export``, ONNX and ``torch.jit.trace`` get it unless
another backend is forced.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from dynabert_kernels import _env

REFERENCE = "reference"
OPS: dict[str, Op[Any]] = {}
"""Every op by name, filled as the op modules are imported."""

_LIBRARY = torch.library.Library("dynabert", "FRAGMENT")

# A plain module attribute: Dynamo guards it, where it cannot trace a ContextVar.
# A name that no op knows is refused by the first call, so that `doctor` can still be asked.
_forced: str | None = _env.backend()
_strict = _env.strict()
_warned: set[tuple[str, str]] = set()


class OpCall(Protocol):
    """The checked arguments of one call."""

    @property
    def hidden(self) -> Tensor:
        """The tokens; their device is the device of the call."""
        ...

    def arguments(self) -> tuple[Any, ...]:
        """The arguments in the order of the op's schema."""
        ...

    def describe(self) -> str:
        """What an error message should say of the call, besides device and dtype."""
        ...


CallT = TypeVar("CallT", bound=OpCall)


@dataclass(frozen=True)
class Training(Generic[CallT]):
    """How a backend runs a call that needs gradients: two overloads of its own.

    ``<backend>_training`` takes the op's arguments and returns the output and what the gradient
    needs besides them; ``<backend>_backward`` takes the gradient of the output, what was kept, and
    the op's arguments, and returns the gradients of the first of these.

    Attributes:
        kept: Names of the tensors kept for the gradient, the same in every backend of an op: torch
            files overloads by their arguments, and aborts at exit where two backends agree in those
            of one overload and not in those of the next.
        num_gradients: Arguments that have gradients, from the first on; all are tensors.
        fake: Shape function of the first overload: output and kept tensors.
        slower: A sentence where the reference is faster, else None. The automatic choice then takes
            it, without a warning; `use_backend` still forces this backend.
        run: Implementation of the first overload; None where C++ registers it.
        run_backward: Implementation of the second overload; None where C++ registers it.
    """

    kept: tuple[str, ...]
    num_gradients: int
    fake: Callable[..., tuple[Tensor, ...]]
    slower: Callable[[CallT], str | None] | None = None
    run: Callable[..., tuple[Tensor, ...]] | None = None
    run_backward: Callable[..., tuple[Tensor, ...]] | None = None


@dataclass(frozen=True)
class Backend(Generic[CallT]):
    """One native implementation of an op.

    Attributes:
        name: What `use_backend` calls it.
        device: Device type it runs on.
        run: The implementation, taking the schema's arguments; None where C++ registers it.
        scope: A sentence if the call is none that this backend is made for, else None. A forced
            backend refuses such a call; the automatic choice takes `reference`, without a warning
            and also under ``DYNABERT_STRICT``: users who train or need float64 asked for
            nothing that this backend could give. Calls that need gradients of a backend without
            `backward` or `training`, and those refused by the op's `why_not_native`, are out of
            scope too.
        why_not: A sentence if it cannot run a call in its scope, else None. The automatic choice
            then takes `reference` with a warning.
        unavailable: A sentence if it cannot run anything here (not built, not installed). Asked
            at every call on `device`, and traced by Dynamo: it reads a constant.
        unproven: A sentence if only `use_backend` may choose it. The automatic choice passes it
            over without a warning, and neither warns nor fails under ``DYNABERT_STRICT`` where it
            is the only native backend of a device; where a message lists backends, it says this.
        yields: A sentence if another backend is the better choice for a call that this one can
            run, else None. The automatic choice then asks it last, without a warning: it runs what
            no other native backend can. `use_backend` still forces it. Asked for calls on `device`,
            and traced by Dynamo.
        doubt: A sentence if results of such a call are not to be trusted on its device, else None;
            takes the call and whether gradients are needed. Asked last, and not while Dynamo
            traces, so the overloads ask for themselves (`Op.step_aside`). The automatic choice then
            takes `reference` with a warning for each such sentence.
        backward: Gradient formula, as `torch.library.register_autograd` takes it. A backend
            without one, and without `training`, is not used where gradients are needed.
        setup_context: What `backward` keeps, as `torch.library.register_autograd` takes it.
        training: Overloads for calls that need gradients, instead of `backward`.
    """

    name: str
    device: str
    run: Callable[..., Tensor] | None = None
    scope: Callable[[CallT], str | None] | None = None
    why_not: Callable[[CallT], str | None] | None = None
    unavailable: Callable[[], str | None] | None = None
    unproven: str | None = None
    yields: Callable[[CallT], str | None] | None = None
    doubt: Callable[[CallT, bool], str | None] | None = None
    backward: Callable[..., Any] | None = None
    setup_context: Callable[..., None] | None = None
    training: Training[CallT] | None = None


class Op(Generic[CallT]):
    """An op and its backends; the first proven backend that can run a call runs it.

    Args:
        name: Name of the op and of its packet in ``torch.ops.dynabert``.
        schema: Arguments and result in torch's schema language, without a name.
        fake: Shape function with the schema's arguments, for tracing.
        reference: Plain PyTorch implementation, taking the call.
        why_not_native: A sentence if a call asks for what the schema cannot say, else None.
        backends: Native backends, best first.
    """

    def __init__(
        self,
        name: str,
        *,
        schema: str,
        fake: Callable[..., Tensor],
        reference: Callable[[CallT], Tensor],
        why_not_native: Callable[[CallT], str | None] | None = None,
        backends: Sequence[Backend[CallT]] = (),
    ) -> None:
        self.name = name
        self.schema = schema
        self.fake = fake
        self.reference = reference
        self.why_not_native = why_not_native
        self.backends: tuple[Backend[CallT], ...] = ()
        self._overloads: dict[str, Any] = {}
        for backend in backends:
            self._register(backend)
        OPS[name] = self

    @property
    def backend_names(self) -> tuple[str, ...]:
        """Every name `use_backend` accepts for this op, best first."""
        return (*(backend.name for backend in self.backends), REFERENCE)

    def _register(self, backend: Backend[CallT]) -> None:
        overload = f"{self.name}.{backend.name}"
        qualified = f"dynabert::{overload}"
        _LIBRARY.define(overload + self.schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(qualified, self.fake, lib=_LIBRARY)
        if backend.backward is not None:
            torch.library.register_autograd(
                qualified, backend.backward, setup_context=backend.setup_context, lib=_LIBRARY
            )
        if backend.run is not None:
            _LIBRARY.impl(overload, backend.run, backend.device.upper())
        self._overloads[backend.name] = self._overload(backend.name)
        if backend.training is not None:
            self._register_training(backend.name, backend.device, backend.training)
        self.backends = (*self.backends, backend)

    def _overload(self, name: str) -> Any:
        return getattr(getattr(torch.ops.dynabert, self.name), name)

    def _register_training(self, name: str, device: str, training: Training[CallT]) -> None:
        trained = [other.training for other in self.backends if other.training is not None]
        assert all(other.kept == training.kept for other in trained), (self.name, name)
        forward, backward = f"{self.name}.{name}_training", f"{self.name}.{name}_backward"
        arguments = self.schema[1 : self.schema.rindex(") -> ")]
        kept = ", ".join(f"Tensor {tensor}" for tensor in training.kept)
        outputs, gradients = (
            ", ".join(["Tensor"] * count)
            for count in (1 + len(training.kept), training.num_gradients)
        )
        # Seeds of dropout are drawn inside: no two calls are one, and none is run again.
        tags = (torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded)
        _LIBRARY.define(f"{forward}({arguments}) -> ({outputs})", tags=tags)
        _LIBRARY.define(
            f"{backward}(Tensor gradient, {kept}, {arguments}) -> ({gradients})",
            tags=(torch.Tag.pt2_compliant_tag,),
        )
        for overload, run in ((forward, training.run), (backward, training.run_backward)):
            if run is not None:
                _LIBRARY.impl(overload, run, device.upper())
        self._overloads[f"{name}_training"] = self._overload(f"{name}_training")
        formula = _GradientFormula(self, name, training, self._overload(f"{name}_backward"))
        torch.library.register_fake(f"dynabert::{forward}", training.fake, lib=_LIBRARY)
        torch.library.register_fake(f"dynabert::{backward}", formula.fake, lib=_LIBRARY)
        torch.library.register_autograd(
            f"dynabert::{forward}",
            formula.backward,
            setup_context=formula.setup_context,
            lib=_LIBRARY,
        )
        torch.library.register_autograd(
            f"dynabert::{backward}", formula.refuse_second, lib=_LIBRARY
        )

    def __call__(self, call: CallT) -> Tensor:
        """Run a checked call on the chosen backend.

        Raises:
            NotImplementedError: The forced backend cannot run this call, or none may.
        """
        trains = needs_gradients(call)
        backend = self._choose(call, trains)
        if backend is None:
            return self.reference(call)
        result: Tensor
        if backend.training is not None and trains:
            result = self._overloads[f"{backend.name}_training"](*call.arguments())[0]
        else:
            result = self._overloads[backend.name](*call.arguments())
        return result

    def status(self, device: torch.device | str) -> list[tuple[str, str | None]]:
        """Each backend with None, or the reason it cannot run anything on `device`."""
        device_type = torch.device(device).type
        rows: list[tuple[str, str | None]] = [
            (backend.name, _unavailable(backend, device_type)) for backend in self.backends
        ]
        return [*rows, (REFERENCE, None)]

    def why_not(self, name: str, call: CallT) -> str | None:
        """Why backend `name` cannot run this call, or None if it can.

        Raises:
            ValueError: The op has no such backend.
        """
        if name == REFERENCE:
            return None
        for backend in self.backends:
            if backend.name == name:
                return self._why_not(backend, call, call.hidden.device.type)
        raise ValueError(
            f"{self.name}: backend={name!r}, expected one of {', '.join(self.backend_names)}. "
            "Run `python -m dynabert_kernels` for the table."
        )

    def _why_not(self, backend: Backend[CallT], call: CallT, device_type: str) -> str | None:
        reason = _unavailable(backend, device_type)
        if reason is None:
            reason = self._out_of_scope(backend, call)
        if reason is None and backend.why_not is not None:
            reason = backend.why_not(call)
        return reason

    def _out_of_scope(self, backend: Backend[CallT], call: CallT) -> str | None:
        reason = None
        if self.why_not_native is not None:
            reason = self.why_not_native(call)
        can_train = backend.backward is not None or backend.training is not None
        if reason is None and not can_train and needs_gradients(call):
            reason = (
                "the call needs gradients, and this backend has no backward. Call it under "
                "torch.no_grad()"
            )
        if reason is None and backend.scope is not None:
            reason = backend.scope(call)
        return reason

    def _choose(self, call: CallT, trains: bool) -> Backend[CallT] | None:
        if _forced == REFERENCE or (_forced is None and _is_exporting()):
            return None
        reasons: dict[str, str] = {}
        native_here = False
        doubt: str | None = None
        device_type = call.hidden.device.type
        for backend in self._in_turn(call, device_type):
            if _forced is None and backend.unproven is not None:
                reasons[backend.name] = backend.unproven
                continue
            reason = self._why_not(backend, call, device_type)
            if _forced is not None and backend.name != _forced:
                reasons[backend.name] = reason or f"not used while {_forced!r} is forced"
                continue
            slower = None if _forced is not None else _slower(backend, call)
            why_not = reason if reason is not None else slower
            if why_not is None:
                if backend.doubt is None or torch.compiler.is_compiling():
                    return backend
                why_not = doubt = backend.doubt(call, trains)
                if why_not is None:
                    return backend
            reasons[backend.name] = why_not
            # What was out of scope before the backend turned out to be missing still is.
            native_here = native_here or (
                backend.device == device_type
                and slower is None
                and self._out_of_scope(backend, call) is None
            )
        if _forced is not None:
            reasons.setdefault(_forced, "the op has no such backend")
            raise self._cannot_run(call, reasons, f"not used while {_forced!r} is forced")
        if native_here:
            if _strict:
                raise self._cannot_run(call, reasons, "switched off by DYNABERT_STRICT=1")
            self._warn_once(call, reasons, doubt)
        return None

    def _in_turn(self, call: CallT, device_type: str) -> Sequence[Backend[CallT]]:
        """The backends as a choice asks them: those that yield after all others."""
        if _forced is not None:
            return self.backends
        last = [
            backend.name
            for backend in self.backends
            if backend.device == device_type
            and backend.yields is not None
            and backend.unproven is None
            and backend.yields(call) is not None
        ]
        if not last:
            return self.backends
        return sorted(self.backends, key=lambda backend: backend.name in last)

    def step_aside(self, name: str, call: CallT, doubt: str) -> None:
        """Says that an overload takes the reference because its own results are in doubt.

        Args:
            name: The overload's backend.
            call: What it was called with.
            doubt: Why.

        Raises:
            NotImplementedError: The backend is forced, or ``DYNABERT_STRICT`` is set.
        """
        reasons = {name: doubt}
        if _forced == name:
            raise self._cannot_run(call, reasons, f"not used while {_forced!r} is forced")
        if _strict:
            raise self._cannot_run(call, reasons, "switched off by DYNABERT_STRICT=1")
        self._warn_once(call, reasons, doubt)

    def _cannot_run(
        self, call: CallT, reasons: dict[str, str], reference: str
    ) -> NotImplementedError:
        hidden = call.hidden
        dtype = str(hidden.dtype).removeprefix("torch.")
        lines = [
            f"{self.name}: no backend can run this call "
            f"(device {hidden.device}, {dtype}, {call.describe()})"
        ]
        lines += [f"  {name}: {reason}" for name, reason in reasons.items()]
        lines.append(f"  {REFERENCE}: {reference}")
        return NotImplementedError("\n".join(lines))

    def _warn_once(self, call: CallT, reasons: dict[str, str], doubt: str | None) -> None:
        key = (self.name, doubt or call.hidden.device.type)
        if torch.compiler.is_compiling() or key in _warned:
            return
        _warned.add(key)
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        warnings.warn(
            f"{self.name}: running on the reference backend, because {listed}. Choose it with "
            "use_backend('reference') to silence this; said once.",
            RuntimeWarning,
            stacklevel=4,
        )


class _GradientFormula:
    """The formulas of a backend's training overloads, as `torch.library` takes them."""

    def __init__(self, op: Op[Any], name: str, training: Training[Any], overload: Any) -> None:
        self._who, self._name = op.name, name
        self._training, self._overload = training, overload

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep what the forward pass returned besides the output, and all arguments."""
        kept = output[1:]
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        tensors = [value if isinstance(value, Tensor) else None for value in inputs]
        ctx.save_for_backward(*kept, *tensors)
        ctx.constants = [None if isinstance(value, Tensor) else value for value in inputs]

    def backward(self, ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """Gradients of the first arguments, None for the others."""
        nothing = [None] * len(ctx.constants)
        if gradient is None:
            return tuple(nothing)
        number = len(self._training.kept)
        kept, tensors = ctx.saved_tensors[:number], ctx.saved_tensors[number:]
        pairs = zip(tensors, ctx.constants, strict=True)
        arguments = [constant if tensor is None else tensor for tensor, constant in pairs]
        gradients = self._overload(gradient, *kept, *arguments)
        return (*gradients, *nothing[len(gradients) :])

    def fake(self, gradient: Tensor, *others: Any) -> tuple[Tensor, ...]:
        """Gradients look like what they belong to."""
        number = len(self._training.kept)
        like = others[number : number + self._training.num_gradients]
        return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in like)

    def refuse_second(self, ctx: Any, *_: Any) -> None:
        """There is no gradient of the gradient."""
        raise NotImplementedError(
            f"{self._who}: backend={self._name!r} in a second derivative, expected 'reference'. "
            "Choose it with use_backend('reference')."
        )


def _slower(backend: Backend[CallT], call: CallT) -> str | None:
    """Why the reference is the faster way to the gradients that a call needs, or None."""
    training = backend.training
    if training is None or training.slower is None or not needs_gradients(call):
        return None
    return training.slower(call)


def _unavailable(backend: Backend[Any], device_type: str) -> str | None:
    if backend.device != device_type:
        return f"device={device_type}, expected {backend.device}"
    return backend.unavailable() if backend.unavailable is not None else None


def _is_exporting() -> bool:
    """Whether a tool records the call to run it elsewhere, where native operators do not exist."""
    if torch.compiler.is_compiling():
        # Up to torch 2.11 Dynamo takes `torch.compiler.is_exporting()` for true wherever it traces.
        return bool(torch.compiler._is_exporting_flag)
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def needs_gradients(call: OpCall) -> bool:
    """Whether autograd would record this call."""
    return torch.is_grad_enabled() and any(
        isinstance(argument, Tensor) and argument.requires_grad for argument in call.arguments()
    )


class _BackendScope:
    """Puts the backend of before back when the ``with`` block ends."""

    def __init__(self, before: str | None) -> None:
        self._before = before

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _forced
        _forced = self._before


def use_backend(name: str | None) -> _BackendScope:
    """Force one backend for every op of this process, or choose automatically again.

    Takes effect at once, as a plain call; in a ``with`` statement it lasts to the end of the
    block. It holds for all threads: a server chooses once, at its start. A forced backend that
    cannot run a call raises, and never falls through to another.

    Args:
        name: A backend of some op, such as ``"reference"``; None to choose automatically.

    Returns:
        A context manager that puts the choice of before back.

    Raises:
        ValueError: No op has such a backend.
    """
    global _forced
    known = dict.fromkeys(name for op in OPS.values() for name in op.backend_names)
    if name is not None and name not in known:
        raise ValueError(
            f"use_backend: name={name!r}, expected None or one of {', '.join(known)}. "
            "Run `python -m dynabert_kernels` for the table of backends."
        )
    scope = _BackendScope(_forced)
    _forced = name
    return scope


def forced_backend() -> str | None:
    """The backend in force by `use_backend` or ``DYNABERT_BACKEND``, or None."""
    return _forced
