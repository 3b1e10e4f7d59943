"""What a comparison found: numbers of each method at its chosen rates, over the seeds."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from typing import Any

from adarankgrad.compare.cells import outcome_of
from adarankgrad.compare.metric import NATS_PER_TOKEN, Metric, metrics_of
from adarankgrad.compare.plan import Cell, Method, Plan
from adarankgrad.compare.reproduction import run_command
from adarankgrad.train.record import RunRecord, load_run
from adarankgrad.train.score import LOSS

RATES = ("lr", "plain_lr")
AT_EDGE = "at edge"
ONLY_ONE = "one tried"


@dataclass(frozen=True)
class MethodResult:
    """One method's runs.

    Attributes:
        method: What was compared.
        grid: Every rate tried on the first seed, with its outcome.
        chosen: The best cell of those, or None where none came to its end.
        runs: Seed to finished run, at the chosen rates.
        lost: What happened to seeds without a finished run.
        metric: What is the best.
    """

    method: Method
    grid: list[dict[str, Any]]
    chosen: Cell | None
    runs: dict[int, RunRecord]
    lost: dict[int, str]
    metric: Metric = NATS_PER_TOKEN

    @property
    def first_run(self) -> RunRecord | None:
        """The finished run of the lowest place in the seeds, for plots of a single run."""
        return next(iter(self.runs.values()), None)

    @property
    def metrics(self) -> dict[str, dict[int, float]]:
        """Every metric that all runs have, by name and seed; empty without runs."""
        by_seed = {seed: metrics_of(run.summary) for seed, run in self.runs.items()}
        first = next(iter(by_seed.values()), {})
        return {
            name: {seed: found[name] for seed, found in by_seed.items()}
            for name in first
            if all(name in found for found in by_seed.values())
        }

    @property
    def scores(self) -> list[float]:
        """What the runs are judged by, over the seeds."""
        return list(self.metrics.get(self.metric.name, {}).values())

    @property
    def mean_score(self) -> list[float]:
        """What methods with runs are compared by; higher is better."""
        means = {name: statistics.fmean(found.values()) for name, found in self.metrics.items()}
        return self.metric.score(means)

    def mean(self, key: str) -> float | None:
        """Mean of a number of the summaries over the seeds, None where no run has it."""
        values = [run.summary.get(key) for run in self.runs.values()]
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if known else None

    def described(self, key: str) -> list[Any]:
        """The different values of an entry of run.json, as ``device``, over the seeds."""
        return sorted({run.info[key] for run in self.runs.values() if run.info.get(key)})

    @property
    def num_seeds(self) -> int:
        """How many seeds there should be a run of."""
        return len(self.runs) + len(self.lost)

    @property
    def is_complete(self) -> bool:
        """Whether every seed has a finished run, so that its mean compares with others."""
        return bool(self.runs) and not self.lost

    def mean_rank(self, index: int) -> float | None:
        """Mean over the seeds of the first (0) or last (-1) logged mean rank."""
        ranks = [run.mean_ranks[index] for run in self.runs.values() if run.mean_ranks]
        return statistics.fmean(ranks) if ranks else None

    @property
    def plain_state_bytes(self) -> float | None:
        """Mean state of the weights that no method projects."""
        state, projected = (self.mean(key) for key in ("state_bytes", "projected_state_bytes"))
        return None if state is None or projected is None else state - projected

    @property
    def highest_projected_state_bytes(self) -> int | None:
        """The most state that projected weights had at a logged step of any run."""
        return max((max(sizes) for sizes in self._projected_state()), default=None)

    @property
    def mean_projected_state_bytes(self) -> float | None:
        """Mean of the state of projected weights over the logged steps and the runs."""
        means = [statistics.fmean(sizes) for sizes in self._projected_state()]
        return statistics.fmean(means) if means else None

    def _projected_state(self) -> list[list[int]]:
        """State of projected weights at the logged steps, of every run that has any."""
        return [
            [
                row["state_bytes"]
                - (run.summary["state_bytes"] - run.summary["projected_state_bytes"])
                for row in run.train
            ]
            for run in self.runs.values()
            if run.train
        ]

    @property
    def has_changing_ranks(self) -> bool:
        """Whether the first run has ranks, and they are not the same throughout."""
        if self.first_run is None:
            return False
        rows = [[layer["rank"] for layer in row["layers"]] for row in self.first_run.ranks]
        return any(row != rows[0] for row in rows)

    @property
    def rates(self) -> dict[str, float | None]:
        """The chosen ``lr`` and ``plain_lr``; training's default where none was given."""
        given = {name: getattr(self.chosen, name, None) for name in RATES}
        resolved = self.first_run.config if self.first_run else {}
        return {name: resolved.get(name) if rate is None else rate for name, rate in given.items()}

    @property
    def doubts(self) -> dict[str, str]:
        """Why a better rate may lie outside the grid, by ``lr`` and ``plain_lr``, or nothing."""
        grids = {"lr": self.method.lrs, "plain_lr": self.method.plain_lrs}
        if self.chosen is None:
            return dict.fromkeys(RATES, "")
        has_rate = {name: rate is not None for name, rate in self.rates.items()}
        return {
            name: _doubt(getattr(self.chosen, name), grid) if has_rate[name] else ""
            for name, grid in grids.items()
        }

    @property
    def is_at_edge(self) -> bool:
        """Whether a chosen rate is the first or last of several."""
        return AT_EDGE in self.doubts.values()

    def as_dict(self, plan: Plan) -> dict[str, Any]:
        """Return plain numbers, for results.json."""
        metrics = {name: _spread(found) for name, found in self.metrics.items()}
        return {
            "label": self.method.label,
            "settings": self.method.settings,
            **self.rates,
            "is_at_edge_of_grid": self.is_at_edge,
            "doubts": self.doubts,
            "is_complete": self.is_complete,
            "val_loss": metrics.get(LOSS, _spread({})),
            "metrics": metrics,
            "trainable_parameters": self.mean("trainable_parameters"),
            "state_bytes": self.mean("state_bytes"),
            "projected_state_bytes": self.mean("projected_state_bytes"),
            "highest_projected_state_bytes": self.highest_projected_state_bytes,
            "mean_projected_state_bytes": self.mean_projected_state_bytes,
            "adamw_projected_state_bytes": self.mean("adamw_projected_state_bytes"),
            "plain_state_bytes": self.plain_state_bytes,
            "peak_bytes": self.mean("peak_bytes"),
            "optimizer_s": self.mean("optimizer_s"),
            "elapsed_s": self.mean("elapsed_s"),
            "tokens": self.mean("tokens"),
            "tokens_per_second": self.mean("tokens_per_second"),
            "mean_rank_first": self.mean_rank(0),
            "mean_rank_last": self.mean_rank(-1),
            "grid": self.grid,
            "lost": {str(seed): message for seed, message in self.lost.items()},
            "command": run_command(plan, self.chosen) if self.chosen else None,
            "commits": self.described("commit"),
        }


def collect(plan: Plan) -> list[MethodResult]:
    """Read the results of every method from the comparison's folder."""
    return [_collect(plan, method) for method in plan.methods]


def in_words(status: str, message: str) -> str:
    """Say how a run without a result ended."""
    return f"{status}: {message}".removesuffix(": ")


def best_cell(plan: Plan, method: Method) -> Cell | None:
    """Return the cell that is best on the first seed, if any is done."""
    cells = [Cell(method, lr, plain_lr, plan.seeds[0]) for lr, plain_lr in method.rates]
    found = [(outcome_of(plan, cell).metrics, cell) for cell in cells]
    done = [(plan.metric.score(metrics), cell) for metrics, cell in found if metrics]
    return max(done, key=lambda entry: entry[0])[1] if done else None


def _collect(plan: Plan, method: Method) -> MethodResult:
    grid = []
    for lr, plain_lr in method.rates:
        outcome = outcome_of(plan, Cell(method, lr, plain_lr, plan.seeds[0]))
        grid.append(
            {
                "lr": lr,
                "plain_lr": plain_lr,
                "status": outcome.status,
                "val_loss": outcome.metrics.get(LOSS),
                "metrics": outcome.metrics,
                "message": outcome.message,
            }
        )
    chosen = best_cell(plan, method)
    if chosen is None:
        return MethodResult(method, grid, None, {}, {}, plan.metric)
    runs, lost = {}, {}
    for seed in plan.seeds:
        cell = replace(chosen, seed=seed)
        outcome = outcome_of(plan, cell)
        if outcome.status == "done":
            runs[seed] = load_run(plan.run_dir(cell))
        else:
            lost[seed] = in_words(outcome.status, outcome.message)
    return MethodResult(method, grid, chosen, runs, lost, plan.metric)


def _spread(found: dict[int, float]) -> dict[str, Any]:
    """Return mean and standard deviation of a metric over seeds, and its value at each."""
    values = list(found.values())
    return {
        "mean": statistics.fmean(values) if values else None,
        "standard_deviation": statistics.stdev(values) if len(values) > 1 else None,
        "by_seed": {str(seed): value for seed, value in found.items()},
    }


def _doubt(rate: float | None, grid: tuple[float, ...]) -> str:
    if len(grid) <= 1:
        return ONLY_ONE
    return AT_EDGE if rate in (min(grid), max(grid)) else ""
