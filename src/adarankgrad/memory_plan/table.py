"""A plan as people read it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from adarankgrad.memory_plan.plan import CHECKPOINTING, Plan, Row
from adarankgrad.train.units import format_bytes, format_count

if TYPE_CHECKING:
    from rich.table import Table

_PARTS = ("weights", "gradients", "state", "activations", "workspace", "peak")
_SWITCHES = {
    "accumulate_in_backward": "projected in backward",
    "int8_state": "8-bit state",
    CHECKPOINTING: "checkpointing",
}


def table_of(plan: Plan) -> Table:
    """Return a row for each method and switches; what fits is marked."""
    from rich.table import Table

    config, memory = plan.request.config, plan.request.memory
    table = Table(
        title=(
            f"{config.model}: {format_count(plan.num_weights)} weights in {config.precision}, "
            f"{config.batch_size} x {config.seq_len} tokens"
        ),
        title_justify="left",
        header_style="bold",
    )
    table.add_column("method", overflow="fold")
    for name in (*_PARTS, "peak is in"):
        table.add_column(name, justify="right")
    if memory is not None:
        table.add_column(f"fits {format_bytes(memory)}", justify="right")
        table.add_column("largest batch", justify="right")
    last = None
    for row in plan.rows:
        if last not in (None, row.method):
            table.add_section()
        last = row.method
        table.add_row(*_cells(row, memory))
    return table


def advice(plan: Plan) -> Iterator[str]:
    """Say what fits, what saves most, and what the numbers leave out."""
    selected, memory = plan.selected, plan.request.memory
    if memory is not None:
        fitting = [row for row in plan.rows if row.prediction.peak <= memory]
        yield f"{len(fitting)} of {len(plan.rows)} fit {format_bytes(memory)}."
    savings = plan.savings()
    best = next(iter(savings), None)
    if best is not None and savings[best] > 0:
        saved = format_bytes(savings[best])
        yield f"For {selected.method}, {_SWITCHES[best]} saves most by itself: {saved}."
    rank = "their memory budget" if plan.as_dict()["rank"] == "memory_budget" else "their ceiling"
    yield (
        f"Ranks are taken at {rank}. Not counted: CUDA's own memory (about half a GiB) and what "
        "the allocator loses between blocks."
    )


def _cells(row: Row, memory: int | None) -> list[str]:
    prediction = row.prediction
    name = " + ".join([row.method, *(_SWITCHES[switch] for switch in row.switches)])
    cells = [name, *(format_bytes(getattr(prediction, part)) for part in _PARTS)]
    cells.append(prediction.peak_phase)
    if memory is not None:
        cells += ["yes" if prediction.peak <= memory else "no", str(row.largest_batch)]
    return cells
