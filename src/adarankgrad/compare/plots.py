"""The plots of a comparison: files in its folder, and HTML for its page."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from matplotlib.figure import Figure

from adarankgrad.compare.figures import (
    has_rates,
    has_refreshes,
    rates_figure,
    refresh_figure,
    trade_off_figure,
    trade_offs,
    validation_figure,
)
from adarankgrad.compare.operations import operations_of
from adarankgrad.compare.plan import Cell, Plan
from adarankgrad.compare.results import MethodResult
from adarankgrad.train import page
from adarankgrad.train.figure_style import DARK, LIGHT, Theme, caption_from, to_png
from adarankgrad.train.figures import ranks_figure
from adarankgrad.train.files import write_atomic
from adarankgrad.train.plots import caption_of

PLOTS_FOLDER = "plots"
_RANKS = "ranks_"


def titles(plan: Plan) -> dict[str, str]:
    """Return the titles of the plots of all methods, in the page's order."""
    word = plan.metric.word.capitalize()
    return {
        "metric": f"{word} over tokens",
        "loss": "Loss over tokens",
        "loss_over_operations": "Loss over operations",
        "trade_off": f"{word} over memory",
        "rates": f"{word} over learning rate",
        "refreshes": "Why bases were refreshed",
    }


def notes(plan: Plan) -> dict[str, str]:
    """Return what stands beside the plots of all methods."""
    direction, best = ("Up", "highest") if plan.metric.is_higher_better else ("Down", "lowest")
    state = (
        "The state is that of the weights that low-rank methods project, the same weights for "
        "every method; bars reach from seed to seed."
        if plan.kind.trains_same_weights
        else "The state is that of all trained weights; bars reach from seed to seed."
    )
    curve = "Each line is the mean over seeds; its band reaches from the lowest to the highest."
    return {
        "metric": curve,
        "loss": curve,
        "loss_over_operations": (
            f"{curve} While the depth grows, validation runs the layers there are."
        ),
        "trade_off": f"{direction} is better, left is less memory. {state}",
        "rates": (
            "On the first seed, at the best plain rate of each; rings mark the chosen rates. Where "
            f"the {best} is first or last, a better one may lie outside."
        ),
        "refreshes": "Counted on the first seed, from the logged steps.",
    }


def draw_plots(plan: Plan, results: list[MethodResult]) -> tuple[dict[str, str], dict[str, str]]:
    """Write the plots that the results have, and remove those of an earlier state.

    Args:
        plan: The comparison.
        results: Of methods with a finished run.

    Returns:
        The plots as HTML by name, and why others could not be drawn, by name too.
    """
    folder = plan.output / PLOTS_FOLDER
    folder.mkdir(exist_ok=True)
    alt = notes(plan)
    drawn: dict[str, str] = {}
    faults: dict[str, str] = {}
    for name, (draw, caption) in _plots(plan, results).items():
        try:
            light, dark = (to_png(draw(theme), caption) for theme in (LIGHT, DARK))
        except Exception as error:  # hours of training are worth a page without one plot
            faults[name] = f"{type(error).__name__}: {error}"
            continue
        write_atomic(folder / f"{name}.png", light)
        drawn[name] = page.image(name, light, dark, alt.get(name, name.replace("_", " ")))
    for path in folder.glob("*.png"):
        if path.stem not in drawn and (path.stem in alt or path.stem.startswith(_RANKS)):
            path.unlink()
    return drawn, faults


def _plots(
    plan: Plan, results: list[MethodResult]
) -> dict[str, tuple[Callable[[Theme], Figure], str]]:
    """Return how to draw what the results have, with captions, by name."""
    caption = _caption(plan, results)
    metric, in_bytes = plan.metric, not plan.kind.trains_same_weights
    draw: dict[str, Callable[[Theme], Figure]] = {}
    if results:
        curves = {"loss": plan.kind.loss} | ({} if metric.is_loss else {"metric": metric})
        for name, shown in curves.items():
            draw[name] = partial(validation_figure, results, caption, metric=shown)
    if any(cost and cost.total is not None for cost in operations_of(results)):
        draw["loss_over_operations"] = partial(
            validation_figure, results, caption, metric=plan.kind.loss, over="training_flops"
        )
    if points := trade_offs(results, in_bytes=in_bytes):
        draw["trade_off"] = partial(
            trade_off_figure, points, caption, metric=metric, in_bytes=in_bytes
        )
    if has_rates(results):
        draw["rates"] = partial(rates_figure, results, caption, metric=metric)
    if has_refreshes(results):
        draw["refreshes"] = partial(refresh_figure, results, caption)
    plots = {name: (figure, caption) for name, figure in draw.items()}
    for result in results:
        run = result.first_run
        if run is not None and result.has_changing_ranks:
            own = caption_of(run)
            plots[ranks_name(result)] = (partial(ranks_figure, run, own), own)
    return plots


def ranks_name(result: MethodResult) -> str:
    """Return the name of the plot of a method's ranks."""
    return _RANKS + Cell(result.method, None, None, 0).name.partition("/")[0]


def _caption(plan: Plan, results: list[MethodResult]) -> str:
    settings = " ".join(f"{name}={value}" for name, value in plan.shared.items())
    commits = [commit for result in results for commit in result.described("commit")]
    return caption_from(commits, f"adarankgrad compare {settings} seeds={list(plan.seeds)}")
