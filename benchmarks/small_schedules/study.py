"""Runs that are kept, and a learning rate for each method from a grid on the first seed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import environment, median, spread

MOST_RATES = 5

Run = dict[str, Any]
Result = dict[str, Any]


@dataclass(frozen=True)
class Store:
    """A folder with one JSON file a run, so that a stopped benchmark goes on where it was.

    Attributes:
        folder: Where the files are.
        commits: Of the code that made the runs that were asked for, "+" where it had changed since.
    """

    folder: Path
    commits: set[str] = field(default_factory=set)

    def get(self, part: str, run: Run, work: Callable[[Run], Result]) -> Result:
        """Return the result of a run, from its file or by working."""
        digest = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()[:16]
        path = self.folder / part / f"{digest}.json"
        if not path.exists():
            before = environment()
            commit = before["commit"] + "+" * before["has_uncommitted_changes"]
            kept = {"run": run, "commit": commit, "result": work(run)}
            result = kept["result"]
            _write(path, json.dumps(kept))
            name = f"{part}: {run['label']}, lr {run['lr']:g}, seed {run['seed']}"
            outcome = f"{result['score']:.4f}, {result['cpu_s']:.1f} s"
            print(f"{name}: {outcome}", file=sys.stderr, flush=True)
        known = json.loads(path.read_text())
        self.commits.add(known["commit"])
        return dict(known["result"])


@dataclass(frozen=True)
class Study:
    """What a part needs to make its runs.

    Attributes:
        part: Its name.
        store: Where its runs are.
        seeds: Rates are chosen on the first.
        work: Makes a run and returns its result, of which the lowest ``score`` is best.
    """

    part: str
    store: Store
    seeds: Sequence[int]
    work: Callable[[Run], Result]

    def search(self, run: Run, lrs: Sequence[float]) -> dict[str, Any]:
        """Run a method at its best rate with every seed.

        While the best rate is at an edge of the grid, the grid grows beyond it, up to
        `MOST_RATES`.

        Returns:
            The rate, the grid, whether the best is at its edge, and ``runs``, a result a seed.
        """
        first, *others = self.seeds
        rates = list(lrs)
        while True:
            scores = {lr: self.result(run, lr, first)["score"] for lr in rates}
            best = min(rates, key=lambda lr: finite(scores[lr]))
            is_at_edge = best in (rates[0], rates[-1])
            if not is_at_edge or len(rates) >= MOST_RATES or len(rates) < 2:
                break
            rates = _widened(rates, best)
        return {
            "lr": best,
            "is_at_edge_of_grid": is_at_edge,
            "grid": [
                {"lr": lr, "score": s if math.isfinite(s) else None} for lr, s in scores.items()
            ],
            "runs": [self.result(run, best, seed) for seed in (first, *others)],
        }

    def result(self, run: Run, lr: float, seed: int) -> Result:
        """Make one run."""
        return self.store.get(self.part, {**run, "lr": lr, "seed": seed}, self.work)


def over_seeds(values: Sequence[float | None]) -> dict[str, Any]:
    """Median and spread over seeds; both None where a seed has no finite value."""
    values = [value if value is None or math.isfinite(value) else None for value in values]
    known = [value for value in values if value is not None]
    is_whole = len(known) == len(values)
    return {
        "median": median(known) if is_whole else None,
        "spread": spread(known) if is_whole else None,
        "seeds": list(values),
    }


def as_text(figures: dict[str, Any], decimals: int = 3) -> str:
    """Write ``median [lowest, highest]``, or how many seeds have a value."""
    if figures["median"] is None:
        known = sum(value is not None for value in figures["seeds"])
        return f"reached by {known} of {len(figures['seeds'])}"
    low, high = figures["spread"]
    return f"{figures['median']:.{decimals}f} [{low:.{decimals}f}, {high:.{decimals}f}]"


def rate_text(method: dict[str, Any]) -> str:
    """Write the chosen rate, and whether a better one may lie outside the grid."""
    return f"{method['lr']:g}" + " (edge)" * method["is_at_edge_of_grid"]


def _widened(rates: list[float], best: float) -> list[float]:
    factor = rates[1] / rates[0]
    beyond = best / factor if best == rates[0] else best * factor
    return sorted([*rates, float(f"{beyond:.3g}")])


def finite(score: float) -> float:
    """Return a score, infinite where training broke down."""
    return score if math.isfinite(score) else math.inf


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(text)
    os.replace(unfinished, path)
