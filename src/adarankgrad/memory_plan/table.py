"""A plan as people read it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from adarankgrad.memory_plan.plan import CHECKPOINTING, Plan, Row
from adarankgrad.train.units import format_bytes, format_count

if TYPE_CHECKING:
    from rich.table import Table

# Part of a prediction: heading, short enough for a terminal of 80 columns.
_PARTS = {
    "weights": "weight",
    "gradients": "grads",
    "state": "state",
    "activations": "activ",
    "workspace": "work",
    "peak": "peak",
}
_SWITCHES = {
    "accumulate_in_backward": "projected in backward",
    "int8_state": "8-bit state",
    CHECKPOINTING: "checkpointing",
}
_SIGNS = {"accumulate_in_backward": "+back", "int8_state": "+int8", CHECKPOINTING: "+ckpt"}


def table_of(plan: Plan) -> Table:
    """Return a row for each method and switches; what fits is marked."""
    from rich.box import SIMPLE
    from rich.table import Table

    config, memory = plan.request.config, plan.request.memory
    is_large = max(row.prediction.peak for row in plan.rows) >= 2**30
    unit, size = ("GiB", 2**30) if is_large else ("MiB", 2**20)
    table = Table(
        title=(
            f"{config.model}: {format_count(plan.num_weights)} weights in {config.precision}, "
            f"{config.batch_size} x {config.seq_len} tokens; {unit}"
        ),
        title_justify="left",
        header_style="bold",
        box=SIMPLE,
        padding=0,
    )
    table.add_column("method", no_wrap=True)
    for heading in _PARTS.values():
        table.add_column(heading, justify="right", no_wrap=True)
    if memory is not None:
        table.add_column("fits", justify="right", no_wrap=True)
        table.add_column("batch", justify="right", no_wrap=True)
    last = None
    for row in plan.rows:
        if last not in (None, row.method):
            table.add_section()
        last = row.method
        table.add_row(*_cells(row, memory, size))
    return table


def advice(plan: Plan) -> Iterator[str]:
    """Say what the table's signs mean, what fits, what saves most, and what is left out."""
    selected, memory = plan.selected, plan.request.memory
    used = [switch for switch in _SIGNS if any(switch in row.switches for row in plan.rows)]
    yield "; ".join(f"{_SIGNS[switch]}: {_SWITCHES[switch]}" for switch in used) + "."
    if memory is not None:
        yield "batch: the largest micro-batch that fits."
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


def _cells(row: Row, memory: int | None, unit: int) -> list[str]:
    prediction = row.prediction
    name = " ".join([row.method, "".join(_SIGNS[switch] for switch in row.switches)]).strip()
    cells = [name, *(_in_units(getattr(prediction, part) / unit) for part in _PARTS)]
    if memory is not None:
        cells += ["yes" if prediction.peak <= memory else "no", str(row.largest_batch)]
    return cells


def _in_units(size: float) -> str:
    return f"{size:.1f}" if size >= 10 else f"{size:.2f}"
