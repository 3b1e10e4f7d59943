"""Names beside points, where they cover neither another name nor a point nor its error bar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from adarankgrad.train.figure_style import Theme

# In points.
_SIDE_GAP, _STEP, _MOST_STEPS = 8.0, 3.0, 30
_POINT_RADIUS, _CLEARANCE = 4.5, 1.5
_SIDES: tuple[Literal["left"], Literal["right"]] = ("left", "right")
_LEADER_FROM = 12.0
"""Height difference from which a thin line leads from a name to its point."""


@dataclass(frozen=True)
class LabelledPoint:
    """A point, its error bar and its name, in the units of the axes."""

    label: str
    x: float
    y: float
    low: float
    high: float


def label_apart(axes: Axes, points: Sequence[LabelledPoint], theme: Theme) -> None:
    """Write each point's name beside it, at the nearest height where nothing is in the way.

    Args:
        axes: With all points, of a figure that was drawn once, so that its layout is fixed; names
            are kept out of the layout.
        points: What to name.
        theme: Light or dark.
    """
    taken = [_marks(axes, point) for point in points]
    for point in sorted(points, key=lambda point: point.y):
        note = axes.annotate(
            point.label,
            (point.x, point.y),
            xytext=(_SIDE_GAP, 0),
            textcoords="offset points",
            va="center",
            fontsize=9.5,
            color=theme.ink,
            arrowprops={"arrowstyle": "-", "linewidth": 0.6, "color": theme.muted, "shrinkB": 5},
        )
        note.set_in_layout(False)
        taken.append(_place(axes, note, taken))


def _place(axes: Axes, note: Annotation, taken: list[Bbox]) -> Bbox:
    """Move a name to the first free place, or leave it beside its point if there is none."""
    inside = axes.get_window_extent()
    for shift in sorted((i * _STEP for i in range(-_MOST_STEPS, _MOST_STEPS + 1)), key=abs):
        for side in _SIDES:
            box = _put(note, side, shift)
            is_inside = inside.x0 <= box.x0 and box.x1 <= inside.x1
            is_inside = is_inside and inside.y0 <= box.y0 and box.y1 <= inside.y1
            if is_inside and not any(box.overlaps(other) for other in taken):
                return box
    return _put(note, "left", 0.0)


def _put(note: Annotation, side: Literal["left", "right"], shift: float) -> Bbox:
    """Put a name right of its point (its ``left`` side there) or left of it; return its box."""
    note.set_horizontalalignment(side)
    note.set_position((_SIDE_GAP if side == "left" else -_SIDE_GAP, shift))
    assert note.arrow_patch is not None
    note.arrow_patch.set_visible(abs(shift) >= _LEADER_FROM)
    note.get_window_extent()  # moves it
    return Text.get_window_extent(note).padded(_CLEARANCE)


def _marks(axes: Axes, point: LabelledPoint) -> Bbox:
    """Return the box, in pixels, of a point with its error bar."""
    low, middle, high = (
        axes.transData.transform((point.x, y)) for y in (point.low, point.y, point.high)
    )
    radius = _POINT_RADIUS * axes.figure.dpi / 72
    return Bbox.from_extents(
        middle[0] - radius,
        min(low[1], middle[1] - radius),
        middle[0] + radius,
        max(high[1], middle[1] + radius),
    )
