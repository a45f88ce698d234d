"""The GPU targets against the rows of a run, and the ratio to the best peer for each subnet.

A ratio compares rows of one process, whose competitors were timed in turn; where two processes
measured it, the least favourable counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.records import format_table

Row = dict[str, Any]
Rows = list[Row]
OURS, CUDA = "ours graph", "ours graph cuda"
FULL, NARROW = "w1-d1", "w0.25-d1"


@dataclass(frozen=True)
class Target:
    """A number to reach.

    Attributes:
        what: In the table.
        value: The number from the rows; None if they do not hold it.
        goal: To reach.
        stretch: Beyond.
        at_most: Whether smaller is better.
    """

    what: str
    value: Callable[[Rows], float | None]
    goal: float
    stretch: float | None = None
    at_most: bool = False

    def line(self, rows: Rows) -> dict[str, str]:
        """The target's line of the table."""
        value = self.value(rows)
        if value is None:
            verdict = "not measured"
        elif value <= self.goal if self.at_most else value >= self.goal:
            verdict = "met"
        else:
            verdict = "missed"
        return {
            "target": self.what,
            "measured": "-" if value is None else f"{value:.4g}",
            "goal": f"{'<=' if self.at_most else '>='} {self.goal:g}",
            "stretch": "-" if self.stretch is None else f"{self.stretch:g}",
            "": verdict,
        }


def times_ms(rows: Rows, case: str, subnet: str | None = None, **fields: Any) -> dict[str, float]:
    """Time of each peer in a case: the median of repeats, the least of its ways to run."""
    found: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        is_case = row["case"] == case and "median_ms" in row
        is_subnet = subnet is None or row.get("subnet") == subnet
        if is_case and is_subnet and all(row.get(n) == value for n, value in fields.items()):
            way = row["peer"], str(row.get("sdpa")), str(row.get("shape"))
            found.setdefault(way, []).append(row["median_ms"])
    times: dict[str, float] = {}
    for (peer, *_), values in found.items():
        times[peer] = min(median(values), times.get(peer, float("inf")))
    return times


def ratio(
    ours: str, is_peer: Callable[[str], bool], case: str, subnet: str | None = None, **fields: Any
) -> Callable[[Rows], float | None]:
    """How many times quicker ours is than the best of some peers."""

    def value(rows: Rows) -> float | None:
        found = []
        for process in {row.get("process") for row in rows}:
            own = [row for row in rows if row.get("process") == process]
            times = times_ms(own, case, subnet, **fields)
            peers = [ms for name, ms in times.items() if is_peer(name)]
            if peers and ours in times:
                found.append(min(peers) / times[ours])
        return min(found, default=None)

    return value


def rate(
    case: str, subnet: str, sequences: int, ours: str = OURS
) -> Callable[[Rows], float | None]:
    """Sequences per second of ours."""

    def value(rows: Rows) -> float | None:
        ms = times_ms(rows, case, subnet).get(ours)
        return None if ms is None else sequences / ms * 1e3

    return value


def quickest(case: str, *names: str) -> Callable[[Rows], float | None]:
    """The least time of several ways of ours."""

    def value(rows: Rows) -> float | None:
        times = times_ms(rows, case)
        return min((times[name] for name in names if name in times), default=None)

    return value


def _ours_in_training(rows: Rows) -> float | None:
    found = [
        ratio(name, lambda peer: peer.startswith("sliced compiled"), "width_stage")(rows)
        for name in ("ours", "ours graph")
    ]
    known = [value for value in found if value is not None]
    return max(known, default=None)


def _compiled(name: str) -> bool:
    return name.startswith("P2")


def _eager(name: str) -> bool:
    return name.startswith("P1")


def _varlen(name: str) -> bool:
    return name.startswith("P4")


BATCH, TURNS = "batch128", "batch128_x100"
SHORT: dict[str, Any] = {"subnet": FULL, "clock": None}
TARGETS = (
    Target("(1, 1) 128 x 128, sequences/s, device", rate(BATCH, FULL, 128), 22_000, 28_000),
    Target("(1, 1) 128 x 128, sequences/s, 100 batches", rate(TURNS, FULL, 128), 22_000, 28_000),
    Target("  times compiled, device", ratio(OURS, _compiled, BATCH, FULL), 1.15, 1.3),
    Target("  times compiled, 100 batches", ratio(OURS, _compiled, TURNS, FULL), 1.15, 1.3),
    Target("  times eager, device", ratio(OURS, _eager, BATCH, FULL), 1.6),
    Target("  times eager, 100 batches", ratio(OURS, _eager, TURNS, FULL), 1.6),
    Target("(1/4, 1) 128 x 128, sequences/s, device", rate(BATCH, NARROW, 128), 75_000, 85_000),
    Target(
        "(1/4, 1) 128 x 128, sequences/s, 100 batches", rate(TURNS, NARROW, 128), 75_000, 85_000
    ),
    Target("  times compiled, device", ratio(OURS, _compiled, BATCH, NARROW), 1.4),
    Target("  times compiled, 100 batches", ratio(OURS, _compiled, TURNS, NARROW), 1.4),
    Target("cuda (1, 1) 128 x 128, sequences/s", rate(BATCH, FULL, 128, CUDA), 25_000),
    Target(
        "cuda (1, 1) 1 x 128, times compiled", ratio(CUDA, _compiled, "batch1", FULL, l2="warm"), 3
    ),
    Target(
        "  times eager, by the host's clock",
        ratio(CUDA, _eager, "batch1", FULL, l2="host"),
        25,
    ),
    Target(
        "short texts, times compiled padded to 128",
        ratio(OURS, _compiled, "short_texts", shape={"B": 128, "S": 128}, **SHORT),
        3.0,
    ),
    Target(
        "short texts, times varlen_attn in a graph of its lengths",
        ratio(OURS, _varlen, "short_texts", **SHORT),
        1.3,
    ),
    Target(
        "mixed widths 4 x 32, times compiled graphs in turn",
        ratio("ours graph, one call", _compiled, "mixed_widths"),
        1.5,
    ),
    Target(
        "width stage step, ms",
        quickest("width_stage", "ours", "ours graph"),
        18.0,
        14.0,
        at_most=True,
    ),
    Target("  times compiled loop", _ours_in_training, 1.5),
)


def _subnet_lines(rows: Rows, case: str, **fields: Any) -> list[dict[str, str]]:
    lines = []
    for subnet in dict.fromkeys(row["subnet"] for row in rows if row["case"] == case):
        times = times_ms(rows, case, subnet, **fields)
        peers = {name: ms for name, ms in times.items() if not name.startswith("ours")}
        if OURS not in times or not peers:
            continue
        best = min(peers, key=lambda name: peers[name])
        against = ratio(OURS, peers.__contains__, case, subnet, **fields)
        shares = [
            row["share_of_ceiling"]
            for row in rows
            if row["case"] == case and row["subnet"] == subnet and row.get("peer") == OURS
            if "share_of_ceiling" in row and all(row.get(n) == v for n, v in fields.items())
        ]
        lines.append(
            {
                "case": " ".join([case, *map(str, fields.values())]),
                "subnet": subnet,
                "ours graph, ms": f"{times[OURS]:.4f}",
                "ours eager, ms": f"{times['ours eager']:.4f}" if "ours eager" in times else "-",
                "best peer, ms": f"{peers[best]:.4f}",
                "": best,
                "ratio": f"{against(rows) or 0:.2f}",
                "share of bf16 ceiling": f"{median(shares):.1%}" if shares else "-",
            }
        )
    return lines


def report(rows: Rows) -> str:
    """Ratios to the best peer for each subnet, then the targets."""
    lines = [
        *_subnet_lines(rows, BATCH),
        *_subnet_lines(rows, TURNS),
        *_subnet_lines(rows, "batch1", l2="warm"),
        *_subnet_lines(rows, "batch1", l2="cold"),
    ]
    return "\n\n".join(
        format_table(entries, {name: _cell(name) for name in entries[0]})
        for entries in (lines, [target.line(rows) for target in TARGETS])
        if entries
    )


def _cell(name: str) -> Callable[[dict[str, str]], str]:
    return lambda entry: entry[name]
