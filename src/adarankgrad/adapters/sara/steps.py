"""What SaRA does around optimizer steps: the low-rank term, and the second selection."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...core.magnitude import is_below
from ...core.nuclear_norm import nuclear_norm_gradient
from ..interface import StepHook
from .small_weights import EMBEDDINGS, Site, all_sites, put_entries_, sites, write_back

if TYPE_CHECKING:
    from . import SaRAConfig


class SmallWeightsHook(StepHook):
    """Adds the gradient of λ ‖P ⊙ M‖_*, embeddings left out, and selects again once.

    The random choice of a matrix depends on seed and step alone, so that all data-parallel
    processes make the same one and a resumed run repeats it. Nothing is kept between steps: which
    entries are still trained is in the model's own state.

    Raises:
        ValueError: if the model carries no SaRA.
    """

    def __init__(
        self, model: nn.Module, config: SaRAConfig, *, num_steps: int, optimizer: Optimizer | None
    ) -> None:
        self.model = model
        self.config = config
        self.optimizer = optimizer
        at = config.reselect_at
        self.reselect_step = None if at is None else max(1, round(at * num_steps))
        sites(model)

    @torch.no_grad()
    def before_optimizer_step(self, step: int) -> None:
        """Add the low-rank term's gradient to that of the values."""
        if self.config.rank_loss_weight == 0.0:
            return
        for site in self._regularized(step):
            push = rank_loss_gradient(site).mul_(self.config.rank_loss_weight)
            values = site.small.values
            values.grad = push if values.grad is None else values.grad.add_(push)

    def on_optimizer_step(self, step: int) -> None:
        """At the step of the second selection, select again.

        Raises:
            ValueError: if ``restart_optimizer`` has no optimizer.
        """
        if self.config.restart_optimizer and self.optimizer is None:
            raise ValueError("restart_optimizer needs the optimizer: step_hook(optimizer=...)")
        if step == self.reselect_step:
            self.reselect()

    @torch.no_grad()
    def reselect(self) -> None:
        """Go on with the trained entries that are still below the threshold.

        The others stay at their present values. No weight changes.
        """
        kept = [
            (site, site.small.trained & is_below(site.small.values, site.small.threshold))
            for site in sites(self.model)
        ]
        if not any(trained.any() for _, trained in kept):
            warnings.warn(
                "no trained weight is below the threshold any more: SaRA's second selection is "
                "left out",
                UserWarning,
                stacklevel=2,
            )
            return
        for site, trained in kept:
            write_back(site)
            site.small.trained.copy_(trained)
            if self.config.restart_optimizer and self.optimizer is not None:
                self.optimizer.state.pop(site.small.values, None)

    def _regularized(self, step: int) -> list[Site]:
        # A row that no batch uses has no other gradient, and Adam would take the term's alone for
        # steps of the whole rate. A head that is tied to an embedding counts as one.
        embedded = {
            id(site.small) for site in all_sites(self.model) if isinstance(site.module, EMBEDDINGS)
        }
        matrices = [
            site
            for site in sites(self.model)
            if site.base.dim() == 2
            and min(site.base.shape) > self.config.rank_loss_min_side
            and id(site.small) not in embedded
        ]
        if self.config.rank_loss_scope == "all" or not matrices:
            return matrices
        # A draw of its own for every step, without drawing those before it.
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        return [matrices[int(torch.randint(len(matrices), (1,), generator=generator))]]


@torch.no_grad()
def selected_matrix(site: Site) -> Tensor:
    """Return P ⊙ M: the trained entries in place, zero elsewhere, in the values' dtype."""
    small = site.small
    matrix = torch.zeros(site.base.shape, dtype=small.values.dtype, device=small.values.device)
    put_entries_(matrix, small.indices.long(), small.values.masked_fill(~small.trained, 0.0))
    return matrix


def rank_loss_gradient(site: Site) -> Tensor:
    """Return the gradient of ‖P ⊙ M‖_* at the selected entries: (k,).

    Zero where the matrix is not finite, whose decomposition would fail.
    """
    small, matrix = site.small, selected_matrix(site)
    if not matrix.isfinite().all():
        return torch.zeros_like(small.values)
    gradient = nuclear_norm_gradient(matrix).take(small.indices.long())
    return gradient.masked_fill_(~small.trained, 0.0)
