"""The forms that weights, state and gradients of a training can have, two or three at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class StateForm:
    """Weights of a dtype, with options of `AdaRankGrad` that say what is kept of the rest."""

    dtype: torch.dtype
    options: dict[str, Any] = field(default_factory=dict)
    accumulates_in_backward: bool = False


STATE_FORMS = {
    "float32": StateForm(torch.float32),
    "bfloat16, rounded at random": StateForm(
        torch.bfloat16, {"state_dtype": "bfloat16", "weight_rounding": "stochastic"}
    ),
    "int8, corrected": StateForm(
        torch.bfloat16,
        {"state_dtype": "int8", "basis_dtype": "int8", "weight_rounding": "corrected"},
    ),
    "int8, accumulated in backward": StateForm(
        torch.bfloat16,
        {
            "basis": "sketched",
            "residual": "normalized",
            "state_dtype": "int8",
            "basis_dtype": "bfloat16",
            "weight_rounding": "stochastic",
        },
        accumulates_in_backward=True,
    ),
}
