"""AdaRankGrad: adaptive gradient rank and moments (arXiv 2410.17881).

Each matrix's gradient is projected on a basis found by a randomized range finder. The basis has
the smallest rank that captures a given share of the gradient's energy; Adam's moments live in it
and are carried over when it is replaced. What lies outside the basis is orthogonalised, which needs
no state.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..core.adam import AdamConvention
from ..core.carry import Carry
from ..core.memory import StateDtype
from ..core.projection import Side
from ..core.rank import energy_from_residual
from ..core.residual import Residual
from .engine import SubspaceOptimizer
from .gradient_checks import Nonfinite
from .options import DEFAULT_MAX_RANK, BasisFinder, BiasCorrection, Update
from .weight_rounding import WeightRounding


class AdaRankGrad(SubspaceOptimizer):
    """Adam in gradient subspaces of adaptive rank.

    A step: project the gradient on the basis; where a refresh is due, find a new basis and rank
    and carry the moments over; run Adam on the coordinates; lift the result into the weight; and
    outside the basis, take a step along the gradient's remainder with its singular values raised
    to one (`core.residual`), which needs no state.
    Parameters that are not projected (fewer than two axes, or in a group with ``project=False``)
    are trained by AdamW with the same options.

    Differs from the paper, which drops the remainder: with it, less than half the rank reaches a
    clearly lower loss (``docs/log.md``), and a step costs about 30·min²·max operations a matrix
    more, which is 5·min/tokens of what forward and backward pass cost. ``residual="normalized"`` is
    cheap, ``residual="none"`` is the paper's; both are best with ``energy=0.9`` or more. The
    defaults also refresh more often through a warm-started basis, carry the second moment so that
    it cannot turn negative, and correct its bias direction by direction, so that no step is several
    times too long (``core/carry.py`` says why). `published` is the method as published.

    Args:
        params: parameters, named parameters or groups; `param_groups` builds groups from a model.
            Every option below may also be set per group, and ``stacked=True`` marks a group whose
            weights stack matrices along their first axis.
        lr: step size, at least 0.
        betas: decay rates of the moments, each in [0, 1).
        eps: added to the root of the second moment, at least 0.
        weight_decay: decoupled, multiplied by ``lr``, at least 0.
        project: False trains the group by AdamW.
        stacked: see ``params``.
        max_rank: ceiling, an int (columns) or a float in (0, 1] (share of the short side).
        min_rank: floor, likewise; None is 4, or the ceiling where that is lower.
        energy: share of the gradient's energy ‖G‖²_F that a basis should capture, in (0, 1]. A
            published residual threshold ξ is ``energy = 1 − ξ²``.
        monotone: never let a rank grow.
        rank_multiple: round ranks up to a multiple of this.
        scale: factor on the lifted update (GaLore's α), at least 0.
        side: which side of a matrix the basis spans. ``short`` costs the least time and holds
            min·r + 2·max·r elements; ``long`` holds max·r + 2·min·r. ``left``, ``right``.
        basis: ``randomized`` range finder, ``exact`` singular value decomposition, ``sketched``:
            the range from one step's gradient and all else from the next one's, by measurements
            that add up over micro-batches (`sketched_refresh`; the first step only sketches), or
            ``none``: the whole gradient is left to ``residual`` (`OrthogonalizedSGD`).
        oversampling: extra columns of a sketch, an int, or a float as a multiple of the ceiling.
        power_iterations: rounds that sharpen a sketch; a warm start counts as one.
        warm_start: start the search from the first moment in the present basis.
        refresh_max_gap: steps after which a basis is replaced at the latest.
        refresh_min_gap: the three criteria below are consulted at multiples of this many steps.
        refresh_norm: replace the basis when the projected gradient's norm is at or below this
            (the paper's criterion ς), or None.
        refresh_relative_norm: the same, as a share of its norm at the last refresh, or None.
        refresh_energy: replace the basis when it captures less than this share of the gradient's
            energy, or None.
        stagger: spread the refreshes of all weights over the steps of ``refresh_max_gap``, so that
            no step is much longer than another, but for the first.
        carry: how moments go from basis to basis: ``squared``, ``ldadam``, ``published``,
            ``keep``, ``reset`` (`core.carry.carry_moments`).
        bias_correction: of the second moment, ``per_direction`` or ``global``. Global takes a
            direction that is new to the basis for one that was always there, and its first steps
            are several times too long.
        update: inside the basis, ``adam``, or ``orthogonalized``: the first moment with all its
            singular values raised to one, as in Muon and SUMO (arXiv 2505.24749), at the size of
            Adam's steps. It keeps no second moment; ``eps`` does not act in it.
        residual: what is done outside the basis: ``orthogonalized``, ``normalized`` (columns of the
            size of Adam's steps), ``fira`` or ``fira_official`` (`Fira`), or ``none``. The first
            two take steps of full size however small the gradient is: ``eps`` does not act there,
            and only a falling ``lr`` ends them.
        residual_scale: factor on that step, at least 0. At 1 an orthogonalised step has the size of
            Adam's on a matrix of full rank.
        adam_convention: ``torch``, or ``transformers`` (`core.adam.corrected_eps`).
        state_dtype: what moments are kept in between steps, projected and plain: ``float32``
            (of plain weights, the weight's dtype, as torch does), ``bfloat16``, or ``int8`` with a
            scale for every 256. The compact forms are rounded at random, so that averages that
            move slowly still move (`core.quantize`). Complex weights keep theirs, with a warning.
        basis_dtype: the same for the basis, rounded to the nearest; float32 where ``basis`` is
            ``none``.
        weight_rounding: of bfloat16 weights, which lose updates below 1/512 of a weight:
            ``nearest``; ``stochastic``, right on average; or ``corrected``, with 8 more bits for
            each in the state (`master_weights`). The last two step in float32. No effect on
            float32 and float64 weights, which is warned of where there are no others; float16 ones
            are refused.
        memory_budget: bytes of bases and moments of all projected weights together, never exceeded:
            an int or text such as ``"512MiB"``, or a float as a share of AdamW's. Ranks are
            allotted by captured energy per byte and anew at refreshes, below each weight's
            ``max_rank``; ``energy`` may ask for less (`core.budget`). Not in it are corrections
            (``weight_rounding``), and what a ``sketched`` basis holds before a refresh.
            Of the whole optimizer, not of a group.
        max_grad_norm: clip all gradients together to this norm at every step, at least 0, or None.
        nonfinite: when that norm is not finite, ``skip`` the step and count it (`report`),
            ``raise`` FloatingPointError, or ``ignore`` it, as torch's AdamW does. Skipping and
            raising read every gradient once more, and wait for the device.
        seed: of the private random generators.

    Raises:
        ValueError: if an option is out of range, the budget does not hold every weight's
            ``min_rank``, or at a step if a gradient is sparse.

    Memory: m·r + 2·r·n + r state elements a matrix of projected side m (m·r + r·n + r without the
    second moment), float32 (float64 under float64 weights) or as ``state_dtype`` and
    ``basis_dtype`` say, and one gradient in the basis at a time. A refresh needs two sketches of
    ceiling width, and a float32 copy of one half-precision gradient. A residual needs temporaries
    of the matrix: up to seven for ``orthogonalized`` (eight of a half-precision gradient on a CPU),
    fewer the longer the matrix is, and two for the others.

    Example:
        >>> import torch
        >>> from adarankgrad import AdaRankGrad, param_groups
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
        >>> optimizer = AdaRankGrad(param_groups(model, max_rank=16), lr=1e-3)
        >>> model(torch.randn(4, 64)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.report().layers[0].rank <= 16
        True
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        project: bool = True,
        stacked: bool = False,
        max_rank: int | float = DEFAULT_MAX_RANK,
        min_rank: int | float | None = None,
        energy: float = 0.6,
        monotone: bool = False,
        rank_multiple: int = 1,
        scale: float = 1.0,
        side: Side = "short",
        basis: BasisFinder = "randomized",
        oversampling: int | float = 8,
        power_iterations: int = 1,
        warm_start: bool = True,
        refresh_max_gap: int = 50,
        refresh_min_gap: int = 10,
        refresh_norm: float | None = None,
        refresh_relative_norm: float | None = None,
        refresh_energy: float | None = None,
        stagger: bool = False,
        carry: Carry = "squared",
        bias_correction: BiasCorrection = "per_direction",
        update: Update = "adam",
        residual: Residual = "orthogonalized",
        residual_scale: float = 2.0,
        adam_convention: AdamConvention = "torch",
        state_dtype: StateDtype = "float32",
        basis_dtype: StateDtype = "float32",
        weight_rounding: WeightRounding = "nearest",
        memory_budget: int | float | str | None = None,
        max_grad_norm: float | None = None,
        nonfinite: Nonfinite = "skip",
        seed: int = 0,
    ) -> None:
        super().__init__(params, self.chosen_options(locals()))

    @classmethod
    def published(
        cls,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        max_rank: int | float,
        min_rank: int | float = 1,
        residual_threshold: float = 0.2,
        refresh_norm: float = 1e-4,
        **options: Any,
    ) -> AdaRankGrad:
        """Build the method as published, where the publication is known.

        Basis: cold randomized range finder of twice the rank ceiling with two power iterations,
        and a residual threshold of 0.2, as in the one public projector in the authors' style.
        Refresh: when the projected gradient's norm falls to ``refresh_norm`` (the paper's
        criterion; 1e-4 is one user script's value, the paper's is not known) or after 200 steps.
        Moments: both rotated linearly, the second one's sign removed, nothing for new directions.
        ``eps=1e-6`` as in GaLore, whose hyperparameters the paper's experiments follow.

        Args:
            params: as for the constructor.
            lr: step size.
            max_rank: the paper's r_max; its tables call it the initial rank.
            min_rank: the paper's r_min.
            residual_threshold: ξ, the share ‖G − G_r‖_F / ‖G‖_F (not squared) that may be lost, in
                [0, 1).
            refresh_norm: ς, in units of the gradient.
            options: any other option of the constructor, to override the preset.

        Raises:
            ValueError: if an option is out of range.
        """
        preset = {
            "eps": 1e-6,
            "max_rank": max_rank,
            "min_rank": min_rank,
            "energy": energy_from_residual(residual_threshold),
            "oversampling": 1.0,
            "power_iterations": 2,
            "warm_start": False,
            "refresh_max_gap": 200,
            "refresh_min_gap": 1,
            "refresh_norm": refresh_norm,
            "carry": "published",
            "bias_correction": "global",
            "residual": "none",
        }
        return cls(params, lr, **{**preset, **options})

    @classmethod
    def low_memory(
        cls,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        max_rank: int | float = 12,
        **options: Any,
    ) -> AdaRankGrad:
        """Build what needs the least memory of all that we have trained (docs/plan.md).

        Made for bfloat16 weights, `param_groups` with ``embeddings={}``, and
        `accumulate_in_backward`: weights rounded at random, moments and bases in 8 bits, bases from
        measurements, and a rank of at most 12 for every matrix.

        Args:
            params: as for the constructor.
            lr: step size.
            max_rank: 12 is for a hidden size of 1024; at 2048 and above, 32 takes no larger share.
            options: any other option of the constructor, to override the preset, such as
                ``weight_rounding="corrected"`` for one more byte a weight.

        Raises:
            ValueError: if an option is out of range.
        """
        preset = {
            "max_rank": max_rank,
            "basis": "sketched",
            "state_dtype": "int8",
            "basis_dtype": "int8",
            "weight_rounding": "stochastic",
        }
        return cls(params, lr, **{**preset, **options})
