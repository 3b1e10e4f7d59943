"""``--extrapolation``: from the setting to steps whose gradients are taken ahead of the weights."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from adarankgrad.optim.engine import SubspaceOptimizer
from adarankgrad.schedules.extrapolation import Extrapolation, ExtrapolationConfig
from adarankgrad.train.errors import UserError
from adarankgrad.train.method_settings import errors_of, read_method
from adarankgrad.train.methods import Method, Step

if TYPE_CHECKING:
    from adarankgrad.train.run_config import RunConfig

_FLAG = "--extrapolation"


def extrapolation_settings(config: RunConfig) -> ExtrapolationConfig | None:
    """Return where gradients are taken, or None where that is at the weights.

    Raises:
        UserError: A setting is unknown, missing or out of range.
    """
    return read_method(
        ExtrapolationConfig,
        config.extrapolation,
        _FLAG,
        needs="step",
        advice="its length in units of weight a gradient, such as --extrapolation step=0.1",
    )


def extrapolated_steps(
    config: RunConfig, model: nn.Module, optimizer: Optimizer
) -> ExtrapolatedSteps | None:
    """Return the method that moves the weights ahead, where the settings ask for it.

    Raises:
        UserError: It cannot be used with the optimizer.
    """
    settings = extrapolation_settings(config)
    if settings is None:
        return None
    _refuse_steps_in_backward(config, optimizer)
    with errors_of(_FLAG):
        return ExtrapolatedSteps(
            Extrapolation(
                optimizer,
                model,
                settings,
                num_micro_batches=config.gradient_accumulation,
                seed=config.seed,
            )
        )


class ExtrapolatedSteps(Method):
    """Takes the gradients of every step ahead of the weights.

    Where a fresh gradient is needed, it is the first micro-batch's, with the random numbers
    (dropout) that the micro-batch draws again in the step.

    Args:
        extrapolation: Moves the weights.
    """

    name = "extrapolation"

    def __init__(self, extrapolation: Extrapolation) -> None:
        self.extrapolation = extrapolation

    def begin_step(self, step: Step) -> None:
        """Move the weights ahead."""
        self.extrapolation.num_micro_batches = len(step.micro_batches)
        is_fresh = self.extrapolation.config.source == "fresh"
        self.extrapolation.begin(partial(_backward, step) if is_fresh else None)

    def end_backward(self, step: Step) -> None:
        """Bring the weights back, before clipping."""
        self.extrapolation.end()

    def abandon_step(self) -> None:
        """Bring the weights back."""
        self.extrapolation.abandon()

    def state_dict(self) -> dict[str, Any]:
        """Return past gradients and counts."""
        return self.extrapolation.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.extrapolation.load_state_dict(state)


def _backward(step: Step) -> None:
    """Compute the gradient of the first micro-batch, leaving random numbers as they were."""
    step.model.train()
    batch = step.micro_batches[0]
    device = batch["input_ids"].device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        step.share(step.model, batch).backward()  # type: ignore[no-untyped-call]


def _refuse_steps_in_backward(config: RunConfig, optimizer: Optimizer) -> None:
    """Refuse residual steps between the micro-batches of a step: they would be undone."""
    if not config.accumulate_in_backward or config.gradient_accumulation == 1:
        return
    assert isinstance(optimizer, SubspaceOptimizer)
    for group in optimizer.param_groups:
        if group["project"] and group["residual"] != "none":
            raise UserError(
                f"--extrapolation would undo the steps that residual={group['residual']} takes in "
                "each backward pass with --accumulate-in-backward: use --gradient-accumulation 1 "
                "or --optimizer-args residual=none, or leave one of them out."
            )
