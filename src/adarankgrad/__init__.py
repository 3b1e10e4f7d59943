"""Train PyTorch models in a fraction of AdamW's memory, without a rank to tune."""

from .optim import (
    AdaRankGrad,
    LayerReport,
    OptimizerReport,
    describe,
    log_reports,
    param_groups,
)

__version__ = "0.1.0"

__all__ = [
    "AdaRankGrad",
    "LayerReport",
    "OptimizerReport",
    "__version__",
    "describe",
    "log_reports",
    "param_groups",
]
