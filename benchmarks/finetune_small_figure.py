"""The plot of `finetune_small.py`: each task's metric, method by method and seed by seed."""

from __future__ import annotations

from typing import Any

from adarankgrad.train.figure_style import (
    LIGHT,
    add_caption,
    caption_from,
    distinct_colours,
    new_figure,
    style_axes,
    to_png,
)

_HEIGHT_IN = 2.6


def draw(tasks: dict[str, dict[str, Any]]) -> bytes:
    """Draw a panel for each task: a dot a seed, a line at the median, projected state beside."""
    figure = new_figure(_HEIGHT_IN * len(tasks), LIGHT)
    panels = figure.subplots(len(tasks), squeeze=False)[:, 0]
    for axes, (name, task) in zip(panels, tasks.items(), strict=True):
        methods = {label: m for label, m in task["methods"].items() if m["values"]}
        style_axes(axes, LIGHT, title=f"{name}: {task['metric']}", grid="x")
        colours = distinct_colours(list(methods))
        for place, (method, colour) in enumerate(zip(methods.values(), colours, strict=True)):
            values = method["values"]
            axes.plot(values, [place] * len(values), "o", color=colour, markersize=5, alpha=0.6)
            axes.plot([method["median"]] * 2, [place - 0.35, place + 0.35], color=colour, lw=2.2)
        axes.set_yticks(range(len(methods)), [_label(*entry) for entry in methods.items()])
        axes.invert_yaxis()
    measured = [method for task in tasks.values() for method in task["methods"].values()]
    commits = (commit for method in measured for commit in method["commits"])
    caption = caption_from(commits, "benchmarks/finetune_small.py")
    add_caption(figure, caption, LIGHT)
    return to_png(figure, caption)


def _label(name: str, method: dict[str, Any]) -> str:
    return f"{name}, {method['projected_state_bytes'] / 2**20:.1f} MiB"
