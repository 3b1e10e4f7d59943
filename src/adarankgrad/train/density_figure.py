"""The figure of validation loss and accuracy over density."""

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


def write_density_figure(run: RunRecord, result: dict[str, Any]) -> Path:
    """Write ``plots/sparsity.png`` of a run.

    Args:
        run: The run.
        result: The content of sparsity.json.
    """
    path = run.path / "plots" / "sparsity.png"
    path.parent.mkdir(exist_ok=True)
    figure = density_figure(run.method, result, caption_of(run))
    write_atomic(path, to_png(figure, caption_of(run)))
    return path


def density_figure(
    method: str, result: dict[str, Any], caption: str, theme: Theme = LIGHT
) -> Figure:
    """Draw loss and accuracy over density, on a log axis of density."""
    figure = new_figure(5.6, theme)
    upper, lower = figure.subplots(2, 1, sharex=True)
    points = result["points"]
    densities = [point["density"] for point in points]
    for axes, name, label in (
        (upper, "val_loss", "validation loss\n(nats per token)"),
        (lower, "accuracy", "share of tokens\npredicted"),
    ):
        style_axes(axes, theme, title="Pruned without retraining" if axes is upper else "")
        values = [point[name] for point in points]
        axes.plot(densities, values, color=method_colour(method), marker="o", markersize=4)
        axes.set_ylabel(label)
    lower.set_xscale("log")
    lower.set_xlabel(f"weights kept ({result['scope']})")
    lower.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    lower.xaxis.set_minor_formatter(NullFormatter())
    add_caption(figure, caption, theme)
    return figure
