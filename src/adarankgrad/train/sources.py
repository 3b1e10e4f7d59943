"""The text that a run trains and validates on, found from its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adarankgrad.train.config import TrainConfig
from adarankgrad.train.data import Files, Source, count_characters, find_source, hold_back
from adarankgrad.train.errors import UserError

_CHARACTERS_PER_TOKEN = 6


def input_paths(config: TrainConfig) -> list[Path]:
    """Every file and folder that a fresh run reads."""
    sources = [source for source in _find_sources(config) if isinstance(source, Files)]
    folders = [Path(name).expanduser() for name in (config.model, config.tokenizer) if name]
    return [path for source in sources for path in source.paths] + folders


def _find_sources(config: TrainConfig) -> tuple[Any, Any]:
    """Find training and validation text, without reading it."""
    needed = config.seq_len * config.batch_size
    num_tokens = needed * config.gradient_accumulation * config.steps
    max_characters = int(num_tokens * _CHARACTERS_PER_TOKEN / 0.95) + 1
    source = find_source(config.data, config.text_column, max_characters)
    if isinstance(source, Files):
        # A byte-level tokenizer makes at most one token of a byte, and one of a document's end.
        num_bytes = source.num_bytes()
        if num_bytes is not None and num_bytes + len(source.paths) < needed:
            raise UserError(
                f"data {config.data} has {num_bytes} bytes, too little text for one batch of "
                f"{config.batch_size} x {config.seq_len} = {needed} tokens: give more data, or "
                "lower --batch-size or --seq-len."
            )
    validation = None
    if config.validation is not None:
        validation = find_source(
            config.validation, config.text_column, max_characters // 20, setting="--validation"
        )
    return source, validation


def find_text(config: TrainConfig) -> tuple[Source, Source]:
    """Find the text to train on and the text to validate on.

    Raises:
        UserError: There is none, or too little.
    """
    source, validation = _find_sources(config)
    if validation is None:
        return hold_back(source, count_characters(source))
    return source, validation
