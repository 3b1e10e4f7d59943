"""The figure of what a task is judged by, beside its loss."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from adarankgrad.train.figure_style import (
    LIGHT,
    Theme,
    add_caption,
    add_legend,
    method_colour,
    new_figure,
    style_axes,
)
from adarankgrad.train.figures import LINE_STYLES
from adarankgrad.train.record import RunRecord


def metric_figure(run: RunRecord, caption: str, theme: Theme = LIGHT) -> Figure:
    """Draw the metrics of validation over steps, and where the delivered model was.

    Args:
        run: Of a task with `RunRecord.task_metrics`; the first of them is drawn as a thick line.
        caption: Shown under the axes.
        theme: Light or dark.
    """
    figure = new_figure(4.3, theme)
    axes = figure.add_subplot()
    style_axes(axes, theme, title="Metrics of validation")
    steps = [row["step"] for row in run.evals]
    for place, name in enumerate(run.task_metrics):
        is_first = place == 0
        axes.plot(
            steps,
            [row[name] for row in run.evals],
            color=method_colour(run.method) if is_first else theme.muted,
            linestyle=LINE_STYLES[place % len(LINE_STYLES)],
            linewidth=2 if is_first else 1.3,
            marker="o",
            markersize=4.5 if is_first else 3,
            label=name.replace("_", " "),
            zorder=3 if is_first else 2,
        )
    axes.axvline(run.summary["best_step"], color=theme.ink, linewidth=0.9, alpha=0.5)
    axes.set_xlabel("step (line: of the model that was kept)")
    axes.set_ylabel("value at evaluation")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    add_legend(axes, theme)
    add_caption(figure, caption, theme)
    return figure
