"""What to do where the folder of a model is not there."""

from __future__ import annotations

import difflib
from pathlib import Path

from adarankgrad.fetch.fetch import SOURCES


def advice_for_missing(folder: str) -> str:
    """Return how to fetch the model that a missing folder is named after, or which one is meant.

    Args:
        folder: As the user typed it.

    Returns:
        The end of a sentence, from its colon on; empty where nothing is known.
    """
    path = Path(folder)
    if path.name in SOURCES:
        return f": fetch it with adarankgrad fetch-model {path.name} --output {folder}."
    parent = path.expanduser().parent
    beside = [child.name for child in parent.iterdir() if child.is_dir()] if parent.is_dir() else []
    close = difflib.get_close_matches(path.name, beside, n=1)
    if close:
        return f": did you mean {path.with_name(close[0])}?"
    named = difflib.get_close_matches(path.name, list(SOURCES), n=1)
    if named:
        folder = str(path.with_name(named[0]))
        return f": did you mean adarankgrad fetch-model {named[0]} --output {folder}?"
    return ""
