"""Plots of a finished run, into its folder ``plots``: loss and memory, and what else it has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from adarankgrad.train.batch_figure import batch_figure
from adarankgrad.train.figure_style import LIGHT, Theme, caption_from, to_png
from adarankgrad.train.figures import loss_figure, memory_figure, ranks_figure
from adarankgrad.train.files import write_atomic
from adarankgrad.train.metric_figure import metric_figure
from adarankgrad.train.record import RunRecord, load_run


def write_plots(run_dir: Path) -> list[Path]:
    """Draw a finished run.

    Args:
        run_dir: The run folder; ``summary.json`` must be there.

    Returns:
        The PNG files written: loss and memory for every optimizer, ranks for those that
        log ranks, the metrics of a task, batch size for runs whose batch may grow, loss over
        operations where the depth grew.

    Raises:
        UserError: The folder is not a finished run.
    """
    run = load_run(run_dir)
    folder = run.path / "plots"
    folder.mkdir(exist_ok=True)
    written = []
    for name, draw in plot_makers(run).items():
        path = folder / f"{name}.png"
        write_atomic(path, to_png(draw(LIGHT), caption_of(run)))
        written.append(path)
    return written


def plot_makers(run: RunRecord) -> dict[str, Callable[[Theme], Figure]]:
    """Return the figures a run has, by file name without suffix, each drawn on call."""
    caption = caption_of(run)
    makers: dict[str, Callable[[Theme], Figure]] = {
        "loss": lambda theme: loss_figure({run.method: run}, caption, theme),
        "memory": lambda theme: memory_figure({run.method: run}, caption, theme),
    }
    if run.task_metrics:
        makers["metric"] = lambda theme: metric_figure(run, caption, theme)
    if run.batch_sizes:
        makers["batch"] = lambda theme: batch_figure(run, caption, theme)
    if run.has_growing_depth and run.summary.get("training_flops") is not None:
        makers["loss_over_operations"] = lambda theme: loss_figure(
            {run.method: run}, caption, theme, over="training_flops"
        )
    if run.layers:
        makers["ranks"] = lambda theme: ranks_figure(run, caption, theme)
    return makers


def caption_of(run: RunRecord) -> str:
    """Return what made the run: the commit, where it is known, and the command."""
    return caption_from([run.commit], run.command)
