"""Training language models: from a config to a finished run with model, metrics and report.

`TrainConfig` and the errors are light; `train` brings torch and transformers when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adarankgrad.train.config import TrainConfig
from adarankgrad.train.errors import Interrupted, TrainingError, UserError

if TYPE_CHECKING:
    from adarankgrad.train.run import train

__all__ = ["Interrupted", "TrainConfig", "TrainingError", "UserError", "train"]


def __getattr__(name: str) -> Any:
    if name == "train":
        from adarankgrad.train.run import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
