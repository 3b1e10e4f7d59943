"""The figure of validation loss and metric over density."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from adarankgrad.train.figure_style import (
    LIGHT,
    Theme,
    add_caption,
    method_colour,
    new_figure,
    style_axes,
    to_png,
)
from adarankgrad.train.files import write_atomic
from adarankgrad.train.plots import caption_of
from adarankgrad.train.record import RunRecord


def write_density_figure(run: RunRecord, result: dict[str, Any], loss_label: str) -> Path:
    """Write ``plots/sparsity.png`` of a run.

    Args:
        run: The run.
        result: The content of sparsity.json.
        loss_label: Of the axis of the loss.
    """
    path = run.path / "plots" / "sparsity.png"
    path.parent.mkdir(exist_ok=True)
    figure = density_figure(run.method, result, loss_label, caption_of(run))
    write_atomic(path, to_png(figure, caption_of(run)))
    return path


def density_figure(
    method: str, result: dict[str, Any], loss_label: str, caption: str, theme: Theme = LIGHT
) -> Figure:
    """Draw loss, and the metric where that is another, over density on a log axis."""
    drawn = {"val_loss": loss_label}
    if result["metric"] != "loss":
        drawn[result["metric"]] = f"validation {result['metric']}"
    figure = new_figure(2.8 * len(drawn), theme)
    panels = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0]
    points = result["points"]
    densities = [point["density"] for point in points]
    for axes, (name, label) in zip(panels, drawn.items(), strict=True):
        style_axes(axes, theme, title="Pruned without retraining" if name == "val_loss" else "")
        values = [point[name] for point in points]
        axes.plot(densities, values, color=method_colour(method), marker="o", markersize=4)
        axes.set_ylabel(label)
    lowest = panels[-1]
    lowest.set_xscale("log")
    lowest.set_xlabel(f"weights kept ({result['scope']})")
    lowest.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    lowest.xaxis.set_minor_formatter(NullFormatter())
    add_caption(figure, caption, theme)
    return figure
