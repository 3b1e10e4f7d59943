"""How much the gates shrink at each step, and how the learning rate runs beside it.

The authors' probe of memorisation against sparsity: train with one shrinkage, then raise it in
phases, each from the weights of the one before. In their code the phases go on with a scheduler
that has run out, so that only the shrinkage acts. Here every phase has a warm-up and a decay of
its own.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

SPACINGS = ("linear", "log_linear", "exp_linear")

_MEDIAN_OF_NORMAL = 0.6745
"""Of |g| for g ~ N(0, 1)."""


@dataclass(frozen=True)
class SparsitySchedule:
    """Phases of a run.

    Attributes:
        starts: steps done before each phase, from 0, ascending.
        num_steps: of the whole run.
        shrinkages: of the gates, one for each phase.
        warmup_share: of each phase.
    """

    starts: tuple[int, ...]
    num_steps: int
    shrinkages: tuple[float, ...]
    warmup_share: float

    def shrinkage_at(self, step: int) -> float:
        """Return the shrinkage at a step, counted from 1."""
        return self.shrinkages[self._phase(step - 1)]

    def lr_factor(self, num_done: float) -> float:
        """Return the factor of the learning rate after ``num_done`` steps, in (0, 1].

        Rises linearly over the warm-up of a phase and falls linearly over the rest of it; for
        `torch.optim.lr_scheduler.LambdaLR`. Zero once the run is over.
        """
        if num_done >= self.num_steps:
            return 0.0
        phase = self._phase(num_done)
        start = self.starts[phase]
        end = self.starts[phase + 1] if phase + 1 < len(self.starts) else self.num_steps
        num_warmup = min(math.ceil(self.warmup_share * (end - start)), end - start - 1)
        position = num_done - start
        if position < num_warmup:
            return (position + 1) / (num_warmup + 1)
        return (end - num_done) / (end - start - num_warmup)

    def _phase(self, num_done: float) -> int:
        return bisect_right(self.starts, num_done) - 1


def shrinkage_for(num_steps: int) -> float:
    """Return the shrinkage at which half of the gates that get no gradient die within a run."""
    return _MEDIAN_OF_NORMAL / num_steps


def rising_shrinkages(start: float, end: float, num_phases: int, spacing: str) -> list[float]:
    """Return the shrinkages of the phases after the first, the last of them ``end``.

    Args:
        start: of the first phase; above 0 for ``"exp_linear"``.
        end: of the last.
        num_phases: after the first.
        spacing: ``"linear"`` for equal steps, ``"exp_linear"`` for equal ratios, ``"log_linear"``
            for logarithms of equal steps.
    """
    shares = [phase / num_phases for phase in range(1, num_phases + 1)]
    if spacing == "exp_linear":
        return [start * (end / start) ** share for share in shares]
    if spacing == "log_linear":
        # log(exp(start) + share * (exp(end) - exp(start))), without loss for small numbers.
        return [start + math.log1p(share * math.expm1(end - start)) for share in shares]
    return [start + share * (end - start) for share in shares]


def phase_starts(num_steps: int, num_phases: int, first_share: float) -> tuple[int, ...]:
    """Return the steps done before each phase; the others divide what the first leaves.

    Raises:
        ValueError: if a phase would have no step.
    """
    if num_phases == 0:
        return (0,)
    rest = 1.0 - first_share
    starts = (
        0,
        *(round(num_steps * (first_share + rest * i / num_phases)) for i in range(num_phases)),
    )
    ends = (*starts[1:], num_steps)
    if any(end <= start for start, end in zip(starts, ends, strict=True)):
        raise ValueError(
            f"{num_steps} steps are too few for num_phases {num_phases} after "
            f"first_phase_share {first_share}; every phase needs a step"
        )
    return starts
