"""What a comparison found: numbers of each method at its chosen rates, over the seeds."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from typing import Any

from adarankgrad.compare.cells import flags_of, outcome_of
from adarankgrad.compare.plan import Cell, Method, Plan
from adarankgrad.train.record import RunRecord, load_run


@dataclass(frozen=True)
class MethodResult:
    """One method's runs.

    Attributes:
        method: What was compared.
        grid: Every rate tried on the first seed, with its outcome.
        chosen: The cell with the lowest loss of those, or None where none came to its end.
        runs: Seed to finished run, at the chosen rates.
        lost: What happened to seeds without a finished run.
    """

    method: Method
    grid: list[dict[str, Any]]
    chosen: Cell | None
    runs: dict[int, RunRecord]
    lost: dict[int, str]

    @property
    def first_run(self) -> RunRecord | None:
        """The finished run of the lowest place in the seeds, for plots of a single run."""
        return next(iter(self.runs.values()), None)

    @property
    def losses(self) -> list[float]:
        """Validation losses over the seeds."""
        return [run.summary["val_loss"] for run in self.runs.values()]

    def mean(self, key: str) -> float | None:
        """Mean of a number of the summaries over the seeds, None where no run has it."""
        values = [run.summary.get(key) for run in self.runs.values()]
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if known else None

    def mean_rank(self, index: int) -> float | None:
        """Mean over the seeds of the first (0) or last (-1) logged mean rank."""
        ranks = [run.mean_ranks[index] for run in self.runs.values() if run.mean_ranks]
        return statistics.fmean(ranks) if ranks else None

    @property
    def highest_projected_state_bytes(self) -> int | None:
        """The most state that projected weights had at a logged step of any run."""
        highest = [
            max(row["state_bytes"] for row in run.train)
            - (run.summary["state_bytes"] - run.summary["projected_state_bytes"])
            for run in self.runs.values()
            if run.train
        ]
        return max(highest, default=None)

    @property
    def has_changing_ranks(self) -> bool:
        """Whether the first run has ranks, and they are not the same throughout."""
        if self.first_run is None:
            return False
        rows = [[layer["rank"] for layer in row["layers"]] for row in self.first_run.ranks]
        return any(row != rows[0] for row in rows)

    @property
    def is_at_edge(self) -> bool:
        """Whether a better rate may lie outside the grid: the chosen one is the last at an end."""
        if self.chosen is None:
            return False
        pairs = ((self.chosen.lr, self.method.lrs), (self.chosen.plain_lr, self.method.plain_lrs))
        return any(len(grid) > 1 and rate in (min(grid), max(grid)) for rate, grid in pairs)

    def as_dict(self, plan: Plan) -> dict[str, Any]:
        """Return plain numbers, for results.json."""
        losses = self.losses
        plain = _difference(self.mean("state_bytes"), self.mean("projected_state_bytes"))
        return {
            "label": self.method.label,
            "settings": self.method.settings,
            "lr": self.chosen.lr if self.chosen else None,
            "plain_lr": self.chosen.plain_lr if self.chosen else None,
            "is_at_edge_of_grid": self.is_at_edge,
            "val_loss": {
                "mean": statistics.fmean(losses) if losses else None,
                "standard_deviation": statistics.stdev(losses) if len(losses) > 1 else None,
                "by_seed": {str(seed): run.summary["val_loss"] for seed, run in self.runs.items()},
            },
            "projected_state_bytes": self.mean("projected_state_bytes"),
            "highest_projected_state_bytes": self.highest_projected_state_bytes,
            "adamw_projected_state_bytes": self.mean("adamw_projected_state_bytes"),
            "plain_state_bytes": plain,
            "peak_bytes": self.mean("peak_bytes"),
            "optimizer_s": self.mean("optimizer_s"),
            "elapsed_s": self.mean("elapsed_s"),
            "tokens": self.mean("tokens"),
            "tokens_per_second": self.mean("tokens_per_second"),
            "mean_rank_first": self.mean_rank(0),
            "mean_rank_last": self.mean_rank(-1),
            "grid": self.grid,
            "lost": {str(seed): message for seed, message in self.lost.items()},
            "command": command_of(plan, self.chosen) if self.chosen else None,
            "commits": sorted({run.commit for run in self.runs.values()}),
        }


def collect(plan: Plan) -> list[MethodResult]:
    """Read the results of every method from the comparison's folder."""
    return [_collect(plan, method) for method in plan.methods]


def best_cell(plan: Plan, method: Method) -> Cell | None:
    """Return the cell with the lowest validation loss on the first seed, if any is done."""
    cells = [Cell(method, lr, plain_lr, plan.seeds[0]) for lr, plain_lr in method.rates]
    losses = [(outcome_of(plan, cell).val_loss, cell) for cell in cells]
    done = [(loss, cell) for loss, cell in losses if loss is not None]
    return min(done, key=lambda entry: entry[0])[1] if done else None


def command_of(plan: Plan, cell: Cell) -> list[str]:
    """Return the command that repeats a cell's run."""
    return ["adarankgrad", "train", *flags_of(plan.config(cell))]


def _collect(plan: Plan, method: Method) -> MethodResult:
    grid = []
    for lr, plain_lr in method.rates:
        outcome = outcome_of(plan, Cell(method, lr, plain_lr, plan.seeds[0]))
        grid.append(
            {
                "lr": lr,
                "plain_lr": plain_lr,
                "status": outcome.status,
                "val_loss": outcome.val_loss,
                "message": outcome.message,
            }
        )
    chosen = best_cell(plan, method)
    if chosen is None:
        return MethodResult(method, grid, None, {}, {})
    runs, lost = {}, {}
    for seed in plan.seeds:
        cell = replace(chosen, seed=seed)
        outcome = outcome_of(plan, cell)
        if outcome.status == "done":
            runs[seed] = load_run(plan.run_dir(cell))
        else:
            lost[seed] = f"{outcome.status}: {outcome.message}".removesuffix(": ")
    return MethodResult(method, grid, chosen, runs, lost)


def _difference(whole: float | None, part: float | None) -> float | None:
    return None if whole is None or part is None else whole - part
