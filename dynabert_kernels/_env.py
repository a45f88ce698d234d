"""The environment variables the project reads at run time; the only file that reads `os.environ`.

docs/environment.md lists them for users. A typing mistake is an error that names the variable,
never a silent default.
"""

from __future__ import annotations

import os

_FALSE = ("", "0", "false", "no", "off")
_TRUE = ("1", "true", "yes", "on")
_ISAS = ("scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16")


def _flag(name: str) -> bool:
    """Reads an on/off variable; unset is off."""
    value = os.environ.get(name, "").strip().lower()
    if value not in _TRUE + _FALSE:
        raise ValueError(f"environment: {name}={value!r}, expected 1 or 0. Unset it for 0.")
    return value in _TRUE


def backend() -> str | None:
    """Returns the backend named by `DYNABERT_BACKEND`, or None; the op table checks the name."""
    return os.environ.get("DYNABERT_BACKEND", "").strip() or None


def strict() -> bool:
    """Returns whether `DYNABERT_STRICT` makes an automatic fall-back to `reference` an error."""
    return _flag("DYNABERT_STRICT")


def triton_interpret() -> bool:
    """Returns whether `TRITON_INTERPRET` makes Triton run its kernels on the CPU.

    The variable is Triton's own, so a value that Triton ignores is ignored here.
    """
    return os.environ.get("TRITON_INTERPRET", "").strip().lower() in (*_TRUE, "y")


def cuda_emulation() -> str | None:
    """Returns the file that `DYNABERT_CUDA_EMULATION` names, or None.

    It is a build of the CUDA kernels that runs them on the CPU; see `_cuda_extension`.
    """
    return os.environ.get("DYNABERT_CUDA_EMULATION", "").strip() or None


def isa() -> str | None:
    """Returns the instruction set named by `DYNABERT_ISA`, or None.

    Raises:
        ValueError: The name is not an instruction set. Whether this CPU can run it is checked
            by the extension.
    """
    value = os.environ.get("DYNABERT_ISA", "").strip()
    if value and value not in _ISAS:
        raise ValueError(
            f"environment: DYNABERT_ISA={value!r}, expected one of {', '.join(_ISAS)}. "
            "Unset it to use the widest this CPU supports."
        )
    return value or None
