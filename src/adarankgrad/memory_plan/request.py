"""What a plan is asked for, checked before anything is built."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from adarankgrad.optim.options import parse_budget
from adarankgrad.train.config import TrainConfig
from adarankgrad.train.errors import UserError, unknown_name
from adarankgrad.train.optimizers import OPTIMIZERS

DEVICES = ("cuda", "cpu")
QUANTIZED_ADAMW = "adamw-8bit"
LORA = "lora"
_NOT_PLANNED = ("adagrad-norm",)
ALLOWED_OPTIMIZERS = (
    *(name for name in OPTIMIZERS if name not in _NOT_PLANNED),
    QUANTIZED_ADAMW,
    LORA,
)


@dataclass(frozen=True)
class PlanRequest:
    """What to predict.

    Attributes:
        config: As for training; of its optimizer, the one whose switches are compared.
        device: Where training will run, ``cuda`` or ``cpu``.
        memory: Bytes that must not be exceeded, or None.
    """

    config: TrainConfig
    device: str = "cuda"
    memory: int | None = None

    @classmethod
    def from_settings(
        cls, settings: dict[str, Any], *, device: str = "cuda", gpu: str | None = None
    ) -> PlanRequest:
        """Check settings, as flags give them.

        Raises:
            UserError: A setting is unknown or out of range, or a size does not parse.
        """
        if device not in DEVICES:
            raise unknown_name("device", device, list(DEVICES))
        optimizer = settings.get("optimizer", "adarankgrad")
        if optimizer not in ALLOWED_OPTIMIZERS:
            raise unknown_name("optimizer to plan for", optimizer, list(ALLOWED_OPTIMIZERS))
        # A plan reads no data and writes no run.
        config = TrainConfig.from_settings({**settings, "data": "-", "output": "-"})
        if optimizer not in OPTIMIZERS and config.optimizer_args:
            raise UserError(f"{optimizer} takes no --optimizer-args here: leave them out.")
        return cls(config, device, None if gpu is None else parse_size(gpu))


def parse_size(text: str) -> int:
    """Read ``24GiB`` or ``24GB`` as bytes.

    Raises:
        UserError: The text is no size.
    """
    try:
        size = parse_budget(text)
    except ValueError:
        size = None
    if not isinstance(size, int) or re.match(r"\s*\d", text) is None:
        raise UserError(f"--gpu {text!r} is not a size: write 24GiB (2**30 bytes each) or 24GB.")
    return size
