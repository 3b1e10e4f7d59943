"""What a comparison leaves behind: a table, results.json, plots, and one self-contained page."""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from adarankgrad.compare.figures import (
    has_refreshes,
    loss_figure,
    refresh_figure,
    trade_off_figure,
    trade_offs,
)
from adarankgrad.compare.plan import Cell, Plan
from adarankgrad.compare.results import MethodResult, collect
from adarankgrad.train import page
from adarankgrad.train.figure_style import DARK, LIGHT, Theme, to_png
from adarankgrad.train.figures import ranks_figure
from adarankgrad.train.files import write_atomic
from adarankgrad.train.folder import describe_environment
from adarankgrad.train.plots import caption_of
from adarankgrad.train.units import (
    ABSENT,
    format_bytes,
    format_count,
    format_number,
    format_seconds,
    format_share,
)

RESULTS_NAME = "results.json"
REPORT_NAME = "report.html"

HEADERS = (
    "Method",
    "Validation loss",
    "± over seeds",
    "Projected state",
    "of AdamW's",
    "Plain state",
    "Peak memory",
    "Optimizer time",
    "Tokens/s",
    "Rank, start",
    "Rank, end",
    "lr",
    "plain lr",
)

_IN_TERMINAL = (
    "Method",
    "Validation loss",
    "± over seeds",
    "of AdamW's",
    "Tokens/s",
    "lr",
)

_NOTES = {
    "loss": "Each line is the mean over seeds; its band reaches from the lowest to the highest.",
    "trade_off": (
        "Down is better, left is less memory. The state is that of the weights that low-rank "
        "methods project, the same weights for every method; bars reach from seed to seed."
    ),
    "refreshes": "Counted on the first seed, from the logged steps.",
}


def write_results(plan: Plan) -> dict[str, Any]:
    """Write ``results.json``, ``plots/`` and ``report.html`` into the comparison's folder.

    Returns:
        The content of results.json.
    """
    results = collect(plan)
    content = {
        "seeds": list(plan.seeds),
        "settings": plan.shared,
        "methods": [result.as_dict(plan) for result in results],
        "environment": describe_environment(),
        "report": str(plan.output / REPORT_NAME),
    }
    write_atomic(plan.output / RESULTS_NAME, json.dumps(content, indent=1) + "\n")
    finished = [result for result in results if result.runs]
    images = _draw(plan, finished)
    title = f"{len(results)} optimizers compared"
    html = page.page(
        title, _opening(plan, finished), _sections(plan, results, images), is_sortable=True
    )
    write_atomic(plan.output / REPORT_NAME, html)
    return content


def results_table(plan: Plan) -> Table:
    """Return the results as a table narrow enough for a terminal."""
    table = Table()
    for header in _IN_TERMINAL:
        name = "State, of AdamW's" if header == "of AdamW's" else header
        table.add_column(name, justify="left" if header == "Method" else "right")
    for result in collect(plan):
        texts = dict(zip(HEADERS, (text for text, _ in _row(result)), strict=True))
        table.add_row(*(texts[header] for header in _IN_TERMINAL))
    return table


def _row(result: MethodResult) -> list[tuple[str, float | str | None]]:
    losses = result.losses
    loss = statistics.fmean(losses) if losses else None
    deviation = statistics.stdev(losses) if len(losses) > 1 else None
    projected, adamw = (
        result.mean("projected_state_bytes"),
        result.mean("adamw_projected_state_bytes"),
    )
    state = result.mean("state_bytes")
    plain = None if state is None or projected is None else state - projected
    peak, seconds, speed = (
        result.mean(key) for key in ("peak_bytes", "optimizer_s", "tokens_per_second")
    )
    ranks = [result.mean_rank(0), result.mean_rank(-1)]
    edge = " at edge" if result.is_at_edge else ""
    chosen = result.chosen
    rates = [None, None] if chosen is None else [chosen.lr, chosen.plain_lr]
    return [
        (result.method.label, result.method.label),
        (format_number(loss, 4) if losses else _why_not(result), loss),
        (format_number(deviation, 4), deviation),
        (format_bytes(projected), projected),
        (format_share(projected, adamw), projected),
        (format_bytes(plain), plain),
        (format_bytes(peak), peak),
        (format_seconds(seconds), seconds),
        (format_count(speed), speed),
        *((format_number(rank, 1), rank) for rank in ranks),
        *((ABSENT if rate is None else f"{rate:g}{edge}", rate) for rate in rates),
    ]


def _why_not(result: MethodResult) -> str:
    return "; ".join(sorted({str(entry["status"]) for entry in result.grid}))


def _draw(plan: Plan, results: list[MethodResult]) -> dict[str, str]:
    """Write the plots and return them as HTML by name."""
    caption = _caption(plan)
    makers: dict[str, Callable[[Theme], Figure]] = {
        "loss": lambda theme: loss_figure(results, caption, theme),
        "trade_off": lambda theme: trade_off_figure(trade_offs(results), caption, theme),
    }
    if has_refreshes(results):
        makers["refreshes"] = lambda theme: refresh_figure(results, caption, theme)
    for result in results:
        run = result.first_run
        if run is not None and result.has_changing_ranks:
            name = "ranks_" + Cell(result.method, None, None, 0).name.partition("/")[0]
            makers[name] = lambda theme, run=run: ranks_figure(run, caption_of(run), theme)  # type: ignore[misc]
    folder = plan.output / "plots"
    folder.mkdir(exist_ok=True)
    images = {}
    for name, draw in makers.items():
        light, dark = (to_png(draw(theme), caption) for theme in (LIGHT, DARK))
        write_atomic(folder / f"{name}.png", light)
        images[name] = page.image(name, light, dark, _NOTES.get(name, name.replace("_", " ")))
    return images


def _caption(plan: Plan) -> str:
    settings = " ".join(f"{name}={value}" for name, value in plan.shared.items())
    commit = str(describe_environment().get("commit") or "")[:12]
    return f"adarankgrad compare: {settings} seeds={list(plan.seeds)} {commit}".rstrip()


def _opening(plan: Plan, results: list[MethodResult]) -> str:
    if not results:
        return "No run came to its end."
    best = min(results, key=lambda result: statistics.fmean(result.losses))
    run = best.first_run
    assert run is not None
    share = format_share(
        best.mean("projected_state_bytes"), best.mean("adamw_projected_state_bytes"), 0
    )
    seeds = f"{len(plan.seeds)} seeds" if len(plan.seeds) > 1 else "one seed, which decides little"
    return (
        f"Lowest validation loss: {best.method.label}, {statistics.fmean(best.losses):.4f}, with "
        f"{share} of AdamW's state on the projected weights. "
        f"{format_count(run.info.get('model_parameters'))} parameters, "
        f"{format_count(best.mean('tokens'))} tokens a run, {seeds}. At a seed, every method "
        "starts from the same weights and sees the same batches."
    )


def _sections(plan: Plan, results: list[MethodResult], images: dict[str, str]) -> Iterator[str]:
    yield page.section(
        "Results",
        page.paragraph(
            "Click a column's title to sort. Loss, bytes and speed are means over the seeds at the "
            "rates chosen on the first; ± is the standard deviation."
        ),
        page.sortable_table(HEADERS, [_row(result) for result in results]),
    )
    titles = {
        "loss": "Loss over tokens",
        "trade_off": "Loss over memory",
        "refreshes": "Why bases were refreshed",
    }
    for name, html in images.items():
        if name in titles:
            note = page.paragraph(_NOTES[name])
            yield page.section(titles[name], note, html, is_half=name != "refreshes")
    for result in results:
        name = "ranks_" + Cell(result.method, None, None, 0).name.partition("/")[0]
        if name in images:
            yield page.section(f"Ranks of {result.method.label}", images[name])
    yield page.section("Learning rates tried", *_grid(results))
    trouble = [(r.method.label, seed, said) for r in results for seed, said in r.lost.items()]
    if trouble:
        rows = [(label, str(seed), said) for label, seed, said in trouble]
        yield page.section(
            "Seeds without a result",
            page.table(["Method", "Seed", "What happened"], rows, numeric_from=9),
        )
    yield page.section("Run it again", *_reproduction(plan, results))


def _grid(results: list[MethodResult]) -> Iterator[str]:
    yield page.paragraph(
        "On the first seed. Where the chosen rate is the first or last of its grid, a better one "
        "may lie outside."
    )
    rows = []
    for result in results:
        for entry in result.grid:
            rates = [ABSENT if entry[k] is None else f"{entry[k]:g}" for k in ("lr", "plain_lr")]
            loss = entry["val_loss"]
            is_chosen = result.chosen is not None and (
                (entry["lr"], entry["plain_lr"]) == (result.chosen.lr, result.chosen.plain_lr)
            )
            said = f"{entry['status']}: {entry['message']}".removesuffix(": ")
            text = said if loss is None else f"{loss:.4f}{' (chosen)' if is_chosen else ''}"
            rows.append([result.method.label, *rates, text])
    yield page.fold(
        f"{len(rows)} runs", page.table(["Method", "lr", "plain lr", "Validation loss"], rows)
    )


def _reproduction(plan: Plan, results: list[MethodResult]) -> Iterator[str]:
    yield page.code_block(f"adarankgrad compare --resume --output {shlex.quote(str(plan.output))}")
    yield page.paragraph("The same for one method, at its chosen rates on the first seed:")
    for result in results:
        command = result.as_dict(plan)["command"]
        if command:
            yield page.code_block(shlex.join(command))
            report = result.first_run and result.first_run.path / REPORT_NAME
            if report and Path(report).is_file():
                target = Path(report).relative_to(plan.output).as_posix()
                yield page.link(target, f"Report of {result.method.label}, first seed")
    environment = describe_environment()
    facts = [(str(name), str(value)) for name, value in environment["versions"].items()]
    facts += [(name, str(environment[name])) for name in ("commit", "created") if environment[name]]
    yield page.definitions(facts)
