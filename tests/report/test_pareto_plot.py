"""Labels of a crowded plot: all there, near their points, none on another."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.text import Annotation

from dynabert.pareto_plot import PlotPoint, draw_pareto

SPREAD_MS = [22.0, 17.0, 11.8, 6.9, 14.9, 11.6, 8.0, 4.8, 11.3, 8.7, 6.1, 3.7]
SPREAD = [88.2, 88.3, 87.0, 86.5, 86.5, 86.7, 86.0, 83.8, 85.6, 84.3, 83.7, 80.9]
CROWD_MS = [22.0, 21.0, 20.5, 20.0, 21.0, 20.5, 20.0, 19.5, 20.5, 20.0, 19.8, 19.6]
CROWD = [88.2, 88.2, 88.1, 88.0, 88.2, 88.15, 88.2, 88.0, 88.1, 88.1, 88.1, 88.0]


def drawn(
    path: Path, times: list[float], scores: list[float], monkeypatch: pytest.MonkeyPatch
) -> list[tuple[Annotation, Any]]:
    """Annotations of the plot with their boxes in pixels."""
    made: list[Annotation] = []
    annotate = Axes.annotate

    def keep(self: Axes, *args: Any, **kwargs: Any) -> Annotation:
        made.append(annotate(self, *args, **kwargs))
        return made[-1]

    monkeypatch.setattr(Axes, "annotate", keep)
    cells = itertools.product(("1", "2/3", "0.5"), ("1", "0.75", "0.5", "0.25"))
    points = [
        PlotPoint(f"({width}, {depth})", f"depth {depth}", x, (0.98 * x, 1.03 * x), y)
        for (depth, width), x, y in zip(cells, times, scores, strict=False)
    ]
    draw_pareto(points, path, title="t", x_label="ms", y_label="%", front_label="front")
    # The text alone, without the thin line to its point.
    return [(note, super(Annotation, note).get_window_extent()) for note in made]


@pytest.mark.parametrize(
    ("times", "scores"),
    [
        (SPREAD_MS, SPREAD),
        (CROWD_MS, CROWD),
        (SPREAD_MS, [50.0] * 12),
        ([5.0] * 12, [50.0] * 12),
        ([5.0], [50.0]),
    ],
    ids=["spread", "crowded", "one-score", "one-point", "single"],
)
def test_labels_do_not_cover_each_other(
    tmp_path: Path, times: list[float], scores: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = drawn(tmp_path / "a.png", times, scores, monkeypatch)
    assert len({note.get_text() for note, _ in notes}) == len(times)
    for (_, one), (_, other) in itertools.combinations(notes, 2):
        wide = min(one.x1, other.x1) - max(one.x0, other.x0)
        high = min(one.y1, other.y1) - max(one.y0, other.y0)
        assert min(wide, high) <= 1.0  # pixels
    for note, box in notes:
        x, y = note.xy
        beside = math.dist((x, y), (min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1)))
        assert beside < 120  # pixels, of 1,350 across
