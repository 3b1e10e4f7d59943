"""The figures of a comparison; each function draws one and writes nothing."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from adarankgrad.compare.labels import LabelledPoint, label_apart
from adarankgrad.compare.results import MethodResult
from adarankgrad.train.figure_style import (
    LIGHT,
    Theme,
    add_caption,
    add_common_legend,
    add_legend,
    distinct_colours,
    new_figure,
    style_axes,
    use_count_axis,
)
from adarankgrad.train.record import RunRecord

REASON_COLOURS = {
    "first": "#8b97a8",
    "max_gap": "#3b82f6",
    "norm": "#22a06b",
    "energy": "#ea7317",
}
_REASON_NAMES = {
    "first": "first step",
    "max_gap": "longest gap over",
    "norm": "gradient converged",
    "energy": "energy lost",
}
_SHOWN_FROM = 0.15
"""Share of a run after which its validation loss is drawn: the fall before it hides the rest."""


@dataclass(frozen=True)
class TradeOff:
    """One method in `trade_off_figure`.

    Attributes:
        label: Its name.
        state_share: State of the projected weights, as a share of AdamW's.
        losses: Final validation losses over the seeds, nats a token.
        colour: Of its point.
    """

    label: str
    state_share: float
    losses: list[float]
    colour: str

    @property
    def mean(self) -> float:
        """Mean loss over the seeds."""
        return statistics.fmean(self.losses)


def loss_figure(results: list[MethodResult], caption: str, theme: Theme = LIGHT) -> Figure:
    """Draw validation loss over tokens: the mean over seeds, in a band from lowest to highest."""
    figure = new_figure(4.8, theme)
    axes = figure.add_subplot()
    style_axes(axes, theme, title="Validation loss, mean and range over seeds")
    for result, colour in _with_colours(results):
        tokens, losses = _validation_curves(result)
        shown = [i for i, count in enumerate(tokens) if count >= _SHOWN_FROM * tokens[-1]]
        at = [tokens[i] for i in shown]
        curves = np.array([[losses[run][i] for i in shown] for run in range(len(losses))])
        axes.fill_between(
            at, curves.min(axis=0), curves.max(axis=0), color=colour, alpha=0.16, linewidth=0
        )
        axes.plot(at, curves.mean(axis=0), color=colour, linewidth=1.8, label=result.method.label)
    axes.set_ylabel("validation loss (nats per token)")
    use_count_axis(axes, "training tokens")
    add_legend(axes, theme)
    add_caption(figure, caption, theme)
    return figure


def trade_off_figure(points: list[TradeOff], caption: str, theme: Theme = LIGHT) -> Figure:
    """Draw final loss over the state of projected weights; bars reach from seed to seed."""
    figure = new_figure(4.8, theme)
    axes = figure.add_subplot()
    style_axes(axes, theme, title="Validation loss over optimizer memory")
    for point in points:
        low, high = point.mean - min(point.losses), max(point.losses) - point.mean
        axes.errorbar(
            100 * point.state_share,
            point.mean,
            yerr=[[low], [high]],
            fmt="o",
            color=point.colour,
            markersize=7,
            capsize=3,
        )
    axes.set_xlabel("state of projected weights at the end, per cent of AdamW's")
    axes.set_ylabel("validation loss (nats per token)")
    axes.margins(x=0.12, y=0.1)
    add_caption(figure, caption, theme)
    figure.draw_without_rendering()
    label_apart(
        axes,
        [
            LabelledPoint(p.label, 100 * p.state_share, p.mean, min(p.losses), max(p.losses))
            for p in points
        ],
        theme,
    )
    return figure


def trade_offs(results: list[MethodResult]) -> list[TradeOff]:
    """The points of `trade_off_figure`, of methods whose state is known."""
    return [
        TradeOff(result.method.label, share, result.losses, colour)
        for result, colour in _with_colours(results)
        if (share := _state_share(result)) is not None
    ]


def rates_figure(results: list[MethodResult], caption: str, theme: Theme = LIGHT) -> Figure:
    """Draw the first seed's loss over the learning rate, at the best plain rate of each."""
    figure = new_figure(4.8, theme)
    axes = figure.add_subplot()
    style_axes(axes, theme, title="Validation loss over learning rate")
    for result, colour in _with_colours(results):
        losses = _losses_by_rate(result)
        rates = sorted(losses)
        axes.plot(
            rates,
            [losses[rate] for rate in rates],
            "o-",
            color=colour,
            markersize=4.5,
            linewidth=1.5,
            label=result.method.label,
        )
        if result.chosen is not None and result.chosen.lr in losses:
            at = (result.chosen.lr, losses[result.chosen.lr])
            axes.plot(*at, "o", color=colour, markersize=11, fillstyle="none")
    tried = sorted({rate for result in results for rate in _losses_by_rate(result)})
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks(tried, [f"{rate:g}" for rate in tried])
    axes.set_xlabel("learning rate")
    axes.set_ylabel("validation loss (nats per token)")
    add_common_legend(figure, theme, ncols=3)
    add_caption(figure, caption, theme)
    return figure


def has_rates(results: list[MethodResult]) -> bool:
    """Tell whether any method was trained to the end at several learning rates."""
    return any(len(_losses_by_rate(result)) > 1 for result in results)


def _losses_by_rate(result: MethodResult) -> dict[float, float]:
    """Return the lowest loss at each learning rate, over the plain rates tried with it."""
    lowest: dict[float, float] = {}
    for entry in result.grid:
        rate, loss = entry["lr"], entry["val_loss"]
        if rate is not None and loss is not None:
            lowest[rate] = min(loss, lowest.get(rate, loss))
    return lowest


def refresh_figure(results: list[MethodResult], caption: str, theme: Theme = LIGHT) -> Figure:
    """Draw why each method's bases were refreshed, in refreshes per weight of the first run."""
    counted = [(r, reasons) for r in results if r.first_run and (reasons := _reasons(r.first_run))]
    figure = new_figure(1.9 + 0.5 * len(counted), theme)
    axes = figure.add_subplot()
    style_axes(axes, theme, title="Why bases were refreshed", grid="x")
    for position, (_, reasons) in enumerate(reversed(counted)):
        left = 0.0
        for reason, number in reasons.items():
            axes.barh(
                position,
                number,
                left=left,
                height=0.6,
                color=REASON_COLOURS.get(reason, theme.rest),
                label=_REASON_NAMES.get(reason, reason),
            )
            left += number
    axes.set_yticks(range(len(counted)), [r.method.label for r, _ in reversed(counted)])
    axes.set_xlabel("refreshes per weight")
    add_common_legend(figure, theme, ncols=4)
    add_caption(figure, caption, theme)
    return figure


def has_refreshes(results: list[MethodResult]) -> bool:
    """Tell whether any method refreshed a basis; those without any may log ranks all the same."""
    return any(result.first_run and _reasons(result.first_run) for result in results)


def _with_colours(results: list[MethodResult]) -> list[tuple[MethodResult, str]]:
    finished = [result for result in results if result.runs]
    methods = [result.first_run.method for result in finished if result.first_run is not None]
    return list(zip(finished, distinct_colours(methods), strict=True))


def _validation_curves(result: MethodResult) -> tuple[list[float], list[list[float]]]:
    curves = [run.evals for run in result.runs.values()]
    common = min(len(rows) for rows in curves)
    tokens = [row["tokens"] for row in curves[0][:common]]
    return tokens, [[row["val_loss"] for row in rows[:common]] for rows in curves]


def _state_share(result: MethodResult) -> float | None:
    held, adamw = result.mean("projected_state_bytes"), result.mean("adamw_projected_state_bytes")
    return None if held is None or not adamw else held / adamw


def _reasons(run: RunRecord) -> dict[str, float]:
    """Count refreshes per weight by reason; several between two logs count for the last one's."""
    counts: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    names: set[str] = set()
    for row in run.ranks:
        for layer in row["layers"]:
            names.add(layer["name"])
            new = layer["num_refreshes"] - seen[layer["name"]]
            seen[layer["name"]] = layer["num_refreshes"]
            counts[str(layer["refresh_reason"])] += new
    return {reason: number / len(names) for reason, number in counts.most_common() if number}
