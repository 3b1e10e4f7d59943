"""GaLore: gradient low-rank projection (Zhao et al. 2024, arXiv 2403.03507)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..core.adam import AdamConvention
from ..core.memory import StateDtype
from ..core.projection import Side
from .engine import SubspaceOptimizer
from .gradient_checks import Nonfinite
from .options import DEFAULT_MAX_RANK, BasisFinder, with_fixed_rank
from .weight_rounding import WeightRounding


class GaLore(SubspaceOptimizer):
    """Adam in a gradient subspace of fixed rank, replaced every so many steps.

    The basis holds the gradient's leading singular vectors on its shorter side at every
    ``refresh_every``-th step (paper, Algorithm 2). Moments stay as they are when it changes, though
    they belong to another basis; that is the paper's choice, and what AdaRankGrad changes. What
    lies outside the basis is dropped.

    Equal to galore-torch 1.0's ``GaLoreAdamW`` to rounding at the same options
    (``tests/optim/test_against_packages.py``), with state that torch loads under ``weights_only``.
    Two things differ: a gradient of zero is not decomposed, and the refresh comes at the next step;
    weights of one row or column are trained by AdamW.

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
        side: which side of a matrix the basis spans (`AdaRankGrad`).
        basis: ``exact`` singular value decomposition, or the ``randomized`` range finder, which is
            not the paper's but many times faster.
        adam_convention: ``transformers`` as in galore-torch, or ``torch`` (`core.adam`).
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

    Memory: m·r + 2·r·n + r state elements a matrix of projected side m; an exact refresh needs
    three to six times the matrix besides.

    Example:
        >>> import torch
        >>> from adarankgrad import GaLore
        >>> weight = torch.nn.Parameter(torch.randn(16, 32))
        >>> weight.grad = torch.randn(16, 32)
        >>> GaLore([weight], lr=0.01, rank=4).step()
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
        return with_fixed_rank(options)
