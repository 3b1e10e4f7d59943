"""The rank ceilings that a budget of state bytes leaves each weight, as training goes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.budget import allocate_ranks, gains_before_any_gradient, gains_of
from ..core.memory import adam_state_bytes
from .matrix_state import layout_for
from .options import matrix_bytes, parse_budget, rank_bounds


@dataclass(frozen=True)
class Claimant:
    """One projected weight that takes part in a budget.

    Attributes:
        param: the weight.
        states: of all weights, as they are at any time.
        cost: bytes of one direction.
        fixed: bytes that do not depend on the rank.
        min_rank: floor.
        max_rank: ceiling.
    """

    param: Tensor
    states: Mapping[Tensor, dict[str, Any]]
    cost: int
    fixed: int
    min_rank: int
    max_rank: int

    @property
    def state(self) -> dict[str, Any]:
        """Its optimizer state, empty before its first step."""
        return self.states.get(self.param, {})

    @property
    def rank(self) -> int:
        """The rank it has; 0 before its first basis."""
        return int(self.state["basis"].shape[-1]) if self.state else 0

    @property
    def reserved_rank(self) -> int:
        """The rank it has, or is sure to get."""
        return max(self.min_rank, self.rank)

    @property
    def gains(self) -> Tensor:
        """What each direction is worth, by the last gradient that was factorised."""
        energies = self.state.get("energies")
        if energies is None:
            return gains_before_any_gradient(self.max_rank, self.param.numel())
        total = self.state["total_energy"]
        return gains_of(energies[: self.max_rank].double(), total, self.param.numel())


class RankBudget:
    """Ceilings under one budget, for one optimizer step.

    All matrices are allotted ranks by what is known of their gradients when a step begins, and a
    matrix never takes bytes that another still holds. So the budget holds at every moment, and a
    matrix may have to wait a refresh for its share.

    Args:
        claimants: all projected weights.
        budget: bytes for all of them.

    Raises:
        ValueError: if the budget does not hold the minimum ranks.
    """

    def __init__(self, claimants: list[Claimant], budget: int) -> None:
        self._claimants = {claimant.param: claimant for claimant in claimants}
        self._budget = budget - sum(claimant.fixed for claimant in claimants)
        ranks = allocate_ranks(
            [claimant.gains for claimant in claimants],
            [claimant.cost for claimant in claimants],
            [claimant.min_rank for claimant in claimants],
            self._budget,
        )
        self._allotted = dict(zip(self._claimants, ranks, strict=True))

    def max_rank(self, param: Tensor) -> int:
        """The highest rank that a weight may take now.

        Where a weight was added later and the others hold what would be its minimum, that is below
        its minimum, and 0 if there is nothing left: it waits until they are refreshed.
        """
        own = self._claimants[param]
        others = [claimant for claimant in self._claimants.values() if claimant is not own]
        reserved = sum(claimant.reserved_rank * claimant.cost for claimant in others)
        held = sum(claimant.rank * claimant.cost for claimant in others)
        affordable = min(self._allotted[param], (self._budget - reserved) // own.cost)
        at_least = min(own.min_rank, max(own.rank, (self._budget - held) // own.cost))
        return max(at_least, affordable)


def claimant_of(
    param: Tensor, states: Mapping[Tensor, dict[str, Any]], options: dict[str, Any]
) -> Claimant:
    """Describe a projected weight to a budget."""
    layout = layout_for(param, options)
    width = torch.promote_types(param.dtype, torch.float32).itemsize
    min_rank, max_rank = rank_bounds(options, layout)
    return Claimant(
        param=param,
        states=states,
        cost=matrix_bytes(param, layout, 1, options),
        fixed=layout.num_matrices * width if options["residual"].startswith("fira") else 0,
        min_rank=min(min_rank, max_rank),
        max_rank=max_rank,
    )


def budget_bytes(budget: Any, params: Iterable[Tensor]) -> int:
    """Turn a ``memory_budget`` option, as `parse_budget` reads it, into bytes.

    Args:
        budget: the option, not None.
        params: the projected weights, whose AdamW state a share refers to.
    """
    parsed = parse_budget(budget)
    if isinstance(parsed, float):
        adamw_bytes = sum(adam_state_bytes(p.numel(), p.element_size()) for p in params)
        return int(parsed * adamw_bytes)
    assert parsed is not None
    return parsed
