"""``--progressive-depth``: from the setting to a model that grows while it trains."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adarankgrad.schedules.depth import DepthConfig, ProgressiveDepth
from adarankgrad.train.errors import UserError, unknown_name
from adarankgrad.train.paired import PairedOptimizer

if TYPE_CHECKING:
    from adarankgrad.train.recorder import Recorder
    from adarankgrad.train.run_config import RunConfig

DEPTH_NAME = "progressive_depth.pt"
"""The file in a checkpoint that says how far the model had grown."""

_NAMES = tuple(spec.name for spec in fields(DepthConfig))


def depth_settings(config: RunConfig) -> DepthConfig | None:
    """Return how a model grows, or None where it does not.

    Raises:
        UserError: A setting is unknown, missing or out of range.
    """
    given = config.progressive_depth
    if not given:
        return None
    for name in given:
        if name not in _NAMES:
            raise unknown_name("setting of --progressive-depth", name, list(_NAMES))
    if "layers" not in given:
        raise UserError(
            "--progressive-depth has no layers: give those of each stage, such as "
            "--progressive-depth layers=(3,6,12),starts=(0,500,1000)."
        )
    try:
        return DepthConfig(**given)
    except ValueError as error:
        raise UserError(f"--progressive-depth: {error}.") from error


def growing_depth(
    config: RunConfig, model: nn.Module, optimizer: Optimizer
) -> ProgressiveDepth | None:
    """Return what sets a model's depth before each step, where the settings ask for it.

    Args:
        config: The settings.
        model: What is trained; nothing of it is changed before the first step.
        optimizer: Of its weights.

    Raises:
        UserError: The model cannot grow like this.
    """
    settings = depth_settings(config)
    if settings is None:
        return None
    optimizers = optimizer.parts if isinstance(optimizer, PairedOptimizer) else optimizer
    try:
        return ProgressiveDepth(model, settings, seed=config.seed, optimizers=optimizers)
    except ValueError as error:
        raise UserError(f"--progressive-depth: {error}.") from error


def check_stages_are_reached(config: RunConfig, tokens_per_step: int) -> None:
    """See that a run is long enough for its last stage, without which a model is incomplete.

    Raises:
        UserError: It is not.
    """
    settings = depth_settings(config)
    if settings is None:
        return
    of_step = 1 if settings.unit == "steps" else tokens_per_step
    last = (config.steps - 1) * of_step
    if settings.starts[-1] > last:
        raise UserError(
            f"--progressive-depth starts its last stage at {settings.starts[-1]} {settings.unit}, "
            f"and the last of {config.steps} steps begins at {last}: start it earlier, or train "
            "longer."
        )


def check_starts_from_nothing(config: RunConfig, has_weights: bool) -> None:
    """Refuse to grow a model that has weights, which copies of other layers would replace.

    Raises:
        UserError: It has.
    """
    if config.progressive_depth and has_weights:
        raise UserError(
            f"--progressive-depth replaces the upper layers of {config.model}, which has trained "
            "weights: leave it out, or give a config.json to train from the start."
        )


class DepthCallback(TrainerCallback):
    """Sets the depth before the first forward pass of each step."""

    def __init__(self, depth: ProgressiveDepth, recorder: Recorder) -> None:
        self.depth = depth
        self.recorder = recorder

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Grow where a stage begins, and draw the depth."""
        self.depth.begin_step(state.global_step, self.recorder.num_tokens)
