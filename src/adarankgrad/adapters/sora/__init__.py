"""SoRA (arXiv 2311.11696): LoRA with a gate on each rank, driven to zero by a proximal step.

The shape is `adapters.interface`'s; training phases with rising sparsity also need `lr_factor`.
The exported adapter is a plain LoRA for peft. docs/sora.md says what of it is published, what is
in the authors' code, and what is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from ...core.checks import check_choice, check_count, check_flag, check_number
from ..lora import LoraSettings, add_lora, check_linear, load_lora, targeted_modules
from .files import export_plain_lora
from .gates import (
    THRESHOLDS,
    GateHook,
    gates_of,
    num_surviving_parameters,
    surviving_ranks,
)
from .layer import GATE_INITS, GatedLoraConfig
from .phases import (
    SPACINGS,
    SparsitySchedule,
    phase_starts,
    rising_shrinkages,
    shrinkage_for,
)

__all__ = [
    "Config",
    "GateHook",
    "SoRAConfig",
    "SparsitySchedule",
    "apply",
    "export",
    "load",
    "lr_factor",
    "num_surviving_parameters",
    "param_groups",
    "schedule",
    "shrinkage_for",
    "step_hook",
    "surviving_ranks",
]


@dataclass(kw_only=True)
class SoRAConfig(LoraSettings):
    """Settings of SoRA, and of the LoRA that it gates.

    Attributes:
        rank: of every layer at the start, and its ceiling.
        alpha: A and B are scaled by ``alpha / rank``, whatever survives.
        gate_init: ``"normal"`` draws gates from N(0, 1), as the authors' code; ``"ones"``.
        train_gates: False freezes the gates, and takes no setting that would move them.
        gate_lr: of the gates; None for that of A and B.
        threshold: ``"soft"`` is the soft threshold of the paper; ``"official"`` the one of the
            authors' code, which also zeroes what lies between one and two shrinkages.
        shrinkage: of the gates at each step (ξ). None: 0.6745 / steps, at which half of the gates
            without gradient die within the run (ours); with phases, 0.
        shrinkage_unit: ``"constant"``, as the authors' code; ``"lr"`` multiplies by the gates'
            present learning rate, as the proximal step of an L1 term of weight ``shrinkage``.
        l1_weight: of the mean of |g| in the loss, besides the shrinkage; the authors' code has
            both. 0 leaves it out.
        num_phases: after the first, with rising shrinkage; 0 for none.
        max_shrinkage: of the last phase.
        phase_spacing: ``"linear"``, ``"log_linear"`` or ``"exp_linear"``; see `rising_shrinkages`.
        first_phase_share: of all steps, in (0, 1); the other phases divide the rest evenly.
        warmup_share: of each phase, in [0, 1), for `lr_factor`.

    Raises:
        ValueError: if a setting is out of range or no pattern, or settings contradict each other.
    """

    rank: int = 8
    alpha: float = 16.0
    gate_init: Literal["normal", "ones"] = "normal"
    train_gates: bool = True
    gate_lr: float | None = None
    threshold: Literal["soft", "official"] = "soft"
    shrinkage: float | None = None
    shrinkage_unit: Literal["constant", "lr"] = "constant"
    l1_weight: float = 0.0
    num_phases: int = 0
    max_shrinkage: float | None = None
    phase_spacing: Literal["linear", "log_linear", "exp_linear"] = "linear"
    first_phase_share: float = 0.5
    warmup_share: float = 0.06

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("rank", self.rank, low=1)
        check_number("alpha", self.alpha, low=0.0, is_low_allowed=False)
        check_choice("gate_init", self.gate_init, GATE_INITS)
        check_flag("train_gates", self.train_gates)
        check_choice("threshold", self.threshold, tuple(THRESHOLDS))
        check_choice("shrinkage_unit", self.shrinkage_unit, ("constant", "lr"))
        check_choice("phase_spacing", self.phase_spacing, SPACINGS)
        for name in ("gate_lr", "shrinkage", "max_shrinkage"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), low=0.0)
        check_number("l1_weight", self.l1_weight, low=0.0)
        check_count("num_phases", self.num_phases, low=0)
        check_number(
            "first_phase_share",
            self.first_phase_share,
            low=0.0,
            high=1.0,
            is_low_allowed=False,
            is_high_allowed=False,
        )
        check_number("warmup_share", self.warmup_share, low=0.0, high=1.0, is_high_allowed=False)
        self._check_frozen()
        self._check_phases()

    def _check_frozen(self) -> None:
        for name in ("shrinkage", "max_shrinkage", "l1_weight", "gate_lr"):
            if not self.train_gates and getattr(self, name):
                raise ValueError(
                    f"train_gates False leaves nothing that {name} {getattr(self, name)!r} could "
                    "move; leave it out"
                )

    def _check_phases(self) -> None:
        if self.num_phases == 0:
            if self.max_shrinkage is not None:
                raise ValueError("max_shrinkage is of the last phase: set num_phases too")
            return
        start = self.shrinkage or 0.0
        if self.max_shrinkage is None or self.max_shrinkage <= start:
            raise ValueError(
                f"num_phases {self.num_phases} needs max_shrinkage above shrinkage ({start}), got "
                f"{self.max_shrinkage}"
            )
        if self.phase_spacing == "exp_linear" and start == 0.0:
            raise ValueError("phase_spacing 'exp_linear' needs a shrinkage above 0 to start from")


Config = SoRAConfig


def apply(model: nn.Module, config: SoRAConfig) -> nn.Module:
    """Add gated LoRA layers to a model.

    Returns:
        A `peft.PeftModel`. Its own ``save_pretrained`` serves to resume; `export` to deliver.

    Raises:
        ValueError: if the targets match nothing, or something that is not linear.
    """
    lora_config = GatedLoraConfig(
        **config.peft_arguments(),
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        sora_gate_init=config.gate_init,
    )
    names = targeted_modules(model, lora_config)
    check_linear(model, names, "SoRA")
    gated = add_lora(model, lora_config, names)
    if not config.train_gates:
        for gate in gates_of(gated).values():
            gate.requires_grad_(False)
    return gated


def param_groups(
    model: nn.Module, config: SoRAConfig, *, lr: float, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Return two groups: A, B and what is trained in full; and the gates, without decay.

    Raises:
        ValueError: if the model has no gates.
    """
    gates = [gate for gate in gates_of(model).values() if gate.requires_grad]
    is_gate = {id(gate) for gate in gates}
    others = [
        param for param in model.parameters() if param.requires_grad and id(param) not in is_gate
    ]
    gate_lr = lr if config.gate_lr is None else config.gate_lr
    groups = [
        {"params": others, "lr": lr, "weight_decay": weight_decay},
        {"params": gates, "lr": gate_lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def schedule(config: SoRAConfig, *, num_steps: int) -> SparsitySchedule:
    """Return the phases of a run of ``num_steps`` optimizer steps.

    Raises:
        ValueError: if a phase would have no step.
    """
    check_count("num_steps", num_steps, low=1)
    starts = phase_starts(num_steps, config.num_phases, config.first_phase_share)
    if config.max_shrinkage is None:
        given = config.shrinkage
        shrinkages = [shrinkage_for(num_steps) if given is None else given]
    else:
        start = config.shrinkage or 0.0
        rising = rising_shrinkages(
            start, config.max_shrinkage, config.num_phases, config.phase_spacing
        )
        shrinkages = [start, *rising]
    return SparsitySchedule(starts, num_steps, tuple(shrinkages), config.warmup_share)


def lr_factor(config: SoRAConfig, *, num_steps: int) -> Callable[[float], float]:
    """Return the learning rate's factor for `torch.optim.lr_scheduler.LambdaLR`.

    It warms up and decays once in every phase, so that every phase trains. Without phases it is
    the usual linear schedule, and any other does as well.

    Raises:
        ValueError: if a phase would have no step.
    """
    return schedule(config, num_steps=num_steps).lr_factor


def step_hook(
    model: nn.Module,
    config: SoRAConfig,
    *,
    num_steps: int,
    optimizer: Optimizer | None = None,
) -> GateHook:
    """Return the hook that shrinks the gates; ``shrinkage_unit="lr"`` needs the optimizer.

    Warns where the optimizer's rate of the gates is below the shrinkage.

    Raises:
        ValueError: if the model has no gates, or a phase would have no step.
    """
    hook = GateHook(model, config, schedule(config, num_steps=num_steps), optimizer)
    hook.warn_if_no_gate_can_hold()
    return hook


def export(model: nn.Module, folder: str | PathLike[str]) -> None:
    """Write a plain LoRA adapter: dead ranks and layers left out, gates folded into B.

    Raises:
        ValueError: if the model has no gates, or none that is not zero.
    """
    export_plain_lora(model, folder)


def load(base_model: nn.Module, folder: str | PathLike[str]) -> nn.Module:
    """Load the adapter as `peft.PeftModel.from_pretrained` does, after a check that it fits.

    Raises:
        ValueError: if the folder holds no plain LoRA, a damaged one, or one of another base model.
    """
    return load_lora(base_model, folder)
