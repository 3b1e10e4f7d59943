"""What an optimizer's step on theta becomes: preconditioned updates, and decay of the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..core.signed_power import signed_power_slope
from .power import Power, powered_weights
from .powerprop import PowerpropConfig

Group = dict[str, Any]


def split_groups(groups: list[Group], model: nn.Module) -> list[Group]:
    """Divide every parameter group into powered weights and others, so that decay can differ.

    Args:
        groups: of parameters or of (name, parameter) pairs; not changed.
        model: from `powerpropagate`.
    """
    powered = {id(each.theta) for each in powered_weights(model)}
    divided: list[Group] = []
    for group in groups:
        members = list(group["params"])
        for wanted in (True, False):
            part = [each for each in members if (id(_tensor(each)) in powered) == wanted]
            if part:
                divided.append({**group, "params": part})
    return divided


class PowerUpdates:
    """Hooks on an optimizer that carry out ``adam_mode`` and ``decay_on``.

    Preconditioned: the gradient that the optimizer, clipping and scaling see is the loss's by w,
    and of the step that it makes, theta moves by alpha |theta|^(alpha-1) times as much. Decay of
    powered weights is taken from the optimizer and done here, after its step: (1 - lr * decay) on
    theta or on w. A weight without gradient, and a step that the optimizer skips, change nothing.

    Args:
        optimizer: any that has its groups divided by `split_groups`; its ``weight_decay`` of
            powered groups is set to 0. Load its state after this.
        model: from `powerpropagate`.
        config: the same as there.

    Raises:
        ValueError: nothing in the model is powered, a powered weight is of half precision (whose
            rounding would swallow the decay), or a group with decay mixes both kinds of weight.

    Memory: with preconditioned updates, a copy of the powered weights during a step.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module, config: PowerpropConfig) -> None:
        powers = {id(each.theta): each.power for each in powered_weights(model)}
        if not powers:
            raise ValueError("no weight of the model is trained by its power; powerpropagate first")
        self.config = config
        self._powers = powers
        self._starts: dict[int, Tensor | None] = {}
        self._num_skipped = 0
        _refuse_half(model, config)
        self._decays = [self._take_decay(group) for group in optimizer.param_groups]
        for power in powers.values():
            power.passes_gradient = config.adam_mode == "preconditioned"
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def remove(self) -> None:
        """Leave the optimizer's steps alone from now on."""
        for handle in self._handles:
            handle.remove()
        for power in self._powers.values():
            power.passes_gradient = False

    def _take_decay(self, group: Group) -> float:
        is_powered = [id(param) in self._powers for param in group["params"]]
        decay = float(group.get("weight_decay", 0.0))
        if not any(is_powered) or decay == 0:
            return 0.0
        if not all(is_powered):
            raise ValueError(
                "a parameter group with weight_decay mixes powered weights and others; divide the "
                "groups with split_groups before the optimizer is built"
            )
        group["weight_decay"] = 0.0
        return decay

    @torch.no_grad()
    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(each is not None for each in (*args[1:], *kwargs.values())):
            raise ValueError("powered updates need gradients before step(), not a closure")
        added = optimizer.param_groups[len(self._decays) :]
        self._decays += [self._take_decay(group) for group in added]
        keeps_start = self.config.adam_mode == "preconditioned"
        self._num_skipped = _num_skipped(optimizer)
        self._starts = {
            id(param): param.clone() if keeps_start else None
            for group in optimizer.param_groups
            for param in group["params"]
            if id(param) in self._powers and param.grad is not None
        }

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        starts, self._starts = self._starts, {}
        if _num_skipped(optimizer) > self._num_skipped:
            return
        for group, decay in zip(optimizer.param_groups, self._decays, strict=True):
            for param in group["params"]:
                if id(param) in starts:
                    power = self._powers[id(param)]
                    _rescale_step(param, starts[id(param)], power)
                    self._shrink(param, float(group["lr"]) * decay, power)

    def _shrink(self, theta: Tensor, share: float, power: Power) -> None:
        if share:
            kept = 1.0 - share
            theta.mul_(kept if self.config.decay_on == "theta" else kept ** (1.0 / power.alpha))


def _rescale_step(theta: Tensor, start: Tensor | None, power: Power) -> None:
    if start is not None and power.alpha != 1:
        step = theta - start
        theta.copy_(start.addcmul_(signed_power_slope(start, power.alpha), step))


def _refuse_half(model: nn.Module, config: PowerpropConfig) -> None:
    for each in powered_weights(model):
        if config.changes_updates and each.theta.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"adam_mode={config.adam_mode!r} with decay_on={config.decay_on!r} needs float32 "
                f"weights, and {each.name} is {str(each.theta.dtype).removeprefix('torch.')}; use "
                "float32 weights with autocast, or 'theta' for both"
            )


def _num_skipped(optimizer: Optimizer) -> int:
    return int(optimizer.param_groups[0].get("num_skipped_steps", 0))


def _tensor(member: Any) -> Any:
    return member[1] if isinstance(member, tuple) else member
