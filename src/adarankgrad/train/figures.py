"""The figures of runs: loss, ranks, memory. Each function draws one figure and writes nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from adarankgrad.train.figure_style import (
    LIGHT,
    Theme,
    add_caption,
    add_common_legend,
    add_legend,
    method_colour,
    new_figure,
    style_axes,
    use_count_axis,
)
from adarankgrad.train.memory_split import MemorySplit
from adarankgrad.train.record import RunRecord, short_layer_names
from adarankgrad.train.units import format_bytes

MIN_STEPS_TO_SMOOTH = 24
LINE_STYLES = ("-", "--", ":", "-.")


LOSS_AXES = {"tokens": "training tokens", "training_flops": "floating-point operations"}
"""What a loss can be drawn over: names in metrics.jsonl, and their labels."""


def loss_figure(
    runs: dict[str, RunRecord], caption: str, theme: Theme = LIGHT, *, over: str = "tokens"
) -> Figure:
    """Draw training and validation loss over tokens or operations, of one run or of several.

    Args:
        runs: Label to run; runs of one method share its colour and differ in line style.
        caption: Shown under the axes.
        theme: Light or dark.
        over: One of `LOSS_AXES`.
    """
    figure = new_figure(4.3, theme)
    axes = figure.add_subplot()
    style_axes(axes, theme, title="Loss")
    styles = {method: cycle(LINE_STYLES) for method in {run.method for run in runs.values()}}
    for label, run in runs.items():
        prefix = "" if len(runs) == 1 else f"{label}, "
        _draw_losses(axes, run, prefix, next(styles[run.method]), over)
    is_per_token = all(run.summary.get("perplexity") is not None for run in runs.values())
    _use_loss_axis(axes, "loss (nats per token)" if is_per_token else "loss")
    use_count_axis(axes, LOSS_AXES[over])
    axes.set_xlim(left=0)
    if axes.get_legend_handles_labels()[0]:
        add_legend(axes, theme)
    add_caption(figure, caption, theme)
    return figure


def ranks_figure(run: RunRecord, caption: str, theme: Theme = LIGHT) -> Figure:
    """Draw the rank of every projected matrix at every logged step as a heat map."""
    names = [layer["name"] for layer in run.layers]
    labels = short_layer_names(names)
    figure = new_figure(min(10.5, max(3.6, 1.9 + 0.185 * len(names))), theme)
    axes = figure.add_subplot()
    style_axes(axes, theme, title="Rank of each weight's basis", grid=None)
    steps, ranks = _rank_matrix(run, names)
    ceiling = max((layer["max_rank"] for layer in run.layers), default=1)
    mesh = axes.pcolormesh(
        _edges(steps), np.arange(len(names) + 1), ranks, cmap="viridis", vmin=0, vmax=ceiling
    )
    axes.invert_yaxis()
    _label_layers(axes, labels)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, aspect=30)
    bar.ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    bar.ax.tick_params(colors=theme.muted, labelsize=10)
    bar.outline.set_visible(False)
    bar.set_label(f"rank (ceiling {ceiling})", color=theme.ink, fontsize=11)
    add_caption(figure, caption, theme)
    return figure


def memory_figure(runs: dict[str, RunRecord], caption: str, theme: Theme = LIGHT) -> Figure:
    """Draw where the memory goes: what training holds per weight, and the whole peak.

    The upper axes compare weights, gradients and optimizer state, for a single run also with
    the state AdamW would hold for the same projected weights. The lower axes show them inside
    the measured peak, where activations and, on CPU, the process itself can dwarf them.
    """
    # Beside others, a run without projection shows the state that projecting would save.
    splits = {
        label: MemorySplit.of(run, is_divided=run.projects or len(runs) > 1)
        for label, run in runs.items()
    }
    held = list(splits.items())
    if len(runs) == 1:
        ((label, split),) = splits.items()
        if split.method != "AdamW" and split.adamw_projected:
            held.append(("with AdamW's\nstate instead", split.with_adamw_state()))
    figure = new_figure(2.75 + 0.48 * (len(held) + len(splits)), theme)
    ratios = [len(held) + 0.6, len(splits) + 0.6]
    upper, lower = figure.subplots(2, 1, height_ratios=ratios)
    style_axes(upper, theme, title="Held between steps", grid="x")
    _draw_split(upper, held, theme, with_rest=False)
    style_axes(lower, theme, title=f"At the peak ({_peak_sources(runs)})", grid="x")
    _draw_split(lower, list(splits.items()), theme, with_rest=True)
    add_common_legend(figure, theme, ncols=2)
    add_caption(figure, caption, theme)
    return figure


def _draw_losses(axes: Axes, run: RunRecord, prefix: str, line_style: str, over: str) -> None:
    colour = method_colour(run.method)
    positions = [row[over] for row in run.train]
    losses = [row["loss"] for row in run.train]
    train_label = f"{prefix}training"
    if len(losses) >= MIN_STEPS_TO_SMOOTH:
        axes.plot(positions, losses, color=colour, alpha=0.22, linewidth=0.8, zorder=2)
        losses = _smooth(losses)
        train_label = f"{prefix}training (smoothed)"
    axes.plot(
        positions,
        losses,
        color=colour,
        alpha=0.6,
        linewidth=1.3,
        linestyle=line_style,
        label=train_label,
        zorder=3,
    )
    if run.evals:
        axes.plot(
            [row[over] for row in run.evals],
            [row["val_loss"] for row in run.evals],
            color=colour,
            linewidth=2,
            linestyle=line_style,
            marker="o",
            markersize=4.5,
            label=f"{prefix}validation",
            zorder=4,
        )


def _smooth(losses: Sequence[float]) -> list[float]:
    """Average over a centred window of about a twentieth of the run, smaller at the ends."""
    values = np.asarray(losses, dtype=float)
    reach = max(1, len(values) // 40)
    return [float(np.mean(values[max(0, i - reach) : i + reach + 1])) for i in range(len(values))]


def _use_loss_axis(axes: Axes, label: str) -> None:
    """Use a log axis with plain labels, dense enough for the short range that losses cover."""
    axes.set_ylabel(label)
    drawn = [
        value
        for line in axes.get_lines()
        for value in np.asarray(line.get_ydata(), dtype=float)
        if math.isfinite(value)
    ]
    if not drawn or min(drawn) <= 0:
        return
    axes.set_yscale("log")
    axes.set_ylim(min(drawn) * 0.96, max(drawn) * 1.03)
    axes.yaxis.set_major_locator(LogLocator(subs=_log_ticks(min(drawn), max(drawn))))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()


def _log_ticks(low: float, high: float) -> tuple[float, ...]:
    ratio = high / low
    if ratio < 1.6:
        return tuple(tick / 10 for tick in range(10, 100, 2))
    if ratio < 4:
        return tuple(tick / 10 for tick in range(10, 100, 5))
    return (1, 2, 3, 4, 5, 6, 8) if ratio < 30 else (1, 2, 5)


def _rank_matrix(run: RunRecord, names: list[str]) -> tuple[list[int], np.ndarray]:
    row_of = {name: row for row, name in enumerate(names)}
    ranks = np.full((len(names), len(run.ranks)), np.nan)
    for column, record in enumerate(run.ranks):
        for layer in record["layers"]:
            if layer["name"] in row_of:
                ranks[row_of[layer["name"]], column] = layer["rank"]
    return [record["step"] for record in run.ranks], np.ma.masked_invalid(ranks)


def _edges(steps: list[int]) -> np.ndarray:
    """Return cell borders half-way between logged steps."""
    centres = np.asarray(steps, dtype=float)
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middles = (centres[1:] + centres[:-1]) / 2
    first, last = 2 * centres[0] - middles[0], 2 * centres[-1] - middles[-1]
    return np.concatenate([[first], middles, [last]])


def _label_layers(axes: Axes, labels: list[str]) -> None:
    """Name every layer, or the first of every block where there are too many to read."""
    blocks = [next((part for part in label.split(".") if part.isdigit()), "") for label in labels]
    starts = [row for row in range(len(labels)) if row == 0 or blocks[row] != blocks[row - 1]]
    for row in starts[1:]:
        axes.axhline(row, color="white", linewidth=0.8, alpha=0.75)
    if len(labels) <= 48:
        axes.set_yticks(np.arange(len(labels)) + 0.5, labels, fontsize=8.5, family="monospace")
    else:
        kept = starts[:: max(1, math.ceil(len(starts) / 40))]
        axes.set_yticks(
            [row + 0.5 for row in kept],
            [labels[row] for row in kept],
            fontsize=8.5,
            family="monospace",
        )
    axes.tick_params(axis="y", length=0)


def _draw_split(
    axes: Axes, bars: list[tuple[str, MemorySplit]], theme: Theme, *, with_rest: bool
) -> None:
    positions = np.arange(len(bars))[::-1]
    widest = max((split.peak if with_rest else split.held) for _, split in bars) or 1
    scale, unit = _byte_scale(widest)
    for position, (_, split) in zip(positions, bars, strict=True):
        left = 0.0
        colours = _part_colours(split, theme)
        for name, size in split.parts(with_rest=with_rest):
            axes.barh(
                position,
                size / scale,
                left=left,
                height=0.62,
                color=colours[name],
                label=name,
                edgecolor=theme.paper,
                linewidth=0.6,
            )
            left += size / scale
        axes.annotate(
            format_bytes(left * scale),
            (left, position),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=10,
            color=theme.ink,
        )
    axes.set_yticks(positions, [label for label, _ in bars], fontsize=10)
    axes.set_ylim(-0.6, len(bars) - 0.4)
    axes.set_xlim(0, widest / scale * 1.2)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel(f"memory ({unit})")


def _part_colours(split: MemorySplit, theme: Theme) -> dict[str, str]:
    return {
        "weights": theme.weights,
        "gradients": theme.gradients,
        "state of projected weights": method_colour(split.method),
        "optimizer state": method_colour(split.method),
        "state of plain weights": "#c9a227",
        "rest of the peak": theme.rest,
    }


def _byte_scale(widest: float) -> tuple[float, str]:
    for unit, scale in (("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10)):
        if widest >= scale:
            return scale, unit
    return 1.0, "bytes"


def _peak_sources(runs: dict[str, RunRecord]) -> str:
    sources = {str(run.summary.get("peak_bytes_source", "measured")) for run in runs.values()}
    return ", ".join(sorted(sources))
