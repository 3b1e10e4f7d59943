"""The table of results: on the page with everything, in a terminal with what fits."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from rich.table import Table

from adarankgrad.compare.kinds import Kind
from adarankgrad.compare.operations import Operations, operations_of
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
OPERATIONS = "Operations"


def rows_of(results: list[MethodResult], kind: Kind) -> list[dict[str, SortCell]]:
    """Return the cells of every method by their column's title."""
    costs = operations_of(results)
    return [_row_of(result, kind, cost) for result, cost in zip(results, costs, strict=True)]


def _row_of(result: MethodResult, kind: Kind, operations: Operations | None) -> dict[str, SortCell]:
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
        **({} if operations is None else _operations(operations)),
        "Rank": _rank(result),
        "lr": _rate(result, "lr"),
        "Plain lr": _rate(result, "plain_lr"),
    }


def terminal_table(results: list[MethodResult], kind: Kind) -> Table:
    """Return the results as a table narrow enough for a terminal, the best first."""
    score = kind.metric.title
    own = (STATE, "Tokens/s") if kind.trains_same_weights else ("Trainable", ALL_STATE, "Time")
    rows = rows_of(results, kind)
    costs = [title for title in rows[0] if title.startswith(OPERATIONS)]
    headers = ("Method", score, *own, *costs, "lr")
    table = Table()
    for header in headers:
        table.add_column(header, justify="left" if header == "Method" else "right")
    order = [place for place, result in enumerate(results) if result.runs]
    order.sort(key=lambda place: results[place].mean_score, reverse=True)
    order += [place for place, result in enumerate(results) if not result.runs]
    for row in (rows[place] for place in order):
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


def _operations(operations: Operations) -> dict[str, SortCell]:
    """Return the operations in all, and to the loss of the first method as a ratio to its own."""
    ratio, to_loss = operations.ratio, operations.to_loss
    seeds = f"{operations.num_reached} of {len(to_loss)} seeds"
    is_mixed = 0 < operations.num_reached < len(to_loss)
    if ratio is None:
        text = "not reached" if to_loss else ABSENT
        reached = SortCell(text, None, f"reached on {seeds}" * is_mixed)
    else:
        text = f"× {ratio:.2f}" + f" ({seeds})" * is_mixed
        reached = SortCell(text, ratio, format_count(operations.median_to_loss))
    return {
        OPERATIONS: SortCell(format_count(operations.total), operations.total),
        f"{OPERATIONS} to the loss of {operations.reference}": reached,
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
