"""What a comparison leaves behind: a table, results.json, plots, and one self-contained page."""

from __future__ import annotations

import json
import os
import shlex
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from adarankgrad.compare.cells import describe_cell
from adarankgrad.compare.operations import has_growing_depth, operations_of
from adarankgrad.compare.plan import Cell, Plan
from adarankgrad.compare.plots import draw_plots, notes, ranks_name, titles
from adarankgrad.compare.reproduction import FRESH_FOLDER, comparison_toml
from adarankgrad.compare.results import RATES, MethodResult, collect, in_words
from adarankgrad.compare.table import rows_of, terminal_table
from adarankgrad.train import page
from adarankgrad.train.files import write_atomic
from adarankgrad.train.folder import describe_environment
from adarankgrad.train.units import ABSENT, format_bytes, format_count, format_share

RESULTS_NAME = "results.json"
REPORT_NAME = "report.html"
_CONFIG_NAME = "comparison.toml"
_STATE = {
    True: (
        "State is that of the weights that low-rank methods project, at the end of the runs and at "
        "its highest, with its share of AdamW's; plain state is that of all other weights."
    ),
    False: (
        "Metrics are those of each run's best checkpoint, and state is that of all trained "
        "weights at the end."
    ),
}
"""How state is compared, where methods train the same weights and where they do not."""

_OPERATIONS = (
    " Operations are those of forward and backward passes, by formula; those to the loss of the "
    "first method end where a run's validation first is as good as that method's last at the seed: "
    "the median over seeds, as a multiple of the first method's operations in all."
)


def write_results(plan: Plan, *, workers: int = 1) -> dict[str, Any]:
    """Write ``results.json``, ``plots/`` and ``report.html`` into the comparison's folder.

    Args:
        plan: The comparison; what has no result yet, or failed, is shown as that.
        workers: How many runs shared the machine.

    Returns:
        The content of results.json.
    """
    results = collect(plan)
    content = {
        "seeds": list(plan.seeds),
        "settings": plan.shared,
        "metric": plan.metric.name,
        "methods": _numbers(plan, results),
        "environment": _environment(results, workers),
        "report": str(plan.output / REPORT_NAME),
    }
    write_atomic(plan.output / RESULTS_NAME, json.dumps(content, indent=1) + "\n")
    finished = [result for result in results if result.runs]
    drawn, faults = draw_plots(plan, finished)
    sections = [
        *_result_sections(plan, results),
        *_plot_sections(plan, results, drawn, faults),
        _rates_section(plan, results),
        page.section("Run it again", *_reproduction(plan, content, results)),
    ]
    html = page.page(_title(plan, results), _opening(plan, results), sections, is_sortable=True)
    write_atomic(plan.output / REPORT_NAME, html)
    return content


def _numbers(plan: Plan, results: list[MethodResult]) -> list[dict[str, Any]]:
    """Return the numbers of every method, its operations too where any method's depth grows."""
    return [
        result.as_dict(plan) | ({} if operations is None else operations.as_dict())
        for result, operations in zip(results, operations_of(results), strict=True)
    ]


def results_table(plan: Plan) -> Table:
    """Return the results as a table narrow enough for a terminal."""
    return terminal_table(collect(plan), plan.kind)


def _environment(results: list[MethodResult], workers: int) -> dict[str, Any]:
    """Return versions, and what the runs had of the machine."""
    optimizers = (str(r.method.settings.get("optimizer", "")) for r in results)
    environment = describe_environment(optimizers)
    machine = {
        "device": sorted({name for r in results for name in r.described("device")}),
        "num_threads": sorted({n for r in results for n in r.described("num_threads")}),
        "num_cores": os.cpu_count(),
        "workers": workers,
    }
    return environment | machine


def _title(plan: Plan, results: list[MethodResult]) -> str:
    if len(results) > 1:
        return f"{len(results)} {plan.kind.what} compared"
    return f"{results[0].method.label} at {_count(len(results[0].grid), 'learning rate')}"


def _opening(plan: Plan, results: list[MethodResult]) -> str:
    complete = [result for result in results if result.is_complete]
    if not complete:
        return "No method has a result on every seed." if len(plan.seeds) > 1 else "No run ended."
    best = max(complete, key=lambda result: result.mean_score)
    run = best.first_run
    assert run is not None
    seeds = f"{len(plan.seeds)} seeds" if len(plan.seeds) > 1 else "one seed, which decides little"
    left_out = len(results) - len(complete)
    without = f", of the methods with a result on every seed ({left_out} without)" * bool(left_out)
    return (
        f"{plan.metric.best_word} validation {plan.metric.word}{without}: {best.method.label}, "
        f"{statistics.fmean(best.scores):.4f}, with {_memory(plan, best)}. "
        f"{format_count(run.info.get('model_parameters'))} parameters, "
        f"{format_count(best.mean('tokens'))} tokens a run, {seeds}. At a seed, every method "
        "starts from the same weights and sees the same batches."
    )


def _memory(plan: Plan, result: MethodResult) -> str:
    if plan.kind.trains_same_weights:
        share = format_share(
            result.mean("projected_state_bytes"), result.mean("adamw_projected_state_bytes"), 0
        )
        return f"{share} of AdamW's state on the projected weights"
    trained = format_count(result.mean("trainable_parameters"))
    return f"{trained} weights trained and {format_bytes(result.mean('state_bytes'))} of state"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)


def _result_sections(plan: Plan, results: list[MethodResult]) -> Iterator[str]:
    """Yield the table, and what happened where there is no result."""
    rows = rows_of(results, plan.kind)
    headers = list(rows[0])
    sources = {run.summary.get("peak_bytes_source") for r in results for run in r.runs.values()}
    of_process = " Peak memory on a CPU is that of the whole process."
    of_process *= "process resident set" in sources
    yield page.section(
        "Results",
        page.paragraph(
            "Click a column's title to sort. Numbers are means over the seeds, at the rates chosen "
            f"on the first; ± is the standard deviation. {_STATE[plan.kind.trains_same_weights]}"
            f"{of_process}{_OPERATIONS * has_growing_depth(results)}"
        ),
        page.sortable_table(
            headers,
            [list(row.values()) for row in rows],
            sorted_by=headers.index(plan.metric.title),
            is_falling=plan.metric.is_higher_better,
        ),
    )
    if trouble := list(_trouble(plan, results)):
        yield page.section("Runs without a result", page.remarks(trouble))


def _trouble(plan: Plan, results: list[MethodResult]) -> Iterator[tuple[str, str]]:
    """Yield each run without a result, and what it said."""
    for result in results:
        for entry in result.grid:
            if not entry["metrics"]:
                cell = Cell(result.method, entry["lr"], entry["plain_lr"], plan.seeds[0])
                yield describe_cell(cell), in_words(entry["status"], entry["message"])
        for seed, said in result.lost.items():
            assert result.chosen is not None
            yield describe_cell(replace(result.chosen, seed=seed)), said


def _plot_sections(
    plan: Plan, results: list[MethodResult], drawn: dict[str, str], faults: dict[str, str]
) -> Iterator[str]:
    title_of, note_of = titles(plan), notes(plan)
    common = [name for name in title_of if name in drawn]
    for place, name in enumerate(common):
        has_neighbour = place < len(common) // 2 * 2
        note = page.paragraph(note_of[name])
        yield page.section(title_of[name], note, drawn[name], is_half=has_neighbour)
    for result in results:
        if (name := ranks_name(result)) in drawn:
            yield page.section(f"Ranks of {result.method.label}", drawn[name])
    if faults:
        yield page.section("Plots that could not be drawn", page.remarks(faults.items()))


def _rates_section(plan: Plan, results: list[MethodResult]) -> str:
    rows = []
    for result in results:
        for entry in result.grid:
            rates = [ABSENT if entry[name] is None else f"{entry[name]:g}" for name in RATES]
            score = entry["metrics"].get(plan.metric.name)
            is_chosen = result.chosen is not None and all(
                entry[name] == getattr(result.chosen, name) for name in RATES
            )
            text = entry["status"] if score is None else f"{score:.4f}{' (chosen)' * is_chosen}"
            rows.append([result.method.label, *rates, text])
    return page.section(
        "Learning rates tried",
        page.paragraph("On the first seed."),
        page.fold(
            _count(len(rows), "run"),
            page.table(["Method", "lr", "plain lr", plan.metric.title], rows),
            is_open=len(results) == 1,
        ),
    )


def _reproduction(
    plan: Plan, content: dict[str, Any], results: list[MethodResult]
) -> Iterator[str]:
    command = ["adarankgrad", "compare", "--config", _CONFIG_NAME, "--output", FRESH_FOLDER]
    yield page.paragraph(f"All of it, with the lines below saved as {_CONFIG_NAME}:")
    yield page.code_block(shlex.join(command))
    yield page.code_block(comparison_toml(plan))
    tokenizer = "; a tokenizer that was trained here is read from here"
    yield page.paragraph(
        "One method, at its chosen rates on the first seed"
        f"{tokenizer * plan.tokenizer_dir.is_dir()}."
    )
    for result, method in zip(results, content["methods"], strict=True):
        if method["command"]:
            yield page.code_block(shlex.join(method["command"]))
            report = result.first_run and result.first_run.path / REPORT_NAME
            if report and Path(report).is_file():
                target = Path(report).relative_to(plan.output).as_posix()
                yield page.link(target, f"Report of {result.method.label}, first seed")
    yield page.definitions(_facts(content["environment"]))


def _facts(environment: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield from environment["versions"].items()
    names = {
        "device": "device",
        "num_threads": "threads a run",
        "num_cores": "cores",
        "workers": "runs at a time",
        "commit": "commit",
        "created": "written",
    }
    for key, name in names.items():
        value = environment[key]
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value or "")
        if text:
            yield name, text
