"""The options that a parameter group may set, checked when the group is added."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..core.adam import ADAM_CONVENTIONS
from ..core.carry import CARRIES
from ..core.checks import as_number, check_choice, check_count, check_number
from ..core.memory import STATE_DTYPES, adam_state_bytes, projected_state_bytes
from ..core.projection import SIDES, Layout
from ..core.refresh import RefreshRule
from ..core.residual import RESIDUALS
from .gradient_checks import NONFINITE
from .weight_rounding import WEIGHT_ROUNDINGS, is_rounded

STATE_VERSION = 1
"""Of what is kept of a weight; a higher one is of a newer adarankgrad."""

DEFAULT_MAX_RANK = 0.25
DEFAULT_MIN_RANK = 4

BasisFinder = Literal["randomized", "exact", "sketched", "none"]
BiasCorrection = Literal["per_direction", "global"]
Update = Literal["adam", "orthogonalized"]
BASIS_FINDERS: tuple[str, ...] = get_args(BasisFinder)
BIAS_CORRECTIONS: tuple[str, ...] = get_args(BiasCorrection)
UPDATES: tuple[str, ...] = get_args(Update)
_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)")

# What a named optimizer does not set: one basis of fixed rank, moments kept, nothing outside it.
ENGINE_DEFAULTS: dict[str, Any] = {
    "project": True,
    "stacked": False,
    "max_rank": DEFAULT_MAX_RANK,
    "min_rank": None,
    "energy": 1.0,
    "monotone": False,
    "rank_multiple": 1,
    "scale": 1.0,
    "side": "short",
    "basis": "exact",
    "oversampling": 8,
    "power_iterations": 1,
    "warm_start": False,
    "refresh_max_gap": 200,
    "refresh_min_gap": 1,
    "refresh_norm": None,
    "refresh_relative_norm": None,
    "refresh_energy": None,
    "stagger": False,
    "carry": "keep",
    "bias_correction": "global",
    "update": "adam",
    "residual": "none",
    "residual_scale": 1.0,
    "adam_convention": "torch",
    "state_dtype": "float32",
    "basis_dtype": "float32",
    "weight_rounding": "nearest",
    "memory_budget": None,
    "max_grad_norm": None,
    "nonfinite": "skip",
    "num_skipped_steps": 0,
    "state_version": STATE_VERSION,
    "seed": 0,
}

COMMON_OPTIONS = ("memory_budget", "max_grad_norm", "nonfinite")
"""Options of the whole optimizer, the same in every group."""


def with_fixed_rank(options: Mapping[str, Any]) -> dict[str, Any]:
    """Replace ``rank`` and ``refresh_every``, where given, by the engine's options.

    Raises:
        ValueError: if one of them is out of range.
    """
    options = dict(options)
    if "rank" in options:
        rank = options.pop("rank")
        _check_rank("rank", rank)
        options.update(min_rank=rank, max_rank=rank)
    if "refresh_every" in options:
        gap = options.pop("refresh_every")
        check_count("refresh_every", gap, low=1)
        options["refresh_max_gap"] = gap
    return options


def check_options(options: Mapping[str, Any]) -> None:
    """Check every option of a parameter group.

    Raises:
        ValueError: naming the option, its value and what is allowed.
    """
    for name in ("lr", "eps", "weight_decay"):
        check_number(name, options[name], low=0.0)
    _check_betas(options["betas"])
    for name in ("scale", "residual_scale"):
        check_number(name, options[name], low=0.0)
    _check_ranks(options)
    check_number("energy", options["energy"], low=0.0, high=1.0, is_low_allowed=False)
    for name in ("rank_multiple", "refresh_max_gap", "refresh_min_gap"):
        check_count(name, options[name], low=1)
    check_count("power_iterations", options["power_iterations"], low=0)
    if isinstance(options["oversampling"], float):
        check_number("oversampling", options["oversampling"], low=0.0)
    else:
        check_count("oversampling", options["oversampling"], low=0)
    for name in ("refresh_norm", "refresh_relative_norm", "refresh_energy"):
        if options[name] is not None:
            high = 1.0 if name == "refresh_energy" else math.inf
            check_number(name, options[name], low=0.0, high=high)
    for name in ("project", "stacked", "monotone", "warm_start", "stagger"):
        if not isinstance(options[name], bool):
            raise ValueError(f"{name} must be True or False, got {options[name]!r}")
    parse_budget(options["memory_budget"])
    if options["max_grad_norm"] is not None:
        check_number("max_grad_norm", options["max_grad_norm"], low=0.0)
    check_choice("nonfinite", options["nonfinite"], NONFINITE)
    check_choice("side", options["side"], SIDES)
    check_choice("basis", options["basis"], BASIS_FINDERS)
    check_choice("carry", options["carry"], CARRIES)
    check_choice("bias_correction", options["bias_correction"], BIAS_CORRECTIONS)
    check_choice("update", options["update"], UPDATES)
    if options["carry"] == "ldadam" and num_moments(options) < 2:
        raise ValueError(
            "carry='ldadam' rotates variances, of which update='orthogonalized' keeps none; "
            "use carry='squared', which rotates the first moment in the same way"
        )
    check_choice("residual", options["residual"], RESIDUALS)
    check_choice("adam_convention", options["adam_convention"], ADAM_CONVENTIONS)
    for name in ("state_dtype", "basis_dtype"):
        check_choice(name, options[name], STATE_DTYPES)
    if options["basis"] == "none" and options["basis_dtype"] != "float32":
        raise ValueError(
            f"basis_dtype={options['basis_dtype']!r} is the form of a basis, and basis='none' "
            "keeps none; leave basis_dtype out"
        )
    check_choice("weight_rounding", options["weight_rounding"], WEIGHT_ROUNDINGS)


def num_moments(options: Mapping[str, Any]) -> int:
    """How many moments the step inside a basis keeps: Adam two, an orthogonalised one the first."""
    return 2 if options.get("update", "adam") == "adam" else 1


def matrix_bytes(weight: Tensor, layout: Layout, rank: int, options: Mapping[str, Any]) -> int:
    """Bytes of basis and moments of a projected weight, proportional to its rank."""
    options = {**ENGINE_DEFAULTS, **options}
    return projected_state_bytes(
        layout,
        rank,
        torch.promote_types(weight.dtype, torch.float32).itemsize,
        num_moments=num_moments(options),
        state_dtype=options["state_dtype"],
        basis_dtype=options["basis_dtype"],
    )


def plain_bytes(weight: Tensor, options: Mapping[str, Any]) -> int:
    """Bytes of the moments of a weight that is not projected."""
    options = {**ENGINE_DEFAULTS, **options}
    if weight.is_complex():
        return adam_state_bytes(weight.numel(), weight.element_size())
    is_wide = is_rounded(weight, options) or weight.dtype is torch.float16
    width = 4 if is_wide else weight.element_size()
    return adam_state_bytes(weight.numel(), width, state_dtype=options["state_dtype"])


def correction_bytes(weight: Tensor, options: Mapping[str, Any]) -> int:
    """Bytes of the correction of a weight of 24 bits."""
    options = {**ENGINE_DEFAULTS, **options}
    is_corrected = options["weight_rounding"] == "corrected" and is_rounded(weight, options)
    return weight.numel() if is_corrected else 0


def parse_budget(budget: Any) -> int | float | None:
    """Read a memory budget: bytes as an int or as ``"512MiB"``, a float as a share of AdamW's.

    Raises:
        ValueError: if it is none of these.
    """
    match = _SIZE.fullmatch(budget.strip()) if isinstance(budget, str) else None
    if match is not None and match[2] in _UNITS:
        budget = int(float(match[1]) * _UNITS[match[2]])
    is_count = isinstance(budget, int) and not isinstance(budget, bool) and budget >= 1
    is_share = isinstance(budget, float) and 0.0 < budget <= 1.0
    if budget is None or is_count or is_share:
        return budget  # type: ignore[no-any-return]
    raise ValueError(
        "memory_budget must be bytes (an int, or text such as '512MiB'), a float in (0, 1] (share "
        f"of AdamW's state of the projected weights) or None, got {budget!r}"
    )


def resolve_rank(rank: int | float, layout: Layout) -> int:
    """Turn a rank option into a number of columns for one matrix.

    Args:
        rank: an int is a number of columns, a float a share of the matrix's short side.
        layout: how the weight is projected.

    Returns:
        A rank in [1, short side].
    """
    short_side = min(layout.num_rows, layout.num_cols)
    wanted = rank if isinstance(rank, int) else round(rank * short_side)
    return max(1, min(wanted, short_side))


def rank_bounds(options: Mapping[str, Any], layout: Layout) -> tuple[int, int]:
    """Floor and ceiling of one matrix's rank; a default floor gives way to the ceiling."""
    if options["basis"] == "none":
        return 0, 0
    max_rank = resolve_rank(options["max_rank"], layout)
    if options["min_rank"] is None:
        return min(DEFAULT_MIN_RANK, max_rank), max_rank
    return resolve_rank(options["min_rank"], layout), max_rank


def refresh_rule(options: Mapping[str, Any]) -> RefreshRule:
    """Collect the refresh options of a group."""
    return RefreshRule(
        max_gap=options["refresh_max_gap"],
        min_gap=options["refresh_min_gap"],
        norm=options["refresh_norm"],
        relative_norm=options["refresh_relative_norm"],
        energy=options["refresh_energy"],
    )


def _check_ranks(options: Mapping[str, Any]) -> None:
    min_rank, max_rank = options["min_rank"], options["max_rank"]
    if min_rank is not None:
        _check_rank("min_rank", min_rank)
    _check_rank("max_rank", max_rank)
    if type(min_rank) is type(max_rank) and min_rank > max_rank:
        raise ValueError(f"min_rank must not exceed max_rank, got {min_rank} and {max_rank}")


def _check_rank(name: str, rank: Any) -> None:
    is_count = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    is_share = isinstance(rank, float) and 0.0 < rank <= 1.0
    if not (is_count or is_share):
        raise ValueError(
            f"{name} must be an int of at least 1 (columns) or a float in (0, 1] "
            f"(share of a matrix's short side), got {rank!r}"
        )


def _check_betas(betas: Any) -> None:
    is_pair = isinstance(betas, (tuple, list)) and len(betas) == 2
    if not is_pair or not all(0.0 <= as_number(beta) < 1.0 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")
