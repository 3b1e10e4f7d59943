"""Several runs side by side: a table for the terminal, a page with plots for the browser."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from rich.table import Table

from adarankgrad.train import page
from adarankgrad.train.errors import UserError
from adarankgrad.train.figure_style import DARK, LIGHT, caption_from, to_png
from adarankgrad.train.figures import loss_figure, memory_figure
from adarankgrad.train.files import write_atomic
from adarankgrad.train.plots import caption_of, plot_makers
from adarankgrad.train.record import RunRecord, load_run
from adarankgrad.train.report import reproduction
from adarankgrad.train.units import (
    ABSENT,
    format_bytes,
    format_count,
    format_number,
    format_seconds,
)


class Measure(NamedTuple):
    """A row of the comparison.

    Attributes:
        name: What it is.
        value: Reads the number from a run; None where the run has none.
        text: Writes the number, given the largest in its row.
        is_ratio: Two runs are compared by quotient, else by difference.
    """

    name: str
    value: Callable[[RunRecord], float | None]
    text: Callable[[float | None, float], str]
    is_ratio: bool = True


def _from_summary(key: str) -> Callable[[RunRecord], float | None]:
    return lambda run: run.summary.get(key)


def _number(digits: int) -> Callable[[float | None, float], str]:
    return lambda value, _: format_number(value, digits)


def _text(write: Callable[[float | None], str]) -> Callable[[float | None, float], str]:
    return lambda value, _: write(value)


MEASURES = (
    Measure("Validation loss", _from_summary("val_loss"), _number(3), False),
    Measure("Perplexity", _from_summary("perplexity"), _number(1)),
    Measure("Training operations", _from_summary("training_flops"), _text(format_count)),
    Measure("State of projected weights", _from_summary("projected_state_bytes"), format_bytes),
    Measure("Optimizer state in all", _from_summary("state_bytes"), format_bytes),
    Measure(
        "Mean rank, first log",
        lambda run: run.mean_ranks[0] if run.mean_ranks else None,
        _number(1),
    ),
    Measure(
        "Mean rank, last log",
        lambda run: run.mean_ranks[-1] if run.mean_ranks else None,
        _number(1),
    ),
    Measure("Peak memory", _from_summary("peak_bytes"), format_bytes),
    Measure("Tokens per second", _from_summary("tokens_per_second"), _text(format_count)),
    Measure("Time in the optimizer", _from_summary("optimizer_s"), _text(format_seconds)),
    Measure("Time in all", _from_summary("elapsed_s"), _text(format_seconds)),
)

_TITLES = {"loss": "Loss", "loss_over_operations": "Loss over operations", "memory": "Memory"}


def comparison_table(run_dirs: dict[str, Path]) -> Table:
    """Return a table with one column per run, and for two runs what the second changes.

    Args:
        run_dirs: Label to run folder.

    Raises:
        UserError: There is no run, or a folder is not a finished run.
    """
    headers, rows = _table_texts(_load(run_dirs))
    table = Table()
    for index, header in enumerate(headers):
        table.add_column(header, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def write_comparison(run_dirs: dict[str, Path], output: Path, title: str) -> Path:
    """Write ``comparison.html``, and its plots beside it.

    Args:
        run_dirs: Label to run folder; the first run is the one to compare with.
        output: Folder to write into; made where it does not exist.
        title: Heading of the page.

    Returns:
        The page, which needs no other file.

    Raises:
        UserError: There is no run, or a folder is not a finished run.
    """
    runs = _load(run_dirs)
    plots = Path(output) / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    caption = _caption(runs)
    images = {}
    for name, draw in _figures(runs).items():
        light, dark = (to_png(draw(runs, caption, theme), caption) for theme in (LIGHT, DARK))
        write_atomic(plots / f"{name}.png", light)
        images[name] = page.image(name, light, dark, f"{name} of {', '.join(runs)}")
    path = Path(output) / "comparison.html"
    html = page.page(title, _opening(runs), _sections(runs, images, Path(output)))
    write_atomic(path, html)
    return path


def _figures(runs: dict[str, RunRecord]) -> dict[str, Callable[..., Figure]]:
    figures: dict[str, Callable[..., Figure]] = {"loss": loss_figure}
    are_counted = all(run.summary.get("training_flops") is not None for run in runs.values())
    if are_counted and any(run.has_growing_depth for run in runs.values()):
        figures["loss_over_operations"] = partial(loss_figure, over="training_flops")
    return {**figures, "memory": memory_figure}


def _load(run_dirs: dict[str, Path]) -> dict[str, RunRecord]:
    if not run_dirs:
        raise UserError("run_dirs is empty: name at least one run folder to compare.")
    return {label: load_run(path) for label, path in run_dirs.items()}


def _table_texts(runs: dict[str, RunRecord]) -> tuple[list[str], list[list[str]]]:
    labels = list(runs)
    headers = ["", *labels]
    if len(runs) == 2:
        headers.append("change")
    rows = []
    for measure in _measures(runs):
        values = [measure.value(run) for run in runs.values()]
        present = [value for value in values if value is not None]
        if not present:
            continue
        row = [measure.name, *(measure.text(value, max(present)) for value in values)]
        if len(runs) == 2:
            row.append(_change(measure, values[0], values[1]))
        rows.append(row)
    return headers, rows


def _measures(runs: dict[str, RunRecord]) -> Iterator[Measure]:
    yield from MEASURES
    if any(run.has_growing_depth for run in runs.values()):
        label, first = next(iter(runs.items()))
        loss = first.summary["val_loss"]
        yield Measure(
            f"Operations to the loss of {label}",
            lambda run: run.flops_to_loss(loss),
            _text(format_count),
        )


def _change(measure: Measure, base: float | None, value: float | None) -> str:
    if base is None or value is None:
        return ""
    if not measure.is_ratio:
        return f"{value - base:+.3f}"
    return f"x {value / base:.2f}" if base else ABSENT


def _caption(runs: dict[str, RunRecord]) -> str:
    """Name the commits, what differs between the commands, and what they share."""
    settings = {label: _flags(run.command) for label, run in runs.items()}
    shared = set.intersection(*(set(flags) for flags in settings.values()))
    parts = [
        f"{label}: {' '.join(flag for flag in flags if flag not in shared)}"
        for label, flags in settings.items()
        if set(flags) - shared
    ]
    first = next(iter(settings.values()))
    parts.append(" ".join(flag for flag in first if flag in shared))
    return caption_from((run.commit for run in runs.values()), "; ".join(parts))


def _flags(command: str) -> list[str]:
    """Split a command into its flags with their values; folders to write say nothing."""
    flags = re.split(r"\s+(?=--)", command)
    return [flag for flag in flags if flag.partition(" ")[0] not in ("--output", "--overwrite")]


def _opening(runs: dict[str, RunRecord]) -> str:
    first = next(iter(runs.values()))
    return (
        f"{len(runs)} runs: {', '.join(runs)}. "
        f"{format_count(first.info.get('model_parameters'))} parameters, "
        f"{format_count(first.summary.get('tokens'))} tokens each."
    )


def _sections(runs: dict[str, RunRecord], images: dict[str, str], output: Path) -> Iterator[str]:
    headers, rows = _table_texts(runs)
    yield page.section("Results", page.table(headers, rows))
    for name, image in images.items():
        yield page.section(_TITLES[name], image, is_half=True)
    for label, run in runs.items():
        if "ranks" in (makers := plot_makers(run)):
            light, dark = (
                to_png(makers["ranks"](theme), caption_of(run)) for theme in (LIGHT, DARK)
            )
            yield page.section(f"Ranks of {label}", page.image("ranks", light, dark, "ranks"))
    for label, run in runs.items():
        yield page.section(f"Run {label} again", reproduction(run), _report_link(run, output))


def _report_link(run: RunRecord, output: Path) -> str:
    """Link to the run's own report where it lies below the page, so that the link can hold."""
    report = run.path.resolve() / "report.html"
    root = output.resolve()
    if not report.is_file() or not report.is_relative_to(root):
        return ""
    return page.link(report.relative_to(root).as_posix(), "Report of this run")
