"""Loads the compiled module `dynabert_kernels._C`, or says in a sentence why it is not there.

Nothing here raises at import: a package without its extension runs on the `reference` backend.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
from pathlib import Path
from types import ModuleType

from dynabert_kernels import _env

_PACKAGE = Path(__file__).resolve().parent


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    """Loads the extension once: the module and no reason, or no module and the reason."""
    if importlib.util.find_spec("dynabert_kernels._C") is None:
        return None, f"extension not built: {_recorded_reason()}"
    import torch  # the extension links to torch's libraries, which must be in the process first

    try:
        module = importlib.import_module("dynabert_kernels._C")
    except ImportError as error:
        built_with = _build_record().get("torch", "an unknown version")
        return None, (
            f"extension not loadable: {error} (built with torch {built_with}, running "
            f"{torch.__version__}). Reinstall the package"
        )
    return module, None


def _build_record() -> dict[str, str | bool | None]:
    """Returns what setup.py recorded about the build, empty if it left no record."""
    try:
        record = json.loads((_PACKAGE / "_build_record.json").read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _recorded_reason() -> str:
    return str(_build_record().get("reason") or "no build has run. Install the package with pip")


def extension_error() -> str | None:
    """Returns None if the extension can be used, else why it cannot, as one sentence."""
    try:
        cpu_extension()
    except (ImportError, ValueError) as error:
        return str(error)
    return None


def has_kernel(op: str) -> bool:
    """Whether the extension can be used and has a CPU kernel for this op, as older builds may not.

    Args:
        op: Name with namespace and overload, such as ``"dynabert::unpad.cpu"``.
    """
    if extension_error() is not None:
        return False
    import torch

    return torch._C._dispatch_has_kernel_for_dispatch_key(op, "CPU")


def cpu_extension() -> ModuleType:
    """Returns the loaded extension, set to the instruction set that `DYNABERT_ISA` forces.

    Returns:
        The module `dynabert_kernels._C`.

    Raises:
        ImportError: The extension was not built or cannot be loaded; the message says why.
        ValueError: `DYNABERT_ISA` names no instruction set, or one this CPU cannot run.
    """
    module, reason = _load()
    if module is None:
        raise ImportError(reason)
    _apply_forced_isa(module)
    return module


@functools.cache
def _apply_forced_isa(module: ModuleType) -> None:
    """Applies `DYNABERT_ISA` once per process; errors are not cached, so each call raises."""
    forced = _env.isa()
    if forced is None:
        return
    supported = module.supported_isas()
    if forced not in supported:
        raise ValueError(
            f"environment: DYNABERT_ISA={forced!r}, expected one of {', '.join(supported)} on this "
            "CPU. Unset it to use the widest."
        )
    module.force_isa(forced)
