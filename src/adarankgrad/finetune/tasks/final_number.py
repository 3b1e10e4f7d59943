"""The number that an answer ends with, as GSM8K's do: ``#### 72``."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

MARK = "####"
# A sign behind a letter or digit is a dash, as in "pages 1-3".
_NUMBER = re.compile(r"(?:(?<!\w)-)?\$?\d[\d,]*(?:\.\d+)?")


def final_number(answer: str) -> Decimal | None:
    """Return the first number behind the last mark, or the last of all where there is no mark."""
    _, mark, behind = answer.rpartition(MARK)
    found = _NUMBER.findall(behind)
    if not found:
        return None
    text = found[0 if mark else -1].replace(",", "").replace("$", "")
    try:
        return Decimal(text)
    except InvalidOperation:
        return None


def is_marked(answer: str) -> bool:
    """Tell whether an answer names its number behind a mark."""
    return MARK in answer and final_number(answer) is not None
