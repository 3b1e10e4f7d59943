"""Checks of single settings, with the messages that all layers give."""

from __future__ import annotations

import math
from typing import Any


def check_number(
    name: str,
    value: Any,
    *,
    low: float,
    high: float = math.inf,
    is_low_allowed: bool = True,
    is_high_allowed: bool = True,
) -> None:
    """Refuse what is not a finite number in [low, high], or in that range without an end of it.

    Raises:
        ValueError: naming the setting, its value and the range.
    """
    number = as_number(value)
    is_above = low <= number if is_low_allowed else low < number
    is_below = number <= high if is_high_allowed else number < high
    if not (is_above and is_below) or math.isinf(number):
        first, last = "[" if is_low_allowed else "(", "]" if is_high_allowed else ")"
        allowed = f"in {first}{low:g}, {high:g}{last}" if high < math.inf else f"at least {low:g}"
        raise ValueError(f"{name} must be {allowed} and finite, got {value!r}")


def check_count(name: str, value: Any, *, low: int) -> None:
    """Refuse what is not an int of at least ``low``.

    Raises:
        ValueError: naming the setting, its value and the floor.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} must be an int of at least {low}, got {value!r}")


def check_flag(name: str, value: Any) -> None:
    """Refuse what is not True or False.

    Raises:
        ValueError: naming the setting and its value.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Refuse what is not one of the allowed names.

    Raises:
        ValueError: naming the setting, its value and what is allowed.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def as_number(value: Any) -> float:
    """The value as a float; NaN, which fails every comparison, where it is no number."""
    try:
        return math.nan if isinstance(value, (str, bool)) else float(value)
    except (TypeError, ValueError):
        return math.nan
