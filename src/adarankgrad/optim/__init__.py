"""Optimizers for gradient subspaces: one engine, one thin file a method."""

from .adarankgrad import AdaRankGrad
from .groups import describe, param_groups
from .report import LayerReport, OptimizerReport, log_reports

__all__ = [
    "AdaRankGrad",
    "LayerReport",
    "OptimizerReport",
    "describe",
    "log_reports",
    "param_groups",
]
