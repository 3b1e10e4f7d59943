"""The figures of a comparison; each function draws one and writes nothing."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from adarankgrad.compare.labels import LabelledPoint, label_apart
from adarankgrad.compare.metric import NATS_PER_TOKEN, Metric
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
from adarankgrad.train.figures import LOSS_AXES
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
"""Share of a run after which its validation is drawn: the fall before it hides the rest."""
_LOG_FROM = 10
"""Quotient of the largest and the smallest state from which their axis is logarithmic."""


@dataclass(frozen=True)
class TradeOff:
    """One method in `trade_off_figure`.

    Attributes:
        label: Its name.
        state: Of the projected weights, as a share of AdamW's; or of all weights, in bytes.
        scores: What it is judged by, over the seeds.
        colour: Of its point.
    """

    label: str
    state: float
    scores: list[float]
    colour: str

    @property
    def mean(self) -> float:
        """Mean score over the seeds."""
        return statistics.fmean(self.scores)


def validation_figure(
    results: list[MethodResult],
    caption: str,
    theme: Theme = LIGHT,
    *,
    metric: Metric = NATS_PER_TOKEN,
    over: str = "tokens",
) -> Figure:
    """Draw a metric over tokens or operations: the mean over seeds, from lowest to highest.

    Args:
        results: Of methods; those whose operations were not counted are not drawn over them.
        caption: Below the figure.
        theme: Light or dark.
        metric: What is drawn.
        over: One of `LOSS_AXES`.
    """
    figure, axes = _new_axes(f"{metric.title}, mean and range over seeds", theme)
    for result, colour in _with_colours(results):
        if any(row.get(over) is None for run in result.runs.values() for row in run.evals):
            continue
        counts, values = _validation_curves(result, metric, over)
        shown = [i for i, count in enumerate(counts) if count >= _SHOWN_FROM * counts[-1]]
        at = [counts[i] for i in shown]
        curves = np.array([[values[run][i] for i in shown] for run in range(len(values))])
        axes.fill_between(
            at, curves.min(axis=0), curves.max(axis=0), color=colour, alpha=0.16, linewidth=0
        )
        axes.plot(
            at,
            curves.mean(axis=0),
            "o-" if len(at) == 1 else "-",  # a line through one point is not seen
            color=colour,
            linewidth=1.8,
            label=result.method.label,
        )
    axes.set_ylabel(metric.axis)
    use_count_axis(axes, LOSS_AXES[over])
    if axes.get_legend_handles_labels()[0]:
        add_legend(axes, theme)
    add_caption(figure, caption, theme)
    return figure


def trade_off_figure(
    points: list[TradeOff],
    caption: str,
    theme: Theme = LIGHT,
    *,
    metric: Metric = NATS_PER_TOKEN,
    in_bytes: bool = False,
) -> Figure:
    """Draw final scores over the optimizer's state; bars reach from seed to seed.

    Args:
        points: One a method.
        caption: Below the figure.
        theme: Light or dark.
        metric: What scores are.
        in_bytes: States are bytes of all weights, else shares of AdamW's of projected ones.
    """
    figure, axes = _new_axes(f"{metric.title} over optimizer memory", theme)
    states = [point.state / 2**20 if in_bytes else 100 * point.state for point in points]
    if in_bytes and min(states) * _LOG_FROM < max(states) and min(states) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for state, point in zip(states, points, strict=True):
        low, high = point.mean - min(point.scores), max(point.scores) - point.mean
        axes.errorbar(
            state,
            point.mean,
            yerr=[[low], [high]],
            fmt="o",
            color=point.colour,
            markersize=7,
            capsize=3,
        )
    share = "state of projected weights at the end, per cent of AdamW's"
    axes.set_xlabel("optimizer state at the end (MiB)" if in_bytes else share)
    axes.set_ylabel(metric.axis)
    axes.margins(x=0.12, y=0.1)
    add_caption(figure, caption, theme)
    figure.draw_without_rendering()
    label_apart(
        axes,
        [
            LabelledPoint(p.label, state, p.mean, min(p.scores), max(p.scores))
            for state, p in zip(states, points, strict=True)
        ],
        theme,
    )
    return figure


def trade_offs(results: list[MethodResult], *, in_bytes: bool = False) -> list[TradeOff]:
    """The points of `trade_off_figure`, of methods whose state is known."""
    return [
        TradeOff(result.method.label, state, result.scores, colour)
        for result, colour in _with_colours(results)
        if (state := result.mean("state_bytes") if in_bytes else _state_share(result)) is not None
    ]


def rates_figure(
    results: list[MethodResult],
    caption: str,
    theme: Theme = LIGHT,
    *,
    metric: Metric = NATS_PER_TOKEN,
) -> Figure:
    """Draw the first seed's score over the learning rate, at the best plain rate of each."""
    figure, axes = _new_axes(f"{metric.title} over learning rate", theme)
    for result, colour in _with_colours(results):
        best = _best_by_rate(result, metric)
        rates = sorted(best)
        axes.plot(
            rates,
            [best[rate] for rate in rates],
            "o-",
            color=colour,
            markersize=4.5,
            linewidth=1.5,
            label=result.method.label,
        )
        if result.chosen is not None and result.chosen.lr in best:
            at = (result.chosen.lr, best[result.chosen.lr])
            axes.plot(*at, "o", color=colour, markersize=11, fillstyle="none")
    tried = sorted({rate for result in results for rate in _best_by_rate(result, metric)})
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks(tried, [f"{rate:g}" for rate in tried])
    axes.set_xlabel("learning rate")
    axes.set_ylabel(metric.axis)
    add_common_legend(figure, theme, ncols=3)
    add_caption(figure, caption, theme)
    return figure


def has_rates(results: list[MethodResult]) -> bool:
    """Tell whether any method was trained to the end at several learning rates."""
    return any(len(_best_by_rate(result, result.metric)) > 1 for result in results)


def _best_by_rate(result: MethodResult, metric: Metric) -> dict[float, float]:
    """Return the best score at each learning rate, over the plain rates tried with it."""
    best: dict[float, float] = {}
    better = max if metric.is_higher_better else min
    for entry in result.grid:
        rate, score = entry["lr"], entry["metrics"].get(metric.name)
        if rate is not None and score is not None:
            best[rate] = better(score, best.get(rate, score))
    return best


def refresh_figure(results: list[MethodResult], caption: str, theme: Theme = LIGHT) -> Figure:
    """Draw why each method's bases were refreshed, in refreshes per weight of the first run."""
    counted = [(r, reasons) for r in results if r.first_run and (reasons := _reasons(r.first_run))]
    figure, axes = _new_axes(
        "Why bases were refreshed", theme, height_in=1.9 + 0.5 * len(counted), grid="x"
    )
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


def _new_axes(
    title: str, theme: Theme, *, height_in: float = 4.8, grid: str = "y"
) -> tuple[Figure, Axes]:
    figure = new_figure(height_in, theme)
    axes = figure.add_subplot()
    style_axes(axes, theme, title=title, grid=grid)
    return figure, axes


def _with_colours(results: list[MethodResult]) -> list[tuple[MethodResult, str]]:
    finished = [result for result in results if result.runs]
    methods = [result.first_run.method for result in finished if result.first_run is not None]
    return list(zip(finished, distinct_colours(methods), strict=True))


def _validation_curves(
    result: MethodResult, metric: Metric, over: str
) -> tuple[list[float], list[list[float]]]:
    """Return counts up to where the first seed ends, and each seed's values there.

    Between two evaluations a value is on the straight line: where batch or depth depend on the
    seed, evaluations are at other counts.
    """
    curves = [
        ([row[over] for row in run.evals], [metric.at(row) for row in run.evals])
        for run in result.runs.values()
    ]
    first = max(counts[0] for counts, _ in curves)
    last = min(counts[-1] for counts, _ in curves)
    known = {count for counts, _ in curves for count in counts if first <= count <= last}
    grid = sorted(known or {last})
    return grid, [np.interp(grid, *curve).tolist() for curve in curves]


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
