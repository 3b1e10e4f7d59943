"""Numbers as people read them: bytes, counts, durations, shares.

GiB = 2**30 bytes everywhere, as in the rest of the package.
"""

from __future__ import annotations

ABSENT = "n/a"
"""Shown where a run has no such number, for instance the mean rank of AdamW."""

_BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_COUNT_UNITS = ("", "k", "M", "G", "T", "P", "E")


def format_bytes(num_bytes: float | None, beside: float | None = None) -> str:
    """Return a size with three significant digits and a binary unit, such as ``1.48 MiB``.

    Args:
        num_bytes: The size.
        beside: A larger size to share the unit with, so that two numbers compare at a glance.
    """
    if num_bytes is None:
        return ABSENT
    if beside is None or beside <= num_bytes:
        return _scaled(num_bytes, 1024.0, _BYTE_UNITS)
    unit = _scaled(beside, 1024.0, _BYTE_UNITS).split()[-1]
    return f"{_digits(num_bytes / 1024.0 ** _BYTE_UNITS.index(unit))} {unit}"


def format_count(count: float | None) -> str:
    """Return a count with three significant digits and a decimal unit, such as ``1.84 M``."""
    if count is None:
        return ABSENT
    return _scaled(count, 1000.0, _COUNT_UNITS)


def format_number(value: float | None, digits: int = 4) -> str:
    """Return a plain number with ``digits`` decimals."""
    return ABSENT if value is None else f"{value:.{digits}f}"


def format_share(part: float | None, whole: float | None, digits: int = 1) -> str:
    """Return ``part / whole`` in per cent."""
    if part is None or not whole:
        return ABSENT
    return f"{100 * part / whole:.{digits}f} %"


def format_seconds(seconds: float | None) -> str:
    """Return a duration as ``12.3 s``, ``2 min 05 s`` or ``1 h 02 min``."""
    if seconds is None:
        return ABSENT
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _scaled(value: float, base: float, units: tuple[str, ...]) -> str:
    index = 0
    # 999.5 would print as 1e+03 with three digits, so it moves to the next unit.
    while abs(value) >= 999.5 and index < len(units) - 1:
        value /= base
        index += 1
    is_whole = index == 0 and float(value).is_integer()
    text = f"{value:.0f}" if is_whole else _digits(value)
    return f"{text} {units[index]}".rstrip()


def _digits(value: float) -> str:
    """Return three significant digits, never an exponent for numbers from 0.001 to 1000."""
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"
