"""Fine-tuning pretrained models: from a config to a finished run with model, metrics and report.

`FinetuneConfig` is light; `finetune` brings torch and transformers when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adarankgrad.finetune.config import FinetuneConfig

if TYPE_CHECKING:
    from adarankgrad.finetune.run import finetune

__all__ = ["FinetuneConfig", "finetune"]


def __getattr__(name: str) -> Any:
    if name == "finetune":
        from adarankgrad.finetune.run import finetune

        return finetune
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
