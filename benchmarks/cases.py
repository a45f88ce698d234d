"""What the CPU benchmarks run, as data: models, input shapes, subnets, dtypes.

A case is one model, one input and one subnet; every peer of a dtype runs it. Letters: B sequences,
S padded length.
"""

from __future__ import annotations

import fnmatch
import random
from dataclasses import dataclass

from benchmarks.geometry import BASE, TINY, Geometry, Subnet

MINILM = Geometry("minilm", 384, 12, 32, 1536, 6)
MODELS = (BASE, MINILM, TINY)

DTYPES = ("float32", "bfloat16", "int8")

# SST-2's dev set in word pieces (872 sentences, mean 25.2, longest 55), [CLS] and [SEP] included:
# the middles of its eight equal parts, in an order without meaning.
SST2_LENGTHS = (23, 42, 10, 30, 15, 26, 35, 19)


@dataclass(frozen=True)
class InputShape:
    """Token ids of one call.

    Attributes:
        name: As in records and on the command line.
        lengths: Real tokens of each sequence.
        seq_len: Padded length.
    """

    name: str
    lengths: tuple[int, ...]
    seq_len: int

    @property
    def batch_size(self) -> int:
        """Sequences."""
        return len(self.lengths)

    @property
    def is_padded(self) -> bool:
        """Whether some positions are padding; without any, no peer gets a mask."""
        return min(self.lengths) < self.seq_len

    def token_ids(self, vocab_size: int, seed: int = 0) -> list[list[int]]:
        """Random ids, ``[B][S]``; 0 where there is no token."""
        draw = random.Random(seed)
        return [
            [draw.randrange(1, vocab_size) for _ in range(count)] + [0] * (self.seq_len - count)
            for count in self.lengths
        ]

    def mask(self) -> list[list[int]]:
        """1 at real tokens, ``[B][S]``; on the right of them 0."""
        return [[1] * count + [0] * (self.seq_len - count) for count in self.lengths]


SHAPES = {
    shape.name: shape
    for shape in (
        InputShape("1x128", (128,), 128),
        InputShape("1x16", (16,), 16),
        InputShape("1x512", (512,), 512),
        # Our model drops the padding of both by itself; a static runtime pays for what it gets.
        InputShape("8xsst2-pad128", SST2_LENGTHS, 128),
        InputShape("8xsst2-longest", SST2_LENGTHS, max(SST2_LENGTHS)),
        InputShape("3x8", (8, 5, 7), 8),
    )
}

# Width and depth. The first three carry the project's claims; the rest complete the grid's corners.
CLAIMED = ((1.0, 1.0), (0.5, 1.0), (0.25, 0.5))
GRID = tuple((w, d) for d in (1.0, 0.75, 0.5) for w in (1.0, 0.75, 0.5, 0.25))


@dataclass(frozen=True)
class Case:
    """One model, input and subnet."""

    subnet: Subnet
    shape: InputShape

    @property
    def name(self) -> str:
        """``bert-base/1x128/w0.5-d1``."""
        return f"{self.subnet.geometry.name}/{self.shape.name}/{self.subnet.name}"

    @property
    def flops(self) -> float:
        """Operations of the encoder layers on the real tokens, two per multiply-add."""
        return self.subnet.ragged_flops(list(self.shape.lengths))


def _cases() -> dict[str, Case]:
    wanted = [
        *((BASE, "1x128", pair) for pair in dict.fromkeys((*CLAIMED, *GRID))),
        *((BASE, name, pair) for name in ("8xsst2-longest", "8xsst2-pad128") for pair in CLAIMED),
        *((BASE, name, pair) for name in ("1x16", "1x512") for pair in CLAIMED),
        *((MINILM, name, pair) for name in ("1x128", "1x16", "8xsst2-longest") for pair in CLAIMED),
        *((TINY, "3x8", pair) for pair in ((1.0, 1.0), (0.5, 0.5))),
    ]
    cases = [Case(Subnet(model, *pair), SHAPES[name]) for model, name, pair in wanted]
    return {case.name: case for case in cases}


CASES = _cases()
"""Every case by name, most wanted first, so that a run cut short has measured what matters."""

DEFAULT_PATTERNS = ("bert-base/*", "minilm/*")


def chosen_cases(patterns: tuple[str, ...]) -> list[Case]:
    """The cases whose name matches one of `patterns` (``*`` as in a shell), in the table's order.

    Raises:
        ValueError: A pattern matches nothing.
    """
    for pattern in patterns:
        if not fnmatch.filter(CASES, pattern):
            raise ValueError(
                f"cases: pattern={pattern!r}, expected to match one of {', '.join(CASES)}. "
                "Put * for any part."
            )
    return [
        case
        for name, case in CASES.items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    ]
