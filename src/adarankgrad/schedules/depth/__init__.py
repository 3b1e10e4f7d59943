"""Progressive depth (Apollo): few layers first, used for many, and copied as training goes."""

from .config import DepthConfig
from .layers import LayerList, find_layers
from .progressive import ProgressiveDepth
from .view import DepthView

__all__ = ["DepthConfig", "DepthView", "LayerList", "ProgressiveDepth", "find_layers"]
