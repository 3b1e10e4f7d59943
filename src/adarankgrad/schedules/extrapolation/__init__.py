"""Extrapolated SGD (Lin et al. 2020, arXiv 2006.05720): gradients from ahead of the weights.

`docs/extrapolation.md` says what of it was read and remembered.
"""

from .config import ExtrapolationConfig
from .extrapolation import Extrapolation

__all__ = ["Extrapolation", "ExtrapolationConfig"]
