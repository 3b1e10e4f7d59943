"""Progressive depth in numbers: which layer runs where, and how deep a step is.

``num_layers`` real layers (N) stand in for ``depth`` virtual ones (L), of at most ``max_depth``.
The functions are those of Apollo's published code; `docs/progressive-depth.md` says what of it was
read.
"""

from __future__ import annotations

from collections.abc import Callable

LayerMap = Callable[[int, int], list[int]]
"""From num_layers and depth to the real layer at each virtual position."""

DepthRule = Callable[[int, int, float], int]
"""From num_layers, max_depth and a number drawn evenly from [0, 1) to a depth."""

_SMALLEST_DRAW = 1e-6
_HEADROOM = 0.4
_LOWEST_RATIO = 0.6


def interpolate(num_layers: int, depth: int) -> list[int]:
    """Repeat each layer in its place: position j runs layer ⌊j·N/L⌋.

    Args:
        num_layers: real layers, N.
        depth: virtual ones, L >= N.

    Raises:
        ValueError: if depth is below num_layers, or num_layers below 1.

    Example:
        >>> interpolate(3, 6)
        [0, 0, 1, 1, 2, 2]
    """
    _check_sizes(num_layers, depth)
    return [position * num_layers // depth for position in range(depth)]


def stack(num_layers: int, depth: int) -> list[int]:
    """Repeat the whole block of layers, and after that as many of its top layers as are missing.

    Args:
        num_layers: real layers, N.
        depth: virtual ones, L >= N.

    Raises:
        ValueError: if depth is below num_layers, or num_layers below 1.

    Example:
        >>> stack(3, 5)
        [0, 1, 2, 1, 2]
    """
    _check_sizes(num_layers, depth)
    num_blocks, num_more = divmod(depth, num_layers)
    return [*range(num_layers)] * num_blocks + [*range(num_layers - num_more, num_layers)]


def low_value_depth(num_layers: int, max_depth: int, draw: float) -> int:
    """Prefer low depths: L = ⌊N·m/(x + n)⌋, cut to [N, Lmax], for x drawn evenly from [1e-6, 1].

    m and n put the hyperbola m/(x + n) through Lmax/N + 0.4 at x = 1e-6 and 0.6 at x = 1.

    Args:
        num_layers: N.
        max_depth: Lmax.
        draw: from [0, 1).
    """
    top = max_depth / num_layers + _HEADROOM
    n = (top * _SMALLEST_DRAW - _LOWEST_RATIO) / (_LOWEST_RATIO - top)
    m = _LOWEST_RATIO * (n + 1.0)
    x = _SMALLEST_DRAW + (1.0 - _SMALLEST_DRAW) * draw
    return min(max(int(num_layers * m / (x + n)), num_layers), max_depth)


def uniform_depth(num_layers: int, max_depth: int, draw: float) -> int:
    """Draw from N to Lmax evenly; arguments as in `low_value_depth`."""
    return num_layers + int(draw * (max_depth - num_layers + 1))


def highest_depth(num_layers: int, max_depth: int, draw: float) -> int:
    """Return Lmax."""
    return max_depth


def lowest_depth(num_layers: int, max_depth: int, draw: float) -> int:
    """Return N."""
    return num_layers


LAYER_MAPS: dict[str, LayerMap] = {"interpolate": interpolate, "stack": stack}

DEPTH_RULES: dict[str, DepthRule] = {
    "low_value": low_value_depth,
    "uniform": uniform_depth,
    "constant_high": highest_depth,
    "constant_low": lowest_depth,
}


def _check_sizes(num_layers: int, depth: int) -> None:
    if not 1 <= num_layers <= depth:
        raise ValueError(
            f"num_layers must be in [1, depth], got num_layers={num_layers} and depth={depth}"
        )
