"""Measuring protocols by name: those the paper's latencies were measured by."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Protocol:
    """What a protocol lays down; everything else is the caller's choice.

    Attributes:
        device: ``cpu`` or ``cuda``.
        batch_size: Sequences per forward pass.
        seq_len: Tokens per sequence, all of them real.
        num_samples: Batches to time each subnet on; None where the protocol names no number.
    """

    device: str
    batch_size: int
    seq_len: int
    num_samples: int | None = None


# Hou et al., "DynaBERT", NeurIPS 2020, Figure 2; there on an Nvidia K40 and on the A76 of a Kirin
# 810. Threads and element type are the caller's, and stand in the table.
PROTOCOLS = MappingProxyType(
    {
        "paper-gpu": Protocol("cuda", 128, 128, 100),
        "paper-cpu": Protocol("cpu", 1, 128),
    }
)


def find_protocol(name: str) -> Protocol:
    """The protocol of that name.

    Raises:
        ValueError: There is none.
    """
    if name not in PROTOCOLS:
        raise ValueError(
            f"find_protocol: name={name!r}, expected one of {', '.join(PROTOCOLS)}. Give batch "
            "size and length yourself for any other."
        )
    return PROTOCOLS[name]
