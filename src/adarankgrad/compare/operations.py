"""What methods cost in operations, for comparisons in which depth grows and tokens do not tell."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adarankgrad.compare.results import MethodResult
from adarankgrad.train.record import RunRecord


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of forward and backward passes of a method's runs.

    Attributes:
        reference: Label of the first method, whose last validation loss is to be reached.
        total: In all, a mean over the seeds; None where they were not counted.
        to_loss: Until the loss that the first method ended with at that seed, by seed; infinite
            where it was not reached. Seeds without a counted run of both are left out.
        of_reference: In all of the first method, at the seeds of ``to_loss``.
    """

    reference: str
    total: float | None
    to_loss: dict[int, float]
    of_reference: dict[int, float]

    @property
    def num_reached(self) -> int:
        """At how many seeds the loss was reached."""
        return sum(map(math.isfinite, self.to_loss.values()))

    @property
    def median_to_loss(self) -> float | None:
        """Median of ``to_loss``; None where most seeds do not reach it."""
        return _finite_median(list(self.to_loss.values()))

    @property
    def ratio(self) -> float | None:
        """Median of ``to_loss`` over the first method's operations at the seed, or None."""
        shares = [flops / self.of_reference[seed] for seed, flops in self.to_loss.items()]
        return _finite_median(shares)

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers, for results.json."""
        by_seed = {
            str(seed): flops if math.isfinite(flops) else None
            for seed, flops in self.to_loss.items()
        }
        return {
            "training_flops": self.total,
            "flops_to_loss": {
                "of": self.reference,
                "median": self.median_to_loss,
                "ratio": self.ratio,
                "by_seed": by_seed,
            },
        }


def operations_of(results: Sequence[MethodResult]) -> list[Operations | None]:
    """Return the operations of every method, or None for each where no method's depth grows."""
    if not has_growing_depth(results):
        return [None] * len(results)
    return [_operations(result, results[0]) for result in results]


def has_growing_depth(results: Sequence[MethodResult]) -> bool:
    """Tell whether the depth of any method grows, so that tokens differ in operations."""
    return any(run.has_growing_depth for result in results for run in result.runs.values())


def _operations(result: MethodResult, first: MethodResult) -> Operations:
    to_loss, of_reference = {}, {}
    for seed, run in result.runs.items():
        reference = first.runs.get(seed)
        if reference is None or not _is_counted(reference) or not _is_counted(run):
            continue
        flops = run.flops_to_loss(reference.summary["val_loss"])
        to_loss[seed] = math.inf if flops is None else flops
        of_reference[seed] = float(reference.summary["training_flops"])
    return Operations(first.method.label, result.mean("training_flops"), to_loss, of_reference)


def _is_counted(run: RunRecord) -> bool:
    return run.summary.get("training_flops") is not None


def _finite_median(values: list[float]) -> float | None:
    median = statistics.median(values) if values else math.inf
    return median if math.isfinite(median) else None
