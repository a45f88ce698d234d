"""Whether modules are still as they were when their parameters were bundled for one native call."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import chain, repeat
from operator import contains, is_, itemgetter
from typing import Any, Generic, TypeVar, cast

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

MadeT = TypeVar("MadeT")
_training = itemgetter("training")


class ModuleWatch(Generic[MadeT]):
    """Modules of which a native call does what calling them would: in evaluation, without hooks.

    A call looks at a hundred objects, most of them no longer in the caches; so the comparison is
    made of loops that run in the interpreter's own C, without a line of Python for each object.

    Args:
        parents: Modules whose children are watched.
        names: For each of `parents`, the names of these children.
        made: What was made of them; good for as long as `is_plain`.
    """

    def __init__(
        self, parents: Iterable[nn.Module], names: Iterable[Collection[str]], made: MadeT
    ) -> None:
        self.made = made
        slots = [
            (p._modules, name) for p, of_it in zip(parents, names, strict=True) for name in of_it
        ]
        self._places = [place for place, _ in slots]
        self._names = [name for _, name in slots]
        self._modules = [cast(nn.Module, place[name]) for place, name in slots]
        self._types = list(map(type, self._modules))
        # A list of layers is never called itself; a new one is in training, whatever it holds.
        called = [module for module in self._modules if type(module) is not nn.ModuleList]
        self._states: list[dict[str, Any]] = [vars(module) for module in called]
        self._hooks = [hooks for m in called for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._own = [module._parameters for module in self._modules]
        self._parameters = list(chain.from_iterable(map(dict.values, self._own)))

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of a model, or one from a file, has other modules to watch.
        return type(None), ()

    def is_plain(self) -> bool:
        """Whether nothing was replaced, no hook is to be called and no module is in training."""
        return (
            not any(self._hooks)
            and not any(map(_training, self._states))
            and all(map(is_, map(dict.get, self._places, self._names), self._modules))
            and all(map(is_, map(type, self._modules), self._types))
            and not any(map(contains, self._states, repeat("forward")))
            and sum(map(len, self._own)) == len(self._parameters)
            and all(map(is_, chain.from_iterable(map(dict.values, self._own)), self._parameters))
            and not _has_any_global_hook()
        )
