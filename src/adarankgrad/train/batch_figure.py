"""The figure of a batch that grows: its size beside the noise scale of its gradient."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from adarankgrad.train.figure_style import (
    LIGHT,
    Theme,
    add_caption,
    add_legend,
    method_colour,
    new_figure,
    style_axes,
    use_count_axis,
)
from adarankgrad.train.record import RunRecord


def batch_figure(run: RunRecord, caption: str, theme: Theme = LIGHT) -> Figure:
    """Draw batch size and gradient noise scale, both in samples, over the tokens seen.

    Args:
        run: Of ``--adadagrad``.
        caption: Shown under the axes.
        theme: Light or dark.
    """
    figure = new_figure(3.8, theme)
    axes = figure.add_subplot()
    style_axes(axes, theme, title="Batch size and gradient noise scale")
    tokens = [row["tokens"] for row in run.train]
    axes.step(
        tokens,
        [row["batch_size"] for row in run.train],
        where="pre",
        color=method_colour(run.method),
        linewidth=2,
        label="batch size",
        zorder=3,
    )
    measured = [row for row in run.train if row.get("noise_scale") is not None]
    axes.plot(
        [row["tokens"] for row in measured],
        [row["noise_scale"] for row in measured],
        color=theme.muted,
        linestyle="",
        marker="o",
        markersize=3.5,
        alpha=0.7,
        label="noise scale",
        zorder=2,
    )
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("samples")
    use_count_axis(axes, "training tokens")
    axes.set_xlim(left=0)
    add_legend(axes, theme)
    add_caption(figure, caption, theme)
    return figure
