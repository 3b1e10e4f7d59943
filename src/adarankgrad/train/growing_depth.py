"""``--progressive-depth``: from the setting to a model that grows while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from adarankgrad.schedules.depth import DepthConfig, ProgressiveDepth
from adarankgrad.train.errors import UserError
from adarankgrad.train.growing_batch import adadagrad_settings
from adarankgrad.train.method_settings import errors_of, read_method
from adarankgrad.train.methods import Method, Step
from adarankgrad.train.paired import PairedOptimizer

if TYPE_CHECKING:
    from adarankgrad.train.run_config import RunConfig

_FLAG = "--progressive-depth"


def depth_settings(config: RunConfig) -> DepthConfig | None:
    """Return how a model grows, or None where it does not.

    Raises:
        UserError: A setting is unknown, missing or out of range.
    """
    return read_method(
        DepthConfig,
        config.progressive_depth,
        _FLAG,
        needs="layers",
        advice="those of each stage, such as "
        "--progressive-depth layers=(3,6,12),starts=(0,500,1000)",
    )


def growing_depth(config: RunConfig, model: nn.Module, optimizer: Optimizer) -> GrowingDepth | None:
    """Return the method that sets a model's depth, where the settings ask for it.

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
    with errors_of(_FLAG):
        return GrowingDepth(
            ProgressiveDepth(model, settings, seed=config.seed, optimizers=optimizers)
        )


class GrowingDepth(Method):
    """Sets the depth of each step, and lets the model grow where a stage begins.

    Args:
        depth: Does it.
    """

    name = "progressive_depth"

    def __init__(self, depth: ProgressiveDepth) -> None:
        self.depth = depth

    def begin_step(self, step: Step) -> None:
        """Grow where a stage begins, and draw the depth."""
        self.depth.begin_step(step.num_steps_before, step.num_tokens_before)

    def metrics(self) -> dict[str, float | None]:
        """Return the layers of the present stage, where there are several stages."""
        grows = self.depth.config.layers[0] < self.depth.config.max_depth
        return {"layers": self.depth.num_layers} if grows else {}

    @property
    def is_whole(self) -> bool:
        """Whether the last stage has begun."""
        return self.depth.num_layers == self.depth.config.max_depth

    def state_dict(self) -> dict[str, Any]:
        """Return how far the model has grown."""
        return self.depth.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.depth.load_state_dict(state)


def depth_of(methods: Sequence[Method]) -> ProgressiveDepth | None:
    """Return what sets the depth among the methods of a run, or None."""
    return next((method.depth for method in methods if isinstance(method, GrowingDepth)), None)


def check_stages_are_reached(config: RunConfig, sample_tokens: int) -> None:
    """See that a run is long enough for its last stage, without which a model is incomplete.

    Args:
        config: The settings.
        sample_tokens: Tokens in a sample.

    Raises:
        UserError: It is not, or may not be, where the batch grows.
    """
    settings = depth_settings(config)
    if settings is None:
        return
    growth = adadagrad_settings(config)
    if settings.unit == "steps":
        last = config.steps - 1
    else:
        last_batch = config.samples_per_step if growth is None else growth.max_batch_size
        last = (config.samples_per_step * config.steps - last_batch) * sample_tokens
    if settings.starts[-1] > last:
        begins = f"of {config.steps} steps begins" if growth is None else "step may begin"
        raise UserError(
            f"--progressive-depth starts its last stage at {settings.starts[-1]} {settings.unit}, "
            f"and the last {begins} at {last}: start it earlier, or train longer."
        )


def check_starts_from_nothing(config: RunConfig, has_weights: bool) -> None:
    """Refuse to grow a model that has weights, which copies of other layers would replace.

    Raises:
        UserError: It has.
    """
    if config.progressive_depth and has_weights:
        raise UserError(
            f"--progressive-depth replaces the upper layers of {config.model}, which has trained "
            "weights: leave it out, start from its config.json, or let it grow beyond its depth "
            "with adarankgrad finetune."
        )
