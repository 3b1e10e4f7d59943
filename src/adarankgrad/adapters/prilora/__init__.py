"""PRILoRA (arXiv 2401.11316): LoRA with ranks that rise over depth and with ongoing pruning of A.

The shape is `adapters.interface`'s. The adapter is a plain LoRA for peft, at any time.
docs/prilora.md says what of it is published and what is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal, get_args

from peft import LoraConfig
from torch import nn
from torch.optim import Optimizer

from ...core.checks import check_choice, check_count, check_number
from ..lora import LoraSettings, add_lora, check_linear, load_lora, targeted_modules
from .pruning import PruningHook
from .ranks import depth_ranks, layer_position

__all__ = [
    "Config",
    "PRILoRAConfig",
    "PruningHook",
    "apply",
    "export",
    "load",
    "param_groups",
    "step_hook",
]

AlphaRule = Literal["constant_scaling", "constant_alpha"]


@dataclass(kw_only=True)
class PRILoRAConfig(LoraSettings):
    """Settings of PRILoRA, and of the LoRA it is.

    Attributes:
        first_rank: of the first layer.
        last_rank: of the last layer; 4 to 12 over twelve layers, the published example, are 8 on
            average.
        alpha: scaling is ``alpha`` over the mean of the two ranks, or over the rank.
        alpha_rule: ``"constant_scaling"`` scales all layers alike (ours); ``"constant_alpha"``
            divides the same ``alpha`` by each layer's rank.
        prune_share: of A that is set to zero at each event, in [0, 1); 0 prunes nothing. Ours.
        prune_every: optimizer steps between events. Ours.
        norm_decay: of the running mean of the inputs' norms, in [0, 1); 0 keeps the last step's.
            Ours.
        compare: entries of A with those of the same ``"row"``, or of the whole ``"matrix"``. Ours.

    Raises:
        ValueError: if a setting is out of range, or no pattern.
    """

    first_rank: int = 4
    last_rank: int = 12
    alpha: float = 16.0
    alpha_rule: AlphaRule = "constant_scaling"
    prune_share: float = 0.5
    prune_every: int = 40
    norm_decay: float = 0.9
    compare: Literal["row", "matrix"] = "row"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("first_rank", self.first_rank, low=1)
        check_count("last_rank", self.last_rank, low=1)
        check_number("alpha", self.alpha, low=0.0, is_low_allowed=False)
        check_choice("alpha_rule", self.alpha_rule, get_args(AlphaRule))
        for name in ("prune_share", "norm_decay"):
            check_number(name, getattr(self, name), low=0.0, high=1.0, is_high_allowed=False)
        check_count("prune_every", self.prune_every, low=1)
        check_choice("compare", self.compare, ("row", "matrix"))


Config = PRILoRAConfig


def apply(model: nn.Module, config: PRILoRAConfig) -> nn.Module:
    """Add LoRA layers to a model, with ranks that rise over its depth.

    ``target_modules="all-linear"`` takes the linear layers inside numbered layers; heads, poolers
    and embeddings stay as they are.

    Returns:
        A `peft.PeftModel`.

    Raises:
        ValueError: if the targets match nothing, something that is not linear, or something that
            lies in no numbered layer.
    """
    lora_config = LoraConfig(**config.peft_arguments(), r=config.last_rank)
    names = targeted_modules(model, lora_config)
    if config.target_modules == "all-linear":
        names = [name for name in names if layer_position(name) is not None] or names
        lora_config.target_modules = names
    check_linear(model, names, "PRILoRA")
    every_name = [name for name, _ in model.named_modules()]
    ranks = depth_ranks(every_name, names, first=config.first_rank, last=config.last_rank)
    lora_config.rank_pattern = ranks
    lora_config.alpha_pattern = {pattern: _alpha(config, rank) for pattern, rank in ranks.items()}
    return add_lora(model, lora_config, names)


def param_groups(
    model: nn.Module, config: PRILoRAConfig, *, lr: float, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Return one group: A, B and what is trained in full."""
    params = [param for param in model.parameters() if param.requires_grad]
    return [{"params": params, "lr": lr, "weight_decay": weight_decay}]


def step_hook(
    model: nn.Module,
    config: PRILoRAConfig,
    *,
    num_steps: int,
    optimizer: Optimizer | None = None,
) -> PruningHook:
    """Return the hook that follows the inputs' norms and prunes A; ``num_steps`` does not matter.

    It watches the inputs of all LoRA layers from now on; `PruningHook.remove` ends that.

    Raises:
        ValueError: if the model has no LoRA layers.
    """
    return PruningHook(model, config)


def export(model: nn.Module, folder: str | PathLike[str]) -> None:
    """Write a plain LoRA adapter; zeros of A are written as zeros."""
    model.save_pretrained(str(folder))  # type: ignore[operator]


def load(base_model: nn.Module, folder: str | PathLike[str]) -> nn.Module:
    """Load the adapter as `peft.PeftModel.from_pretrained` does, after a check that it fits.

    Raises:
        ValueError: if the folder holds no plain LoRA, a damaged one, or one of another base model.
    """
    return load_lora(base_model, folder)


def _alpha(config: PRILoRAConfig, rank: int) -> float:
    if config.alpha_rule == "constant_alpha":
        return config.alpha
    return config.alpha * rank * 2 / (config.first_rank + config.last_rank)
