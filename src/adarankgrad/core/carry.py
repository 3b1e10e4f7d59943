"""Adam's moments, carried from an old basis to a new one.

With ``rotation = new_basis.mT @ old_basis`` (r_new, r_old), the first moment is linear and follows
exactly within the shared span: ``rotation @ exp_avg``. The second moment is not linear. The paper
uses ``rotation @ exp_avg_sq``, which is wrong in general: about half of its entries turn negative
when basis vectors merely change sign, and Adam then takes the root of a negative number.

Differs from the paper: new directions (rows of ``rotation`` with norm below 1) would start with a
second moment near zero while Adam's bias correction believes it is warm; their first step would be
(1 − β₁)/√(1 − β₂) ≈ 3.2 times the usual length. ``fill`` gives the missing share of each row the
second moment that the present gradient has along it. The first step along a direction that is
entirely new then has a root mean square of at most (1 − β₁)/√β₂, a tenth of the usual length,
and grows to it as the first moment warms up.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Carry = Literal["squared", "ldadam", "published", "keep", "reset"]
CARRIES: tuple[str, ...] = get_args(Carry)


def carry_moments(
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    rotation: Tensor,
    method: Carry,
    *,
    fill: Tensor | None = None,
    step: int = 1,
    betas: tuple[float, float] = (0.9, 0.999),
) -> tuple[Tensor, Tensor]:
    """Express Adam's moments in a new basis.

    Methods:
        ``squared``: (R∘R) v. Never negative, exact for signed permutations; neglects how
            coordinates co-vary.
        ``ldadam``: treats v − m² as variances that rotate by R∘R and m as means that rotate by R
            (LDAdam, arXiv 2410.16103, as in the authors' code).
        ``published``: |R v|, the paper's R v made safe by the absolute value.
        ``keep``: both moments stay as they are, row by row (GaLore); new rows are zero. It reads
            them in a basis they do not belong to, so signs and order of the basis matter.
        ``reset``: zero. The caller restarts bias correction.

    All but ``keep`` give the same next update whatever signs and order the new basis has.

    Args:
        exp_avg: (*batch, r_old, n), first moment.
        exp_avg_sq: (*batch, r_old, n), second moment, not negative.
        rotation: (*batch, r_new, r_old), ``new_basis.mT @ old_basis``.
        method: one of the above.
        fill: (*batch, r_new, 1) or (*batch, r_new, n), second moment to give to the share of each
            new direction that the old basis did not span; None leaves it at zero. Ignored by
            ``keep`` and ``reset``.
        step: Adam steps taken, for the bias correction inside ``ldadam``; at least 1.
        betas: Adam's decay rates, each in [0, 1).

    Returns:
        New ``(exp_avg, exp_avg_sq)``, each (*batch, r_new, n), newly allocated.

    Raises:
        ValueError: if ``method`` is unknown.

    Memory: the two results and one temporary of their size.
    """
    if method not in CARRIES:
        raise ValueError(f"carry must be one of {', '.join(CARRIES)}, got {method!r}")
    if method == "keep":
        num_rows = rotation.shape[-2]
        return _keep_rows(exp_avg, num_rows), _keep_rows(exp_avg_sq, num_rows)
    if method == "reset":
        shape = (*exp_avg.shape[:-2], rotation.shape[-2], exp_avg.shape[-1])
        return exp_avg.new_zeros(shape), exp_avg.new_zeros(shape)

    new_exp_avg = rotation @ exp_avg
    squared_rotation = rotation.square()
    if method == "squared":
        new_exp_avg_sq = squared_rotation @ exp_avg_sq
    elif method == "ldadam":
        new_exp_avg_sq = _carry_variances(
            exp_avg, exp_avg_sq, new_exp_avg, squared_rotation, step, betas
        )
    else:
        new_exp_avg_sq = (rotation @ exp_avg_sq).abs_()
    if fill is not None:
        missing_share = (1.0 - squared_rotation.sum(-1, keepdim=True)).clamp_(0.0, 1.0)
        new_exp_avg_sq += missing_share * fill
    return new_exp_avg, new_exp_avg_sq


def _carry_variances(
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    new_exp_avg: Tensor,
    squared_rotation: Tensor,
    step: int,
    betas: tuple[float, float],
) -> Tensor:
    """LDAdam's rule, on bias-corrected moments; |·| because v − m² may dip below zero."""
    first_correction = 1.0 - betas[0] ** step
    second_correction = 1.0 - betas[1] ** step
    variances = exp_avg_sq / second_correction - (exp_avg / first_correction).square_()
    means = new_exp_avg / first_correction
    carried = (squared_rotation @ variances).add_(means.square_())
    return carried.abs_().mul_(second_correction)


def _keep_rows(moment: Tensor, num_rows: int) -> Tensor:
    """The first ``num_rows`` rows, or all of them and zeros below."""
    kept = moment[..., :num_rows, :]
    num_missing = num_rows - kept.shape[-2]
    return torch.nn.functional.pad(kept, (0, 0, 0, num_missing)).clone()
