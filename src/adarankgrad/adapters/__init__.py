"""Fine-tuning with few trainable numbers: PRILoRA, SoRA and SaRA, in one shape (`interface`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .interface import ADAPTERS, Adapter, AdapterError, StepHook, find_adapter, import_with_hint

if TYPE_CHECKING:
    from . import prilora, sara, sora
    from .callback import AdapterCallback
    from .prilora import PRILoRAConfig
    from .sara import SaRAConfig
    from .sora import SoRAConfig

_HOMES = {
    "AdapterCallback": "callback",
    "PRILoRAConfig": "prilora",
    "SaRAConfig": "sara",
    "SoRAConfig": "sora",
}

__all__ = [
    "ADAPTERS",
    "Adapter",
    "AdapterCallback",
    "AdapterError",
    "PRILoRAConfig",
    "SaRAConfig",
    "SoRAConfig",
    "StepHook",
    "find_adapter",
    "prilora",
    "sara",
    "sora",
]


def __getattr__(name: str) -> Any:
    """Load peft and transformers only with the names that need them."""
    if name in ADAPTERS:
        return import_with_hint(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_with_hint(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
