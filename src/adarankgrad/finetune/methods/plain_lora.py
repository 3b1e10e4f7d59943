"""Plain LoRA of peft, in the shape that every adapter has (`adapters.interface`)."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import Any

from peft import LoraConfig
from torch import nn
from torch.optim import Optimizer

from adarankgrad.adapters.interface import StepHook
from adarankgrad.adapters.lora import LoraSettings, add_lora, load_lora, targeted_modules
from adarankgrad.core.checks import check_count, check_number


@dataclass(kw_only=True)
class LoRASettings(LoraSettings):
    """Settings of LoRA, under the names of the other adapters.

    Attributes:
        rank: of every layer.
        alpha: scaling is ``alpha / rank``.
    """

    rank: int = 8
    alpha: float = 16.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("rank", self.rank, low=1)
        check_number("alpha", self.alpha, low=0.0, is_low_allowed=False)


Config = LoRASettings


def apply(model: nn.Module, config: LoRASettings) -> nn.Module:
    """Add LoRA layers, freeze the rest."""
    lora_config = LoraConfig(
        **config.peft_arguments(),
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
    )
    return add_lora(model, lora_config, targeted_modules(model, lora_config))


def param_groups(
    model: nn.Module, config: LoRASettings, *, lr: float, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Return one group: A, B and what is trained in full."""
    params = [param for param in model.parameters() if param.requires_grad]
    return [{"params": params, "lr": lr, "weight_decay": weight_decay}]


def step_hook(
    model: nn.Module, config: LoRASettings, *, num_steps: int, optimizer: Optimizer | None = None
) -> StepHook:
    """Return a hook that does nothing."""
    return StepHook()


def export(model: nn.Module, folder: str | PathLike[str]) -> None:
    """Write the adapter as peft does."""
    model.save_pretrained(str(folder))  # type: ignore[operator]


def load(base_model: nn.Module, folder: str | PathLike[str]) -> nn.Module:
    """Load the adapter as `peft.PeftModel.from_pretrained` does, after a check that it fits."""
    return load_lora(base_model, folder)
