"""The table of results: on the page with everything, in a terminal with what fits."""

from __future__ import annotations

import statistics

from rich.table import Table

from adarankgrad.compare.results import MethodResult
from adarankgrad.train.page import SortCell
from adarankgrad.train.units import (
    ABSENT,
    format_bytes,
    format_count,
    format_number,
    format_seconds,
    format_share,
)

LOSS = "Validation loss"
STATE = "State at the end"


def row_of(result: MethodResult) -> dict[str, SortCell]:
    """Return the cells of a method by their column's title."""
    plain = result.plain_state_bytes
    peak, seconds, speed = (
        result.mean(key) for key in ("peak_bytes", "optimizer_s", "tokens_per_second")
    )
    return {
        "Method": SortCell(result.method.label, result.method.label),
        LOSS: _loss(result),
        STATE: _state(result, result.mean("projected_state_bytes")),
        "Highest state": _state(result, result.highest_projected_state_bytes),
        "Plain state": SortCell(format_bytes(plain), plain),
        "Peak memory": SortCell(format_bytes(peak), peak),
        "Optimizer time": SortCell(format_seconds(seconds), seconds),
        "Tokens/s": SortCell(format_count(speed), speed),
        "Rank": _rank(result),
        "lr": _rate(result, "lr"),
        "Plain lr": _rate(result, "plain_lr"),
    }


def terminal_table(results: list[MethodResult]) -> Table:
    """Return the results as a table narrow enough for a terminal, the lowest loss first."""
    table = Table()
    for header in ("Method", LOSS, STATE, "Tokens/s", "lr"):
        table.add_column(header, justify="left" if header == "Method" else "right")
    rows = [row_of(result) for result in results]
    for row in sorted(rows, key=lambda row: (row[LOSS].value is None, row[LOSS].value or 0)):
        speed = row["Tokens/s"].text
        losses, rate = (f"{row[name].text} {row[name].note}".strip() for name in (LOSS, "lr"))
        table.add_row(row["Method"].text, losses, row[STATE].note or row[STATE].text, speed, rate)
    return table


def _loss(result: MethodResult) -> SortCell:
    losses = result.losses
    if not losses:
        return SortCell("; ".join(sorted({str(entry["status"]) for entry in result.grid})), None)
    notes = [f"± {statistics.stdev(losses):.4f}"] if len(losses) > 1 else []
    if not result.is_complete:
        notes.append(f"{len(losses)} of {result.num_seeds} seeds")
    mean = statistics.fmean(losses)
    return SortCell(format_number(mean, 4), mean, ", ".join(notes))


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
