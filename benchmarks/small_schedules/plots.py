"""A plot for each part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes

from adarankgrad.train.figure_style import (
    LIGHT,
    add_caption,
    add_legend,
    caption_from,
    distinct_colours,
    new_figure,
    style_axes,
    to_png,
)

_HEIGHT_IN = 4.0


def draw(part: str, result: dict[str, Any], command: str) -> bytes:
    """Draw a part; return the PNG."""
    panels = _PANELS[part]
    figure = new_figure(_HEIGHT_IN * len(panels), LIGHT)
    for axes, panel in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        panel(axes, result["methods"])
    caption = caption_from(result["commits"], command)
    add_caption(figure, caption, LIGHT)
    return to_png(figure, caption)


def _accuracy_over_density(axes: Axes, methods: dict[str, Any]) -> None:
    style_axes(axes, LIGHT, title="Test accuracy after pruning, without retraining")
    for (label, method), colour in _coloured(methods):
        curve = {float(density): each for density, each in method["accuracy"].items()}
        medians = [each["median"] for each in curve.values()]
        low, high = zip(*(each["spread"] for each in curve.values()), strict=True)
        densities = [100 * density for density in curve]
        axes.plot(densities, medians, "o-", color=colour, markersize=4, label=label)
        axes.fill_between(densities, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xscale("log")
    axes.set_xlabel("weights kept (%)")
    axes.set_ylabel("accuracy")
    add_legend(axes, LIGHT)


def _loss_over(key: str, label: str, unit: float = 1.0) -> Callable[[Axes, dict[str, Any]], None]:
    """Return a panel of the validation loss over something, a line a seed."""

    def panel(axes: Axes, methods: dict[str, Any]) -> None:
        _lines(axes, methods, key, "val_loss", unit)
        style_axes(axes, LIGHT, title=f"Validation loss over {label.partition(' (')[0]}")
        losses = [row["val_loss"] for m in methods.values() for rows in m["curves"] for row in rows]
        late = [rows[len(rows) // 4]["val_loss"] for m in methods.values() for rows in m["curves"]]
        axes.set_ylim(min(losses) - 0.05, max(late) + 0.05)
        axes.set_xlabel(label)
        axes.set_ylabel("nats a token")
        add_legend(axes, LIGHT)

    return panel


def _batch_over_samples(axes: Axes, methods: dict[str, Any]) -> None:
    _lines(axes, methods, "samples", "batch_size", 1.0)
    style_axes(axes, LIGHT, title="Batch size")
    axes.set_xlabel("samples")
    axes.set_ylabel("samples a step")


def _last_losses(axes: Axes, methods: dict[str, Any]) -> None:
    style_axes(axes, LIGHT, title="Last validation loss at the weights", grid="x")
    for place, ((_, method), colour) in enumerate(_coloured(methods)):
        losses = method["val_loss"]
        axes.plot(losses["seeds"], [place] * len(losses["seeds"]), "o", color=colour, alpha=0.6)
        axes.plot([losses["median"]] * 2, [place - 0.35, place + 0.35], color=colour, lw=2.2)
    axes.set_yticks(range(len(methods)), list(methods))
    axes.invert_yaxis()
    axes.set_xlabel("nats a token")


def _lines(axes: Axes, methods: dict[str, Any], x: str, y: str, unit: float) -> None:
    for (label, method), colour in _coloured(methods):
        for number, rows in enumerate(method["curves"]):
            axes.plot(
                [row[x] / unit for row in rows],
                [row[y] for row in rows],
                color=colour,
                linewidth=1.4,
                alpha=0.8,
                label=label if number == 0 else None,
            )


def _coloured(methods: dict[str, Any]) -> list[tuple[tuple[str, Any], str]]:
    return list(zip(methods.items(), distinct_colours(list(methods)), strict=True))


_PANELS: dict[str, Sequence[Callable[[Axes, dict[str, Any]], None]]] = {
    "powerprop": [_accuracy_over_density],
    "adadagrad": [
        _loss_over("step", "optimizer steps"),
        _loss_over("samples", "samples"),
        _batch_over_samples,
    ],
    "progressive_depth": [_loss_over("flops", "operations of training (10¹²)", 1e12)],
    "extrapolation": [_last_losses],
}
