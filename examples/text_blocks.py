"""The data of the examples: a text file, in blocks of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def text_blocks(tokenizer: Any, path: str, length: int = 128) -> list[dict[str, Tensor]]:
    """Cut a text into sequences of ``length`` tokens, each its own labels."""
    tokens = torch.tensor(tokenizer(Path(path).read_text(encoding="utf-8"))["input_ids"])
    blocks = tokens[: len(tokens) // length * length].view(-1, length)
    return [{"input_ids": block, "labels": block} for block in blocks]
