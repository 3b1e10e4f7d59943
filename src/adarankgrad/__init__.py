"""Train PyTorch models in a fraction of AdamW's memory, without a rank to tune."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .optim import (
        AdaGradNorm,
        AdaRankGrad,
        Fira,
        GaLore,
        LayerReport,
        OptimizerReport,
        OrthogonalizedSGD,
        describe,
        log_reports,
        param_groups,
    )

__version__ = "0.1.0"

__all__ = [
    "AdaGradNorm",
    "AdaRankGrad",
    "Fira",
    "GaLore",
    "LayerReport",
    "OptimizerReport",
    "OrthogonalizedSGD",
    "describe",
    "log_reports",
    "param_groups",
]


def __getattr__(name: str) -> Any:
    """Load the library when a name is first asked for, so that the command line starts fast."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import optim

    return getattr(optim, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
