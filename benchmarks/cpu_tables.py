"""Tables and a plot from the rows of `benchmarks.bench_model`, with ratios to the best peer.

    python -m benchmarks.cpu_tables benchmarks/results/cpu_latency.jsonl --plot docs/images/cpu.svg

Ratios compare rows of one group: the peers that took turns on one case in one dtype. Of groups of
the same setting the newest counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES, DTYPES
from benchmarks.peers import OWN, PEERS
from benchmarks.records import read_rows

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Group:
    """The rows of one group by peer; those without a timing have an ``error``.

    Attributes:
        case: Name of the case.
        dtype: Of the group.
        rows: By peer.
    """

    case: str
    dtype: str
    rows: Mapping[str, Row]

    @property
    def place(self) -> str:
        """Model and input: ``bert-base/1x128``."""
        return self.case.rpartition("/")[0]

    @property
    def subnet(self) -> str:
        """Name of the subnet."""
        return self.case.rpartition("/")[2]

    def median_ms(self, peer: str) -> float | None:
        """Median of a peer, or None if it was not timed."""
        value = self.rows.get(peer, {}).get("median_ms")
        return None if value is None else float(value)

    @property
    def best_peer(self) -> str | None:
        """The fastest that is not ours, or None if none was timed."""
        timed = [name for name in self.rows if name not in OWN and self.median_ms(name) is not None]
        return min(timed, key=lambda name: self.median_ms(name) or 0.0, default=None)

    def ratio(self, slower: str | None, faster: str) -> float | None:
        """How many times as long `slower` takes as `faster`; None if one was not timed."""
        numerator = None if slower is None else self.median_ms(slower)
        denominator = self.median_ms(faster)
        return None if numerator is None or denominator is None else numerator / denominator


def groups_of(rows: Sequence[Row]) -> list[Group]:
    """The newest group of each case and dtype, in the order of `benchmarks.cases`."""
    newest: dict[tuple[str, str], str] = {}
    members: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row.get("section") != "latency":
            continue
        key = (row["case"], row["dtype"])
        newest[key] = max(newest.get(key, ""), row["group"])
        members.setdefault(f"{row['group']} {key}", {})[row["peer"]] = row
    order = {name: number for number, name in enumerate(CASES)}
    keys = sorted(newest, key=lambda key: (order.get(key[0], len(order)), DTYPES.index(key[1])))
    return [Group(*key, members[f"{newest[key]} {key}"]) for key in keys]


def latency_table(groups: Sequence[Group]) -> str:
    """A Markdown table of one model and input: a line per subnet and dtype."""
    others = [name for name in PEERS if name not in OWN and any(name in g.rows for g in groups)]
    head = ["subnet", "dtype", "ours, ms", "of peak", "elastic", "best peer", "ratio", *others]
    lines = [head, ["---"] * len(head)]
    for group in groups:
        best = group.best_peer
        lines.append(
            [
                group.subnet,
                group.dtype,
                _milliseconds(group.rows.get("ours"), spread=True),
                _share(group.rows.get("ours")),
                _times(group.ratio("ours_extracted", "ours")),
                best or "-",
                _times(group.ratio(best, "ours")),
                *(_milliseconds(group.rows.get(name)) for name in others),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def scaling_table(rows: Sequence[Row]) -> str:
    """A Markdown table of our model's own costs: encoder, outside of it, switching."""
    newest: dict[tuple[str, ...], Row] = {}
    for row in rows:
        if row.get("section") == "own" and "error" not in row:
            key = (row["model"], row["shape"]["name"], row["dtype"], row["case"], row["subnet"])
            newest[key] = row
    head = ["model", "input", "dtype", "subnet", "encoder, ms", "times faster", "outside, us"]
    lines = [head, ["---"] * len(head)]
    notes = []
    largest: dict[tuple[str, ...], float] = {}
    for (model, shape, dtype, case, subnet), row in newest.items():
        if case == "switching":
            notes.append(
                f"Switching, {model} {shape} {dtype}: {row['switch_us']:.1f} us ({subnet})"
            )
            continue
        encoder = row["encoder"]["median_ms"]
        first = largest.setdefault((model, shape, dtype), encoder)
        lines.append(
            [
                model,
                shape,
                dtype,
                subnet,
                f"{encoder:.3f}",
                _times(first / encoder),
                f"{row['outside_us']:.0f}",
            ]
        )
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return table + "".join(f"\n\n{note}" for note in notes)


def _milliseconds(row: Row | None, *, spread: bool = False) -> str:
    if row is None:
        return "-"
    if "error" in row:
        return "none"
    text = f"{row['median_ms']:.2f}"
    return f"{text} ({row['p20_ms']:.2f}-{row['p80_ms']:.2f})" if spread else text


def _share(row: Row | None) -> str:
    share = None if row is None else row.get("share_of_peak")
    return "-" if share is None else f"{share:.0%}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def report(rows: Sequence[Row]) -> str:
    """Every table as one Markdown text, and why peers have no time.

    Raises:
        ValueError: There is no group.
    """
    groups = groups_of(rows)
    if not groups:
        raise ValueError(
            "cpu_tables: rows=none of section 'latency', expected at least one group. "
            "Run `python -m benchmarks.bench_model` first."
        )
    first = next(iter(groups[0].rows.values()))
    machine = first.get("machine", {})
    parts = [
        f"{machine.get('hardware', 'unknown CPU')}, {first['threads']} threads, torch "
        f"{machine.get('torch', '?')}, commit {first.get('commit', '?')}. Medians (p20-p80) of "
        "calls from token ids to last hidden state. `elastic`: the time of a dense copy of the "
        "subnet on our kernels over that of the full model at that subnet. `ratio`: the best "
        "peer's time over ours."
    ]
    peaks = {
        row["case"]: row["rate"] for row in rows if row.get("section") == "peak" and "rate" in row
    }
    if peaks:
        rates = ", ".join(f"{kind} {rate / 1e9:.0f}" for kind, rate in peaks.items())
        parts.append(f"Limits measured here, in units of 10^9 per second: {rates}.")
    for place in dict.fromkeys(group.place for group in groups):
        here = [group for group in groups if group.place == place]
        parts.append(f"### {place}\n\n{latency_table(here)}")
    own = scaling_table(rows)
    if own.count("\n") > 1:
        parts.append(f"### Our own costs\n\n{own}")
    reasons = {
        f"- {row['peer']} {row['dtype']}: {row['error'].splitlines()[0]}": None
        for group in groups
        for row in group.rows.values()
        if "error" in row
    }
    if reasons:
        parts.append("Without a time:\n\n" + "\n".join(reasons))
    return "\n\n".join(parts) + "\n"


def plot(groups: Sequence[Group], place: str, path: Path) -> None:
    """Bars of every peer at each subnet of one model and input, a panel per dtype.

    Raises:
        ValueError: Nothing of that place was timed.
    """
    shown = [group for group in groups if group.place == place]
    if not shown:
        places = ", ".join(dict.fromkeys(group.place for group in groups))
        raise ValueError(f"cpu_tables: place={place!r}, expected one of {places}.")
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    dtypes = [dtype for dtype in DTYPES if any(group.dtype == dtype for group in shown)]
    figure = Figure(figsize=(4.2 * len(dtypes), 4.0), layout="constrained")
    FigureCanvasSVG(figure)
    names = [name for name in PEERS if any(group.median_ms(name) is not None for group in shown)]
    for number, dtype in enumerate(dtypes):
        axes = figure.add_subplot(1, len(dtypes), number + 1)
        of_dtype = [group for group in shown if group.dtype == dtype]
        height = 0.8 / len(names)
        for rank, name in enumerate(names):
            bars = [
                (index + (rank + 0.5) * height - 0.4, group.rows[name])
                for index, group in enumerate(of_dtype)
                if group.median_ms(name) is not None
            ]
            medians = [row["median_ms"] for _, row in bars]
            axes.barh(
                [at for at, _ in bars],
                medians,
                height,
                label=name,
                color=f"C{rank}",
                xerr=[
                    [row["median_ms"] - row["p20_ms"] for _, row in bars],
                    [row["p80_ms"] - row["median_ms"] for _, row in bars],
                ],
                error_kw={"linewidth": 0.7},
            )
        axes.set_yticks(range(len(of_dtype)), [group.subnet for group in of_dtype])
        axes.invert_yaxis()
        axes.set_title(dtype)
        axes.set_xlabel("ms, median; whiskers p20 to p80")
        if number == len(dtypes) - 1:
            axes.legend(fontsize="small")
    figure.suptitle(place)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format=path.suffix.lstrip(".") or "svg")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, help="the tables as Markdown; default: print them")
    parser.add_argument("--plot", type=Path, help="SVG or PNG file")
    parser.add_argument("--place", default="bert-base/1x128", help="what to plot: MODEL/INPUT")
    options = parser.parse_args()
    rows = read_rows(options.results)
    try:
        text = report(rows)
        if options.plot is not None:
            plot(groups_of(rows), options.place, options.plot)
    except ValueError as error:
        parser.error(str(error))
    if options.out is None:
        print(text)
    else:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
