"""One look for every figure: light and dark themes, one colour per method, captions.

Figures are built with matplotlib's object interface, so nothing here touches pyplot's
global state and training can draw them in any thread or process.
"""

from __future__ import annotations

import io
import textwrap
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from adarankgrad.train.units import format_count

METHOD_COLOURS = {
    "AdaRankGrad": "#3b82f6",
    "AdaRankGrad (low memory)": "#1d4ed8",
    "AdaRankGrad (published)": "#6f7bd9",
    "AdamW": "#ea7317",
    "GaLore": "#22a06b",
    "Fira": "#a855f7",
    "Muon": "#e5484d",
    "Apollo": "#0d9aa8",
    "SaRA": "#d6409f",
    "SoRA": "#8d6e63",
    "PRILoRA": "#93a01c",
    "SGD": "#7a8699",
    "Orthogonalized SGD": "#4f7a6b",
    "AdaGradNorm": "#62b6d6",
}
"""Chosen to be told apart on white and on near-black paper."""

FIGURE_WIDTH_IN = 6.4
DOTS_PER_INCH = 170
CAPTION_LINES = 3


@dataclass(frozen=True)
class Theme:
    """The colours of a figure that do not stand for a method."""

    paper: str
    ink: str
    muted: str
    grid: str
    weights: str
    gradients: str
    rest: str


LIGHT = Theme("#ffffff", "#1b1f27", "#5b6472", "#e3e7ee", "#3f4b5e", "#8b97a8", "#d5dae2")
DARK = Theme("#171a21", "#e8ebf0", "#a2abba", "#2b303b", "#c3ccda", "#7b8798", "#3a4150")


def method_colour(method: str) -> str:
    """Return the colour of a method, the same in every figure of every run."""
    own = _fixed_colour(method)
    return _PALETTE[zlib.crc32(method.encode()) % len(_PALETTE)] if own is None else own


def distinct_colours(methods: Sequence[str]) -> list[str]:
    """Return a colour for each method, all different while there are enough.

    Methods with a fixed colour get it first, so that none of the others takes it.
    """
    chosen: dict[int, str] = {}
    for index, method in enumerate(methods):
        own = _fixed_colour(method)
        if own is not None and own not in chosen.values():
            chosen[index] = own
    for index, method in enumerate(methods):
        if index not in chosen:
            wanted = [method_colour(method), *_PALETTE]
            chosen[index] = next((c for c in wanted if c not in chosen.values()), wanted[0])
    return [chosen[index] for index in range(len(methods))]


def _fixed_colour(method: str) -> str | None:
    return _COLOUR_OF_KEY.get(_key(method))


def _key(method: str) -> str:
    """Return what the spellings of a name share, as APOLLO and Apollo do."""
    return "".join(letter for letter in method.lower() if letter.isalnum())


_PALETTE = list(METHOD_COLOURS.values())
_COLOUR_OF_KEY = {_key(name): colour for name, colour in METHOD_COLOURS.items()}


def new_figure(height_in: float, theme: Theme) -> Figure:
    """Return an empty figure of the common width that draws itself with Agg."""
    figure = Figure(
        figsize=(FIGURE_WIDTH_IN, height_in),
        dpi=DOTS_PER_INCH,
        facecolor=theme.paper,
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    return figure


def style_axes(axes: Axes, theme: Theme, *, title: str = "", grid: str | None = "y") -> None:
    """Give axes the common look: quiet frame, readable text, grid behind the data.

    Args:
        axes: Modified in place.
        theme: Light or dark.
        title: Put above the axes, to the left.
        grid: Which grid lines to draw: ``"x"``, ``"y"`` or None.
    """
    axes.set_facecolor(theme.paper)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.muted, labelsize=10, length=3, which="both")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.muted)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(theme.ink)
        label.set_fontsize(11)
    if title:
        axes.set_title(title, loc="left", fontsize=12.5, color=theme.ink, fontweight="bold", pad=9)
    if grid == "x":
        axes.grid(axis="x", color=theme.grid, linewidth=0.8)
    elif grid == "y":
        axes.grid(axis="y", which="both", color=theme.grid, linewidth=0.8)


def use_count_axis(axes: Axes, label: str) -> None:
    """Label the x axis with counts such as ``1.2 M``."""
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short_count(value)))


def add_legend(owner: Axes | Figure, theme: Theme, **options: Any) -> None:
    """Add a frameless legend in the theme's ink to axes or, with handles, to a whole figure."""
    owner.legend(frameon=False, fontsize=10, labelcolor=theme.ink, **options)


def add_common_legend(figure: Figure, theme: Theme, *, ncols: int) -> None:
    """Explain every part once, above all axes; without any part there is no legend."""
    handles: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    if handles:
        add_legend(
            figure,
            theme,
            handles=list(handles.values()),
            labels=list(handles),
            loc="outside upper left",
            ncols=ncols,
        )


def add_caption(figure: Figure, text: str, theme: Theme) -> None:
    """Write the caption (what made this figure) below the axes, in at most three lines."""
    lines = textwrap.wrap(text, width=96, break_long_words=True, break_on_hyphens=False)
    if len(lines) > CAPTION_LINES:
        lines = [*lines[: CAPTION_LINES - 1], lines[CAPTION_LINES - 1][:92] + " ..."]
    figure.supxlabel(
        "\n".join(lines),
        x=0.015,
        ha="left",
        fontsize=7,
        color=theme.muted,
        family="monospace",
        parse_math=False,
    )


def caption_from(commits: Iterable[str], text: str) -> str:
    """Return a caption that begins with the commits, where known, so that no cut loses them."""
    known = sorted({commit[:12] for commit in commits if commit})
    return f"commit {', '.join(known)}: {text}" if known else text


def to_png(figure: Figure, description: str) -> bytes:
    """Render a figure; ``description`` goes into the file's metadata."""
    buffer = io.BytesIO()
    plain_text = description.encode("ascii", "backslashreplace").decode("ascii")
    figure.savefig(
        buffer, format="png", facecolor=figure.get_facecolor(), metadata={"Description": plain_text}
    )
    return buffer.getvalue()


def _short_count(value: float) -> str:
    text = format_count(round(value))
    number, _, unit = text.partition(" ")
    short = number.rstrip("0").rstrip(".") if "." in number else number
    return f"{short} {unit}".rstrip()
