"""Fira: full-rank training under a low-rank constraint (Chen et al. 2024, arXiv 2410.01623)."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from ..core.adam import AdamConvention
from ..core.memory import StateDtype
from ..core.projection import Side
from .engine import SubspaceOptimizer
from .gradient_checks import Nonfinite
from .options import DEFAULT_MAX_RANK, BasisFinder, with_fixed_rank
from .weight_rounding import WeightRounding

_RESIDUALS = {"paper": "fira", "official": "fira_official"}


class Fira(SubspaceOptimizer):
    """GaLore's subspace, and outside it the gradient itself, column by column at Adam's scale.

    The residual step is the gradient outside the basis times ‖Adam's direction‖ / ‖gradient‖ of the
    same column inside it, its norm limited to grow by 1 % a step (paper, §4). Weights are trained
    in full rank with a low-rank optimizer's state.

    Paper and code differ: the code subtracts ``scale`` times the projection from the gradient, so
    that at ``scale=0.25`` three quarters of the part inside the basis are left in the residual. The
    published results up to 350M parameters were made at 0.25, so ``official`` reproduces them.
    ``official`` equals fira 1.0.2 to rounding (``tests/optim/test_against_packages.py``), but for
    what differs for `GaLore`, and after a gradient of zero: there the package's residual vanishes
    for some two thousand steps.

    Args:
        params: parameters, named parameters or groups; `param_groups` builds groups from a model.
            Every option below may also be set per group.
        lr: step size, at least 0. The paper trains with 0.01.
        betas: decay rates of the moments, each in [0, 1).
        eps: added to the root of the second moment, at least 0.
        weight_decay: decoupled, multiplied by ``lr``, at least 0.
        project: False trains the group by AdamW.
        stacked: the group's weights stack matrices along their first axis.
        rank: an int (columns) or a float in (0, 1] (share of the short side). The paper takes
            128, 256, 256 and 512 for LLaMA 60M, 130M, 350M and 1B; the default is ours.
        refresh_every: steps between bases, at least 1; the paper's T.
        stagger: spread the refreshes of all weights over these steps; not in the paper. An exact
            decomposition is by itself longer than a step; ``randomized`` evens steps out.
        scale: factor on the lifted update, at least 0; the paper's α.
        residual: ``paper``, G − P Pᵀ G, or ``official``, G − scale · P Pᵀ G.
        residual_scale: factor on the residual step, at least 0; 1 in the paper.
        side: which side of a matrix the basis spans (`AdaRankGrad`).
        basis: ``exact`` or ``randomized``, as for `GaLore`.
        adam_convention: ``transformers`` as in fira, or ``torch`` (`core.adam`).
        state_dtype: ``float32``, ``bfloat16`` or ``int8``, the form of the moments (`AdaRankGrad`).
        basis_dtype: the form of the basis, likewise.
        weight_rounding: of bfloat16 weights: ``nearest``, ``stochastic``, ``corrected`` (likewise).
        max_grad_norm: clip all gradients together to this norm at every step, at least 0, or None.
        nonfinite: when that norm is not finite, ``skip`` the step and count it (`report`),
            ``raise`` FloatingPointError, or ``ignore`` it, as torch's AdamW does. Skipping and
            raising read every gradient once more, and wait for the device.
        seed: of the private random generators, for ``basis="randomized"``.

    Raises:
        ValueError: if an option is out of range, or at a step if a gradient is sparse.

    Memory: m·r + 2·r·n + r + 1 state elements a matrix of projected side m, and one temporary of
    the matrix's size at each step (in float32 under float16); an exact refresh needs three to six
    times the matrix.

    Example:
        >>> import torch
        >>> from adarankgrad import Fira
        >>> weight = torch.nn.Parameter(torch.randn(16, 32))
        >>> weight.grad = torch.randn(16, 32)
        >>> Fira([weight], lr=0.01, rank=4).step()
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        project: bool = True,
        stacked: bool = False,
        rank: int | float = DEFAULT_MAX_RANK,
        refresh_every: int = 200,
        stagger: bool = False,
        scale: float = 0.25,
        residual: Literal["paper", "official"] = "paper",
        residual_scale: float = 1.0,
        side: Side = "short",
        basis: BasisFinder = "exact",
        adam_convention: AdamConvention = "transformers",
        state_dtype: StateDtype = "float32",
        basis_dtype: StateDtype = "float32",
        weight_rounding: WeightRounding = "nearest",
        max_grad_norm: float | None = None,
        nonfinite: Nonfinite = "skip",
        seed: int = 0,
    ) -> None:
        super().__init__(params, self.chosen_options(locals()))

    @staticmethod
    def engine_options(options: dict[str, Any]) -> dict[str, Any]:
        """Express the method in the engine's choices."""
        options = with_fixed_rank(options)
        if "residual" in options:
            if options["residual"] not in list(_RESIDUALS):
                raise ValueError(
                    f"residual must be one of {', '.join(_RESIDUALS)}, got {options['residual']!r}"
                )
            options["residual"] = _RESIDUALS[options["residual"]]
        return options
