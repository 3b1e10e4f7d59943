"""What to write and how, checked before a model is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from adarankgrad.fetch.advice import advice_for_missing
from adarankgrad.train.errors import UserError


@dataclass(frozen=True)
class GenerateRequest:
    """One prompt for one model.

    Attributes:
        model: Folder of a model or an adapter, or of a run that holds one.
        prompt: Text to continue, or with `chat` what the user says.
        chat: Whether the prompt goes through the tokenizer's chat template.
        max_new_tokens: Most tokens to write, at least 1.
        temperature: 0 takes the likeliest token each time; above, tokens are sampled.
        top_p: Share of probability, in (0, 1], that tokens are sampled from.
        seed: Seed of sampling, from 0.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        trust_remote_code: Whether to run code that the model's folder holds.

    Raises:
        UserError: A value is not allowed, as far as can be told without the model.
    """

    model: Path
    prompt: str
    chat: bool = False
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float | None = None
    seed: int = 0
    device: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if not self.model.is_dir():
            advice = advice_for_missing(str(self.model)) or (
                ": name that of a model, an adapter or a finished run."
            )
            raise UserError(f"there is no folder {self.model}{advice}")
        if not self.prompt:
            raise UserError("the prompt is empty: give text with --prompt.")
        try:
            self.prompt.encode("utf-8")
        except UnicodeEncodeError as error:  # bytes of another encoding, from a terminal or a file
            raise UserError("the prompt is not text in UTF-8: convert it first.") from error
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens = {self.max_new_tokens} must be at least 1.")
        if not 0 <= self.temperature < math.inf:
            raise UserError(
                f"temperature = {self.temperature:g} must be 0 (the likeliest token) or a finite "
                "number above it."
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p:g} must lie in (0, 1].")
        if self.top_p is not None and self.temperature == 0:
            raise UserError("top_p needs sampled tokens: give a temperature above 0 as well.")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed = {self.seed} must lie in [0, 2**32).")
