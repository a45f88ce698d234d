"""Draw scores against latencies with their Pareto front, as a PNG. Needs matplotlib, imported when
a plot is asked for."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynabert.json_file import write_bytes
from dynabert.picking import pareto_front

# Okabe and Ito's colours, told apart by colour-blind readers too; shapes repeat the distinction in
# print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_FRONT_COLOUR = "#444444"
_LABEL_POINTS = 8.5
_DPI = 150


@dataclass(frozen=True)
class PlotPoint:
    """One subnet in the plot.

    Attributes:
        label: Short text beside the point.
        group: Text of its entry in the legend; points of one group share colour and shape.
        x: Position across.
        x_range: Ends of the bar drawn through the point, None for no bar.
        y: Position upwards.
    """

    label: str
    group: str
    x: float
    x_range: tuple[float, float] | None
    y: float


def draw_pareto(
    points: Sequence[PlotPoint],
    path: Path | str,
    *,
    title: str,
    x_label: str,
    y_label: str,
    front_label: str,
) -> None:
    """Draw the points, their labels and the front as a PNG; low x and high y are good.

    Args:
        points: What to draw, at least one.
        path: File to write; replaced only once the picture is whole.
        title: Above the picture; may have several lines.
        x_label: Name and unit of the axis across.
        y_label: Name and unit of the axis upwards.
        front_label: The front's entry in the legend.

    Raises:
        ImportError: matplotlib is not installed; the message names the extra that brings it.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plot_pareto: matplotlib is not installed, and the plot needs it. "
            'Install it with `pip install "dynabert-kernels[train]"`.'
        ) from error

    # A Figure of its own, not pyplot: no global state, no display, and several threads may draw.
    figure = Figure(figsize=(9.0, 5.6), dpi=_DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    front = [points[index] for index in pareto_front([(p.x, p.y) for p in points])]
    axes.plot(
        [p.x for p in front],
        [p.y for p in front],
        color=_FRONT_COLOUR,
        linewidth=1.2,
        label=front_label,
        zorder=1,
    )
    for group, colour, marker in zip(
        dict.fromkeys(p.group for p in points),
        itertools.cycle(_COLOURS),
        itertools.cycle(_MARKERS),
        strict=False,
    ):
        members = [p for p in points if p.group == group]
        axes.scatter(
            [p.x for p in members],
            [p.y for p in members],
            color=colour,
            marker=marker,
            s=42,
            label=group,
            zorder=3,
        )
        for p in members:
            if p.x_range is not None:
                axes.hlines(p.y, *p.x_range, color=colour, linewidth=1.0, alpha=0.6, zorder=2)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.margins(x=0.09, y=0.11)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=8.5, frameon=False, loc="outside lower center", ncols=6)
    _place_labels(canvas, axes, points, front)
    picture = io.BytesIO()
    canvas.print_png(picture)
    write_bytes(path, picture.getvalue())


@dataclass(frozen=True)
class _Box:
    """A rectangle in pixels."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: _Box) -> float:
        wide = min(self.right, other.right) - max(self.left, other.left)
        high = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(wide, 0.0) * max(high, 0.0)

    def holds(self, x: float, y: float) -> bool:
        return self.left <= x <= self.right and self.bottom <= y <= self.top

    def outside(self, frame: _Box) -> float:
        area = (self.right - self.left) * (self.top - self.bottom)
        return area - self.overlap(frame)


def _place_labels(
    canvas: Any, axes: Any, points: Sequence[PlotPoint], front: Sequence[PlotPoint]
) -> None:
    """Put each label near its point where it covers least: no other label, point or line.

    Candidate places are a ring of directions at growing distances; a place pays for what it covers
    and, a little, for its distance. Labels of crowded points choose first.
    """
    canvas.draw()
    axes.figure.set_layout_engine("none")  # the labels must not move what they were placed against
    renderer = canvas.get_renderer()
    pixel = _DPI / 72
    to_pixels = axes.transData.transform
    where = [tuple(to_pixels((p.x, p.y))) for p in points]
    marks = [_Box(x - 5 * pixel, y - 5 * pixel, x + 5 * pixel, y + 5 * pixel) for x, y in where]
    frame = _box_of(axes.get_window_extent(renderer))
    taken = list(marks)
    lines = [[(p.x, p.y) for p in front]]
    lines += [[(x, p.y) for x in p.x_range] for p in points if p.x_range is not None]
    dots = [
        dot
        for line in lines
        for dot in _samples([tuple(to_pixels(corner)) for corner in line], step=3 * pixel)
    ]

    def crowding(index: int) -> float:
        return -sum(1 / (1 + math.dist(where[index], other)) for other in where)

    for index in sorted(range(len(points)), key=crowding):
        x, y = where[index]
        text = axes.text(0, 0, points[index].label, fontsize=_LABEL_POINTS)
        extent = text.get_window_extent(renderer)
        text.remove()
        best = min(
            _candidates(x, y, extent.width, extent.height, pixel),
            key=lambda place: (
                500 * sum(place[1].overlap(box) for box in taken if box is not marks[index])
                + 12 * pixel * sum(place[1].holds(*dot) for dot in dots)
                + 10 * place[1].outside(frame)
                + 0.5 * place[0] ** 2
            ),
        )
        distance, box = best
        taken.append(box)
        axes.annotate(
            points[index].label,
            xy=(x, y),
            xycoords="figure pixels",
            xytext=(box.left, box.bottom),
            textcoords="figure pixels",
            fontsize=_LABEL_POINTS,
            va="bottom",
            ha="left",
            annotation_clip=False,
            arrowprops=(
                {"arrowstyle": "-", "color": "#999999", "linewidth": 0.6, "shrinkB": 4}
                if distance > 14 * pixel
                else None
            ),
            zorder=4,
        )


def _box_of(extent: Any) -> _Box:
    return _Box(extent.x0, extent.y0, extent.x1, extent.y1)


def _candidates(
    x: float, y: float, width: float, height: float, pixel: float
) -> list[tuple[float, _Box]]:
    """Boxes around (x, y) and their distance from it, in pixels: 16 directions, 5 distances."""
    places = []
    for distance in (8 * pixel, 13 * pixel, 22 * pixel, 34 * pixel, 50 * pixel):
        for step in range(16):
            angle = 2 * math.pi * step / 16 + math.pi / 2  # above first
            across, up = math.cos(angle), math.sin(angle)
            left = x + distance * across + (across - 1) / 2 * width
            bottom = y + distance * up + (up - 1) / 2 * height
            places.append((distance, _Box(left, bottom, left + width, bottom + height)))
    return places


def _samples(corners: Sequence[tuple[float, float]], step: float) -> list[tuple[float, float]]:
    """Points along a line of straight pieces, `step` apart."""
    dots = []
    for (x0, y0), (x1, y1) in itertools.pairwise(corners):
        count = max(1, int(math.dist((x0, y0), (x1, y1)) / step))
        dots += [(x0 + (x1 - x0) * i / count, y0 + (y1 - y0) * i / count) for i in range(count + 1)]
    return dots
