"""Every optimizer that the contract suite runs. A new one joins by one line in `CASES`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from adarankgrad import AdaRankGrad, Fira, GaLore, OrthogonalizedSGD
from adarankgrad.optim.engine import SubspaceOptimizer


@dataclass(frozen=True, eq=False)
class Case:
    """One optimizer with the options that it is tested at.

    Attributes:
        name: what pytest calls it.
        constructor: the class, or a preset of it.
        options: on top of `FREQUENT`, which makes refreshes frequent and ranks change.
        learned_loss: what a small regression must get below (`test_learning`).
        has_basis: whether it projects gradients at all.
        first_update: steps that a matrix takes before it is first updated.
    """

    name: str
    constructor: Callable[..., SubspaceOptimizer]
    options: dict[str, Any] = field(default_factory=dict)
    learned_loss: float = 0.09
    has_basis: bool = True
    first_update: int = 0

    def build(self, params: Any, **overrides: Any) -> SubspaceOptimizer:
        """Build the optimizer; overrides are options of this one test."""
        return self.constructor(
            params, **self.in_its_words({**FREQUENT, **self.options, **overrides})
        )

    def option_names(self) -> set[str]:
        """Options that the constructor takes, those of the class behind a preset included."""
        names = set(inspect.signature(self.constructor).parameters)
        owner = getattr(self.constructor, "__self__", None)
        if owner is not None:
            names |= set(inspect.signature(owner).parameters)
        return names

    def in_its_words(self, options: dict[str, Any]) -> dict[str, Any]:
        """Name options as the method does, and leave out those it does not have."""
        names = inspect.signature(self.constructor).parameters
        if "rank" not in names and "max_rank" in names:
            return options
        renamed = {_NAMES_AT_FIXED_RANK.get(name, name): value for name, value in options.items()}
        return {name: value for name, value in renamed.items() if name in names}

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

_NAMES_AT_FIXED_RANK = {"max_rank": "rank", "refresh_max_gap": "refresh_every"}

PAPER: dict[str, Any] = {"energy": 0.9, "residual": "none"}
INT8: dict[str, Any] = {"state_dtype": "int8", "basis_dtype": "int8"}

CASES = [
    Case("adarankgrad-default", AdaRankGrad),
    Case("adarankgrad", AdaRankGrad, {**PAPER, "carry": "squared"}),
    Case("adarankgrad-long-side", AdaRankGrad, {**PAPER, "side": "long"}),
    Case("adarankgrad-carry-ldadam", AdaRankGrad, {**PAPER, "carry": "ldadam"}),
    Case("adarankgrad-carry-published", AdaRankGrad, {**PAPER, "carry": "published"}),
    Case("adarankgrad-carry-keep", AdaRankGrad, {**PAPER, "carry": "keep"}),
    Case("adarankgrad-carry-reset", AdaRankGrad, {**PAPER, "carry": "reset"}),
    Case("adarankgrad-monotone", AdaRankGrad, {**PAPER, "monotone": True}),
    Case("adarankgrad-refresh-energy", AdaRankGrad, {"refresh_energy": 0.7, **PAPER}),
    Case("adarankgrad-refresh-norm", AdaRankGrad, {"refresh_relative_norm": 0.8, **PAPER}),
    Case("adarankgrad-stagger", AdaRankGrad, {**PAPER, "stagger": True}),
    Case("adarankgrad-budget", AdaRankGrad, {**PAPER, "memory_budget": "1MiB"}),
    Case("adarankgrad-exact-basis", AdaRankGrad, {"basis": "exact", **PAPER}),
    Case("adarankgrad-sketched", AdaRankGrad, {"basis": "sketched", **PAPER}, first_update=1),
    Case("adarankgrad-sketched-residual", AdaRankGrad, {"basis": "sketched"}, first_update=1),
    Case("adarankgrad-published", AdaRankGrad.published, {"refresh_norm": 1e-4}),
    Case("adarankgrad-residual-fira", AdaRankGrad, {"residual": "fira"}),
    Case("adarankgrad-residual-normalized", AdaRankGrad, {"residual": "normalized"}),
    Case("adarankgrad-update-orthogonalized", AdaRankGrad, {"update": "orthogonalized"}),
    Case("adarankgrad-bfloat16-state", AdaRankGrad, {**PAPER, "state_dtype": "bfloat16"}),
    Case("adarankgrad-int8-state", AdaRankGrad, {"state_dtype": "int8"}),
    Case("adarankgrad-int8-all", AdaRankGrad, {**PAPER, **INT8}),
    Case("adarankgrad-sketched-int8", AdaRankGrad, {"basis": "sketched", **INT8}, first_update=1),
    Case("adarankgrad-low-memory", AdaRankGrad.low_memory, first_update=1),
    Case("adarankgrad-bfloat16-basis", AdaRankGrad, {"basis_dtype": "bfloat16"}),
    Case("adarankgrad-stochastic", AdaRankGrad, {"weight_rounding": "stochastic"}),
    Case("adarankgrad-corrected", AdaRankGrad, {**PAPER, **INT8, "weight_rounding": "corrected"}),
    Case("galore", GaLore, {"scale": 1.0}),
    Case("galore-int8", GaLore, {"scale": 1.0, **INT8, "weight_rounding": "stochastic"}),
    # Its bases change signs at random, and kept moments then point the wrong way for a while.
    Case("galore-randomized", GaLore, {"basis": "randomized", "scale": 1.0}, learned_loss=0.15),
    Case("fira", Fira, {"scale": 1.0}),
    Case("orthogonalized-sgd", OrthogonalizedSGD, has_basis=False),
    Case("fira-official", Fira, {"residual": "official", "scale": 0.5}),
]

with_basis = pytest.mark.parametrize("case", [c for c in CASES if c.has_basis], ids=str)
"""For tests of what only optimizers with a basis have."""
