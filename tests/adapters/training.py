"""A plain loop around any adapter, as `adapters.interface` shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from adarankgrad.adapters import StepHook, find_adapter

from .models import causal_loss, token_batch


class Run:
    """A model with adapter, AdamW and hook."""

    def __init__(
        self,
        method: str,
        model: nn.Module,
        config: Any,
        *,
        num_steps: int = 20,
        lr: float = 1e-2,
        weight_decay: float = 0.0,
        batch_loss: Callable[[nn.Module, int], Tensor] | None = None,
    ) -> None:
        adapter = find_adapter(method)
        self.model = adapter.apply(model, config)
        groups = adapter.param_groups(self.model, config, lr=lr, weight_decay=weight_decay)
        self.optimizer = torch.optim.AdamW(groups)
        self.hook: StepHook = adapter.step_hook(
            self.model, config, num_steps=num_steps, optimizer=self.optimizer
        )
        self.batch_loss = batch_loss or (lambda model, step: causal_loss(model, token_batch(step)))

    def train(self, steps: Iterable[int]) -> Run:
        self.model.train()
        for step in steps:
            self.batch_loss(self.model, step).backward()
            self.hook.before_optimizer_step(step)
            self.optimizer.step()
            self.hook.on_optimizer_step(step)
            self.optimizer.zero_grad()
        return self

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "hook": self.hook.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.hook.load_state_dict(state["hook"])


def assert_same_state(first: nn.Module, second: nn.Module) -> None:
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
