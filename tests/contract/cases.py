"""Every optimizer that the contract suite runs. A new one joins by one line in `CASES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from adarankgrad import AdaRankGrad
from adarankgrad.optim.engine import SubspaceOptimizer


@dataclass(frozen=True, eq=False)
class Case:
    """One optimizer with the options that it is tested at.

    Attributes:
        name: what pytest calls it.
        constructor: the class, or a preset of it.
        options: on top of `FREQUENT`, which makes refreshes frequent and ranks change.
    """

    name: str
    constructor: Callable[..., SubspaceOptimizer]
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, params: Any, **overrides: Any) -> SubspaceOptimizer:
        """Build the optimizer; overrides are options of this one test."""
        return self.constructor(params, **{**FREQUENT, **self.options, **overrides})

    def __str__(self) -> str:
        return self.name


FREQUENT: dict[str, Any] = {
    "lr": 0.01,
    "max_rank": 6,
    "min_rank": 1,
    "refresh_max_gap": 3,
    "refresh_min_gap": 1,
    "seed": 7,
}

CASES = [
    Case("adarankgrad", AdaRankGrad, {"energy": 0.9, "carry": "squared"}),
    Case("adarankgrad-long-side", AdaRankGrad, {"energy": 0.9, "side": "long"}),
    Case("adarankgrad-carry-ldadam", AdaRankGrad, {"energy": 0.9, "carry": "ldadam"}),
    Case("adarankgrad-carry-published", AdaRankGrad, {"energy": 0.9, "carry": "published"}),
    Case("adarankgrad-carry-keep", AdaRankGrad, {"energy": 0.9, "carry": "keep"}),
    Case("adarankgrad-carry-reset", AdaRankGrad, {"energy": 0.9, "carry": "reset"}),
    Case("adarankgrad-monotone", AdaRankGrad, {"energy": 0.9, "monotone": True}),
    Case("adarankgrad-refresh-energy", AdaRankGrad, {"refresh_energy": 0.7, "energy": 0.9}),
    Case("adarankgrad-refresh-norm", AdaRankGrad, {"refresh_relative_norm": 0.8, "energy": 0.9}),
    Case("adarankgrad-exact-basis", AdaRankGrad, {"basis": "exact", "energy": 0.9}),
    Case("adarankgrad-published", AdaRankGrad.published, {"refresh_norm": 1e-4}),
]
