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
        ValueError: if a pattern is found in no name.
    """
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
