"""When a basis is looked for again.

AdaRankGrad ends a basis when the projected gradient has converged inside it (arXiv 2410.17881,
Algorithm 1: ‖Ĝ‖_F ≤ ς). The threshold ς is scale-dependent and its value is not published, and
minibatch noise keeps ‖Ĝ‖ above it, so in practice a maximum gap does most of the work. Ours adds
a threshold relative to the norm at the last refresh, and one on the energy that the basis still
captures. The rule that fired is part of the result.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

_GOLDEN_RATIO = (5**0.5 - 1) / 2


class RefreshReason(enum.IntEnum):
    """Why a basis was refreshed. An integer, so that it can live in optimizer state."""

    NONE = 0
    FIRST = 1
    MAX_GAP = 2
    NORM = 3
    ENERGY = 4


class RefreshRule(NamedTuple):
    """Thresholds of the refresh decision; a threshold of None is not used.

    Attributes:
        max_gap: refresh at the latest after this many steps, at least 1.
        min_gap: the gradient is not consulted before this many steps, at least 1.
        norm: refresh when ‖basisᵀ G‖_F is at or below this (the paper's ς), in gradient units.
        relative_norm: the same, as a fraction of its value at the last refresh.
        energy: refresh when ‖basisᵀ G‖²_F / ‖G‖²_F falls below this fraction.
    """

    max_gap: int
    min_gap: int = 1
    norm: float | None = None
    relative_norm: float | None = None
    energy: float | None = None

    @property
    def reads_gradient(self) -> bool:
        """Whether any threshold depends on the gradient, and so needs its norms."""
        return any(t is not None for t in (self.norm, self.relative_norm, self.energy))


def staggered_gap(max_gap: int, position: int) -> int:
    """Length of the first period of one weight, so that weights are refreshed at different steps.

    All weights need a basis at the first step; every later refresh of a weight comes ``max_gap``
    steps after the one before. Multiples of the golden ratio fill the periods evenly, however many
    weights there are, so that a weight's turn does not depend on those behind it.

    Args:
        max_gap: steps between two refreshes, at least 1.
        position: of the weight among all weights, at least 0.

    Returns:
        Between 1 and ``max_gap``.
    """
    return max_gap - int((position * _GOLDEN_RATIO) % 1.0 * max_gap)


def scheduled_reason(rule: RefreshRule, steps_since_refresh: int, has_basis: bool) -> RefreshReason:
    """Decide by the counters alone: the first step, and the maximum gap.

    Args:
        rule: thresholds.
        steps_since_refresh: optimizer steps taken with the present basis.
        has_basis: False before the first refresh.
    """
    if not has_basis:
        return RefreshReason.FIRST
    if steps_since_refresh >= rule.max_gap:
        return RefreshReason.MAX_GAP
    return RefreshReason.NONE


def measured_reason(
    rule: RefreshRule, coords_energy: float, total_energy: float, coords_energy_at_refresh: float
) -> RefreshReason:
    """Decide by the gradient: has it converged inside the basis, or left it?

    Args:
        rule: thresholds; only consulted once ``min_gap`` steps have passed.
        coords_energy: ‖basisᵀ G‖²_F of the present gradient.
        total_energy: ‖G‖²_F of the present gradient.
        coords_energy_at_refresh: ‖basisᵀ G‖²_F when the basis was found.

    Returns:
        ``NORM``, ``ENERGY`` or ``NONE``. Comparisons with NaN are false, so a broken gradient
        asks for nothing.
    """
    if rule.norm is not None and coords_energy <= rule.norm**2:
        return RefreshReason.NORM
    if (
        rule.relative_norm is not None
        and coords_energy <= rule.relative_norm**2 * coords_energy_at_refresh
    ):
        return RefreshReason.NORM
    if rule.energy is not None and coords_energy < rule.energy * total_energy:
        return RefreshReason.ENERGY
    return RefreshReason.NONE
