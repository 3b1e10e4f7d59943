"""Optimizers for gradient subspaces: one engine, one thin file a method."""

from .adagrad_norm import AdaGradNorm
from .adarankgrad import AdaRankGrad
from .fira import Fira
from .galore import GaLore
from .groups import describe, param_groups
from .orthogonalized_sgd import OrthogonalizedSGD
from .report import LayerReport, OptimizerReport, log_reports

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
