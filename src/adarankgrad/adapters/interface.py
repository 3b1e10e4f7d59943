"""The shape that every adapter has, so that one loop, one callback and one command serve them all.

An adapter is a module (`prilora`, `sora`, `sara`) with the names of `Adapter`:

    adapter = find_adapter("prilora")
    config = adapter.Config(first_rank=4)
    model = adapter.apply(model, config)
    optimizer = torch.optim.AdamW(adapter.param_groups(model, config, lr=1e-3))
    hook = adapter.step_hook(model, config, num_steps=1000, optimizer=optimizer)
    for step in range(1, 1001):
        loss(model).backward()
        hook.before_optimizer_step(step)
        optimizer.step()
        hook.on_optimizer_step(step)
        optimizer.zero_grad()
    adapter.export(model, "tuned")
    model = adapter.load(base_model, "tuned")

With transformers' `Trainer`, `AdapterCallback(hook)` makes the two calls, and saves and loads the
hook's state beside each checkpoint.
"""

from __future__ import annotations

import importlib
from os import PathLike
from types import ModuleType
from typing import Any, Protocol, cast

from torch import nn
from torch.optim import Optimizer

from ..core.checks import check_choice

ADAPTERS = ("prilora", "sora", "sara")
"""Names for `find_adapter`; plain LoRA needs nothing but peft."""


class AdapterError(RuntimeError):
    """Nothing of an adapter is left to train."""


class StepHook:
    """What a method does beside the optimizer: one object a training run.

    Steps count optimizer steps from 1; micro-batches of one step share its number.

    Attributes:
        optimizer: of the run; some settings of some methods need it, and say so.
    """

    optimizer: Optimizer | None = None

    def before_optimizer_step(self, step: int) -> None:
        """Change the gradients, after clipping and unscaling, before ``optimizer.step()``."""

    def on_optimizer_step(self, step: int) -> None:
        """Change weights or move statistics, after ``optimizer.step()``, before ``zero_grad()``.

        Raises:
            AdapterError: if nothing is left to train.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain numbers, all that resuming needs beside model and optimizer."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`.

        Raises:
            ValueError: if the state belongs to another model.
        """

    def remove(self) -> None:
        """Leave the model: no hook of ours runs in it any more."""


class Adapter(Protocol):
    """A method to fine-tune a model with few trainable numbers."""

    Config: type
    """A dataclass; every field has a default and is checked when an instance is made."""

    def apply(self, model: nn.Module, config: Any) -> nn.Module:
        """Add the trainable numbers, freeze the rest. The model is changed in place.

        Raises:
            ValueError: if the configuration does not fit the model.
        """

    def param_groups(
        self, model: nn.Module, config: Any, *, lr: float, weight_decay: float = 0.0
    ) -> list[dict[str, Any]]:
        """Return the trainable parameters in groups for an optimizer of torch."""

    def step_hook(
        self, model: nn.Module, config: Any, *, num_steps: int, optimizer: Optimizer | None = None
    ) -> StepHook:
        """Return what is to be called around each of ``num_steps`` optimizer steps."""

    def export(self, model: nn.Module, folder: str | PathLike[str]) -> None:
        """Write what was trained to a folder, small, for `load`."""

    def load(self, base_model: nn.Module, folder: str | PathLike[str]) -> nn.Module:
        """Put what `export` wrote on the model it was trained from, changed in place.

        Raises:
            ValueError: if the folder holds no such adapter, or one of another base model.
        """


def find_adapter(name: str) -> Adapter:
    """Import an adapter by name, one of `ADAPTERS`.

    Raises:
        ValueError: if there is none of that name.
        ImportError: if a package that it needs is missing.
    """
    check_choice("adapter", name, ADAPTERS)
    return cast(Adapter, import_with_hint(f"{__package__}.{name}"))


def import_with_hint(module_name: str) -> ModuleType:
    """Import a module of ours, and say how to get what it needs if that is missing.

    Raises:
        ImportError: if it is.
    """
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{module_name} needs {error.name}: pip install 'adarankgrad[finetune]'"
        ) from error
