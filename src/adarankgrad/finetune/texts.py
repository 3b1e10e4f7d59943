"""Texts before they are tokenized."""

from __future__ import annotations


def split_characters(text: str) -> str:
    """Put one space between all characters but spaces: ``EVQL`` becomes ``E V Q L``."""
    return " ".join("".join(text.split()))
