"""Reparametrised weights: Powerpropagation, pruning by magnitude, and EfficientPackNet."""

from .masks import DENSITIES, magnitude_masks, sparsify
from .packnet import EfficientPackNet
from .power import Power, PoweredWeight, powered_weights
from .powerprop import PowerpropConfig, export_plain, powerpropagate
from .updates import PowerUpdates, split_groups

__all__ = [
    "DENSITIES",
    "EfficientPackNet",
    "Power",
    "PowerUpdates",
    "PoweredWeight",
    "PowerpropConfig",
    "export_plain",
    "magnitude_masks",
    "powered_weights",
    "powerpropagate",
    "sparsify",
    "split_groups",
]
