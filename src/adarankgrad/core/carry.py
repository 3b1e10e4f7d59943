"""Adam's moments, carried from an old basis to a new one.

With ``rotation = new_basis.mT @ old_basis`` (r_new, r_old), the first moment is linear and follows
exactly within the shared span: ``rotation @ exp_avg``. The second moment is not linear. The paper
uses ``rotation @ exp_avg_sq``, which is wrong in general: about half of its entries turn negative
when basis vectors merely change sign, and Adam then takes the root of a negative number.

Differs from the paper: a direction that the old basis did not span arrives with moments near
zero, while Adam's bias correction believes them warm. Its first step would be
(1 − β₁)/√(1 − β₂) ≈ 3.2 times the usual length, and the second moment would stay too small for
some 1/(1 − β₂) steps. So each direction has a number of its own, ``seen``: the share of the second
moment's running average that it has lived through, 1 − β₂^t for a direction that was there from the
start. It rotates as energy does, and the second moment is divided by it: bias correction,
direction by direction. The first moment keeps the usual correction, so that an entirely new
direction begins with a step of (1 − β₁) and grows to the usual length as its first moment warms up.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Carry = Literal["squared", "ldadam", "published", "keep", "reset"]
CARRIES: tuple[str, ...] = get_args(Carry)


class Moments(NamedTuple):
    """Adam's state in a basis of r directions.

    Attributes:
        exp_avg: (*batch, r, n), first moment.
        exp_avg_sq: (*batch, r, n), second moment, not negative.
        seen: (*batch, r, 1) in [0, 1], how much of the second moment's average each direction
            has lived through; ``exp_avg_sq / seen`` is free of bias.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    seen: Tensor


def carry_moments(
    moments: Moments, rotation: Tensor, method: Carry, *, first_correction: float = 1.0
) -> Moments:
    """Express Adam's moments in a new basis.

    Methods:
        ``squared``: (R∘R) v. Never negative, exact for signed permutations; neglects how
            coordinates co-vary.
        ``ldadam``: treats v − m² as variances that rotate by R∘R and m as means that rotate by R
            (LDAdam, arXiv 2410.16103, as in the authors' code).
        ``published``: |R v|, the paper's R v made safe by the absolute value.
        ``keep``: both moments stay as they are, row by row (GaLore); new rows are zero. It reads
            them in a basis they do not belong to, so signs and order of the basis matter.
        ``reset``: zero. The caller restarts the first moment's bias correction.

    ``seen`` rotates by R∘R, stays in place for ``keep``, and is zero for ``reset``. All but
    ``keep`` give the same next update whatever signs and order the new basis has.

    Args:
        moments: in the old basis, r_old directions.
        rotation: (*batch, r_new, r_old), ``new_basis.mT @ old_basis``.
        method: one of the above.
        first_correction: 1 − β₁^t, which frees the first moment of bias; used by ``ldadam``.

    Returns:
        Moments in the new basis, r_new directions, newly allocated.

    Raises:
        ValueError: if ``method`` is unknown.

    Memory: the result and one temporary of a moment's size.
    """
    if method not in CARRIES:
        raise ValueError(f"carry must be one of {', '.join(CARRIES)}, got {method!r}")
    if method in ("keep", "reset"):
        num_kept = rotation.shape[-1] if method == "keep" else 0
        return Moments(*(_keep_rows(part, num_kept, rotation.shape[-2]) for part in moments))

    # Transposed, as `projection.project` returns coordinates: mixed strides would slow Adam down.
    exp_avg = (moments.exp_avg.mT @ rotation.mT).mT
    energy_rotation = rotation.square()
    seen = (energy_rotation @ moments.seen).clamp_(max=1.0)
    if method == "squared":
        exp_avg_sq = (moments.exp_avg_sq.mT @ energy_rotation.mT).mT
    elif method == "published":
        exp_avg_sq = (moments.exp_avg_sq.mT @ rotation.mT).mT.abs_()
    else:
        exp_avg_sq = _carry_variances(moments, exp_avg, energy_rotation, first_correction)
        spanned_share = energy_rotation.sum(-1, keepdim=True)
        exp_avg_sq *= seen / spanned_share.clamp_min(torch.finfo(seen.dtype).tiny)
    return Moments(exp_avg, exp_avg_sq, seen)


def _carry_variances(
    moments: Moments, exp_avg: Tensor, energy_rotation: Tensor, first_correction: float
) -> Tensor:
    """LDAdam's rule, on moments free of bias; |·| because v − m² may dip below zero."""
    unbiased_sq = moments.exp_avg_sq / moments.seen.clamp_min(torch.finfo(exp_avg.dtype).tiny)
    variances = unbiased_sq.sub_((moments.exp_avg / first_correction).square_())
    means = exp_avg / first_correction
    return (variances.mT @ energy_rotation.mT).mT.add_(means.square_()).abs_()


def _keep_rows(part: Tensor, num_kept: int, num_rows: int) -> Tensor:
    """The first rows where they are, and zeros below."""
    kept = part[..., : min(num_kept, num_rows), :]
    return torch.nn.functional.pad(kept, (0, 0, 0, num_rows - kept.shape[-2])).clone()
