"""Names of parameters by regular expressions, which must match something."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any


def matching_names(
    patterns: str | Sequence[str], named: Iterable[tuple[str, Any]], argument: str
) -> set[str]:
    """Return the names that any of the patterns is found in.

    Args:
        patterns: regular expressions, searched.
        named: pairs whose first part is a name.
        argument: that the patterns were given by, for the message.

    Raises:
        ValueError: if a pattern is no regular expression, or is found in no name.
    """
    check_patterns(argument, patterns)
    names = [name for name, _ in named]
    matched: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = {name for name in names if re.search(pattern, name)}
        if not found:
            raise ValueError(
                f"{argument} pattern {pattern!r} matches no trainable parameter; "
                f"the model has names such as {', '.join(names[:3])}"
            )
        matched |= found
    return matched


def check_pattern_settings(settings: Any, names: Sequence[str]) -> None:
    """Refuse settings that are neither patterns nor None.

    Args:
        settings: an object with the settings as attributes.
        names: of the settings.

    Raises:
        ValueError: naming the first such setting and its value.
    """
    for name in names:
        if getattr(settings, name) is not None:
            check_patterns(name, getattr(settings, name))


def check_patterns(argument: str, patterns: Any) -> None:
    """Refuse what is not one regular expression or a sequence of them.

    Raises:
        ValueError: naming the argument and its value.
    """
    given = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(given, (list, tuple, set, frozenset)) or not all(
        isinstance(pattern, str) for pattern in given
    ):
        raise ValueError(f"{argument} must be a regular expression or several, got {patterns!r}")
    for pattern in given:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"{argument} pattern {pattern!r} is no regular expression: {error}"
            ) from error
