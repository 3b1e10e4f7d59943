"""The table of results: on the page with everything, in a terminal with what fits."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from rich.table import Table

from adarankgrad.compare.kinds import Kind
from adarankgrad.compare.results import MethodResult
from adarankgrad.train.page import SortCell
from adarankgrad.train.score import LOSS
from adarankgrad.train.units import (
    ABSENT,
    format_bytes,
    format_count,
    format_number,
    format_seconds,
    format_share,
)

STATE = "State at the end"
ALL_STATE = "Optimizer state"


def row_of(result: MethodResult, kind: Kind) -> dict[str, SortCell]:
    """Return the cells of a method by their column's title."""
    if kind.trains_same_weights:
        state = _state_of_projected(result)
        speed = {"Tokens/s": _mean(result, "tokens_per_second", format_count)}
    else:
        state = _state_of_trained(result)
        speed = {"Time": _mean(result, "elapsed_s", format_seconds)}
    return {
        "Method": SortCell(result.method.label, result.method.label),
        kind.metric.title: _metric(result, kind.metric.name),
        **state,
        "Peak memory": _mean(result, "peak_bytes", format_bytes),
        "Optimizer time": _mean(result, "optimizer_s", format_seconds),
        **speed,
        "Rank": _rank(result),
        "lr": _rate(result, "lr"),
        "Plain lr": _rate(result, "plain_lr"),
    }


def terminal_table(results: list[MethodResult], kind: Kind) -> Table:
    """Return the results as a table narrow enough for a terminal, the best first."""
    score = kind.metric.title
    own = (STATE, "Tokens/s") if kind.trains_same_weights else ("Trainable", ALL_STATE, "Time")
    headers = ("Method", score, *own, "lr")
    table = Table()
    for header in headers:
        table.add_column(header, justify="left" if header == "Method" else "right")
    finished = sorted((r for r in results if r.runs), key=lambda r: r.mean_score, reverse=True)
    for result in [*finished, *(result for result in results if not result.runs)]:
        row = row_of(result, kind)
        texts = {name: cell.text for name, cell in row.items()}
        for name in (score, "lr"):
            texts[name] = f"{texts[name]} {row[name].note}".strip()
        if STATE in row:
            texts[STATE] = row[STATE].note or texts[STATE]
        table.add_row(*(texts[name] for name in headers))
    return table


def _state_of_projected(result: MethodResult) -> dict[str, SortCell]:
    """Return the state of the weights that low-rank methods project, and that of the others."""
    plain = result.plain_state_bytes
    return {
        STATE: _state(result, result.mean("projected_state_bytes")),
        "Highest state": _state(result, result.highest_projected_state_bytes),
        "Plain state": SortCell(format_bytes(plain), plain),
    }


def _state_of_trained(result: MethodResult) -> dict[str, SortCell]:
    """Return the loss beside another metric, how many weights are trained, and their state."""
    loss = {} if result.metric.is_loss else {"Validation loss": _metric(result, LOSS)}
    return {
        **loss,
        "Trainable": _mean(result, "trainable_parameters", format_count),
        ALL_STATE: _mean(result, "state_bytes", format_bytes),
    }


def _metric(result: MethodResult, name: str) -> SortCell:
    values = list(result.metrics.get(name, {}).values())
    if not values:
        return SortCell("; ".join(sorted({str(entry["status"]) for entry in result.grid})), None)
    notes = [f"± {statistics.stdev(values):.4f}"] if len(values) > 1 else []
    if not result.is_complete:
        notes.append(f"{len(values)} of {result.num_seeds} seeds")
    mean = statistics.fmean(values)
    return SortCell(format_number(mean, 4), mean, ", ".join(notes))


def _mean(result: MethodResult, key: str, write: Callable[[float | None], str]) -> SortCell:
    value = result.mean(key)
    return SortCell(write(value), value)


def _state(result: MethodResult, size: float | None) -> SortCell:
    share = format_share(size, result.mean("adamw_projected_state_bytes"))
    return SortCell(format_bytes(size), size, "" if share == ABSENT else share)


def _rank(result: MethodResult) -> SortCell:
    first, last = result.mean_rank(0), result.mean_rank(-1)
    if first is None or last is None:
        return SortCell(ABSENT, None)
    return SortCell(f"{first:.1f} → {last:.1f}", last)


def _rate(result: MethodResult, name: str) -> SortCell:
    rate = result.rates[name]
    return SortCell(ABSENT if rate is None else f"{rate:g}", rate, result.doubts[name])
