"""What GPU kernels may run on a card: what was proven there, or agrees with the reference.

Until a recorded run proves a path (`dynabert_kernels.proof`), its first call on a card compares it
with the reference on small problems of its own. Where it differs, the reference takes its place: in
eager calls by the choice of the op table, in compiled ones inside the overload that was compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from dynabert_kernels import proof
from dynabert_kernels.ops._op import OPS
from dynabert_kernels.proof import Path

PROVEN, AGREED = GOOD = ("proven", "checked in this process")
Check = Callable[[Path, torch.device], str | None]

# What every call asks: backend, op, dtype, head_dim, whether gradients are needed, and the card's
# number. Looked up before anything is called: a launch is short enough for that to count.
Use = tuple[str, str, str, int | None, bool, int]
trusted: set[Use] = set()
_agreed: set[Path] = set()
_differ: dict[Path, str] = {}


def doubt(use: Use, device: torch.device, check: Check, *, may_wait: bool = True) -> str | None:
    """Why a call may not run on the kernels, or None; compares them first where nobody has.

    Args:
        use: Of the call. Once it is in `trusted`, nobody need ask.
        device: Of the call.
        check: Compares a path with the reference: None, or how it differs.
        may_wait: Whether the overload will ask again when it runs.
    """
    backend, op, compute, head_dim, trains, _ = use
    capability = proof.capability(device)
    if capability is not None:
        direction = proof.BACKWARD if trains else proof.FORWARD
        path = Path(backend, op, compute, head_dim, direction, capability)
        if path in _differ:
            return _differ[path]
        if path not in _agreed and not proof.is_proven(path):
            if may_wait and _get_current_dispatch_mode() is not None:
                return None  # tensors may be fake, and what is made here would be too
            if is_capturing(device):
                return (
                    f"{path} has not been compared with the reference yet, which a CUDA graph "
                    "being captured does not allow. Make such a call once before"
                )
            error = check(path, device)
            if error is not None:
                _differ[path] = f"{path} differs from the reference: {error}"
                return _differ[path]
            _agreed.add(path)
    trusted.add(use)
    return None


def is_capturing(device: torch.device) -> bool:
    """Whether work on a device is being captured in a CUDA graph instead of done."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def known(path: Path) -> str | None:
    """How a path stands: a word or a sentence, or None where it will check itself."""
    if path in _differ:
        return _differ[path]
    if proof.is_proven(path):
        return PROVEN
    return AGREED if path in _agreed else None


@dataclass(frozen=True)
class Kernels:
    """A backend's kernels of an op and how to run the reference in their place.

    Attributes:
        backend: Name of the backend.
        op: Name of the op.
        has_heads: Whether paths differ by the size of a head, the third size of argument 1.
        forward: The op's own arguments to its output.
        call_of: The checked call that arguments say, a named tuple with a `seed`.
        num_gradients: Arguments that have gradients.
    """

    backend: str
    op: str
    has_heads: bool
    forward: Callable[..., Tensor]
    call_of: Callable[..., Any]
    num_gradients: int

    def check(self, path: Path, device: torch.device) -> str | None:
        """How a path differs from the reference on small problems, or None."""
        from dynabert_kernels.ops import _self_check

        problems = _self_check.FIRST_USE[self.backend][self.op]
        return _self_check.difference(self, path, device, problems)

    def run(self, *arguments: Any) -> Tensor:
        """The overload for inference."""
        if self._must_not(arguments, trains=False):
            with torch.autocast(arguments[0].device.type, enabled=False):
                result: Tensor = OPS[self.op].reference(self.call_of(*arguments))
            return result
        return self.forward(*arguments)

    def reference_gradients(
        self, gradient: Tensor, arguments: tuple[Any, ...], *, seed: int
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Output and gradients of the reference, also from inside an overload."""
        count = self.num_gradients
        with recording(arguments[0].device):
            leaves = [tensor.detach().requires_grad_() for tensor in arguments[:count]]
            call = self.call_of(*leaves, *arguments[count:])._replace(seed=seed)
            output = OPS[self.op].reference(call)
            found = torch.autograd.grad(output, leaves, gradient, allow_unused=True)
            pairs = zip(leaves, found, strict=True)
            filled = tuple(
                torch.zeros_like(leaf) if part is None else part.contiguous()
                for leaf, part in pairs
            )
            return output.detach(), filled

    def _doubt(self, arguments: tuple[Any, ...], *, trains: bool) -> str | None:
        hidden = arguments[0]
        head_dim = arguments[1].size(2) if self.has_heads else None
        use = (self.backend, self.op, arguments[-1], head_dim, trains, hidden.get_device())
        if use in trusted:
            return None
        return doubt(use, hidden.device, self.check, may_wait=False)

    def _must_not(self, arguments: tuple[Any, ...], *, trains: bool) -> bool:
        reason = self._doubt(arguments, trains=trains)
        if reason is None:
            return False
        OPS[self.op].step_aside(self.backend, self.call_of(*arguments), reason)
        return True


@dataclass(frozen=True)
class TrainingKernels(Kernels):
    """Kernels that also compute gradients.

    Attributes:
        training: The op's arguments to the output and what the gradient needs, the seed of masks
            last.
        backward: Gradient of the output, what `training` kept, and the arguments, to gradients.
        like_training: Tensors like those of `training`, of any content.
        num_kept: Tensors that `training` returns besides the output.
    """

    training: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor, ...]]
    like_training: Callable[..., tuple[Tensor, ...]]
    num_kept: int

    def run_training(self, *arguments: Any) -> tuple[Tensor, ...]:
        """The overload for calls that need gradients."""
        if not self._must_not(arguments, trains=True):
            return self.training(*arguments)
        call = self.call_of(*arguments)
        if call.seed is None:
            call = call._replace(seed=int(torch.randint(2**63 - 1, (1,)).item()))
        with torch.autocast(call.hidden.device.type, enabled=False):
            output = OPS[self.op].reference(call)
        kept = self.like_training(*arguments)[1:]
        return (output, *kept[:-1], kept[-1].fill_(call.seed))

    def run_backward(self, gradient: Tensor, *others: Any) -> tuple[Tensor, ...]:
        """The overload for gradients: what `run_training` has decided holds."""
        kept, arguments = others[: self.num_kept], others[self.num_kept :]
        if self._doubt(arguments, trains=True) is None:
            return self.backward(gradient, *others)
        # Memory that nobody wrote to, where nothing is dropped, may be negative.
        seed = int(kept[-1].item()) & (2**63 - 1)
        return self.reference_gradients(gradient, arguments, seed=seed)[1]


@contextmanager
def recording(device: torch.device) -> Iterator[None]:
    """Autograd as in a plain call, whatever the caller's modes, also inside an overload."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        torch._C._PreserveDispatchKeyGuard(),
    ):
        # The dispatcher leaves autograd out below the overload that it calls.
        for key in (
            torch._C.DispatchKey.AutogradFunctionality,
            torch._C.DispatchKey.ADInplaceOrView,
        ):
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
        yield
