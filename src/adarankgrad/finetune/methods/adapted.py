"""An adapter is trained: what all of them share, and those of peft."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from adarankgrad.adapters.interface import find_adapter, import_with_hint
from adarankgrad.finetune.methods.interface import Method, Prepared
from adarankgrad.optim.groups import Group
from adarankgrad.train.errors import UserError, unknown_name
from adarankgrad.train.loop import run_methods
from adarankgrad.train.method_settings import errors_of
from adarankgrad.train.optimizers import (
    build_optimizer,
    check_ranks_fit,
    find_optimizer,
    projected_parameters,
)
from adarankgrad.train.presets import checkpoint_activations

if TYPE_CHECKING:
    from adarankgrad.finetune.config import FinetuneConfig
    from adarankgrad.finetune.tasks.interface import Task

_SMALLEST_SIDE = 8
_OWN_PARTS = (".lora_", "parametrizations.")
"""Of the names of an adapter's own weights."""


class Adapted(Method):
    """An adapter is trained, with the head if that is new.

    Attributes:
        adapter: A module of the shape of `adapters.interface.Adapter`.
        settings: Of the adapter.
        whole_setting: Name of the one that lists what is trained whole beside the adapter.
    """

    whole_setting: ClassVar[str]

    def __init__(self, config: FinetuneConfig, task: Task) -> None:
        super().__init__(config, task)
        self.adapter = _find(config.method)
        allowed = [spec.name for spec in fields(self.adapter.Config) if spec.name != "task_type"]
        for name in config.adapter:
            if name not in allowed:
                raise unknown_name(f"setting of {config.method}", name, allowed)
        given = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in config.adapter.items()
        }
        with errors_of("--adapter"):
            self.settings = self.adapter.Config(**{**self.implied_settings(), **given})

    @abstractmethod
    def implied_settings(self) -> dict[str, Any]:
        """Return settings of the adapter that follow from those of the run."""

    @abstractmethod
    def names_of(self, model: Any, new_weights: list[str]) -> list[str]:
        """Return new weights as ``whole_setting`` takes them."""

    def lr_factor(self) -> Callable[[float], float] | None:
        """Return the schedule that the adapter brings with it, if any."""
        return None

    def apply(self, model: Any, new_weights: list[str]) -> Any:
        """Add the adapter."""
        if new_weights:
            self.settings = self._with_whole(self.names_of(model, new_weights))
        if self.config.activation_checkpointing:
            checkpoint_activations(model)
        with errors_of(f"--method {self.config.method}"):
            return self.adapter.apply(model, self.settings)

    def prepare(self, model: Any) -> Prepared:
        """Build the optimizer of what is trained, and the hook."""
        config = self.config
        assert config.lr is not None and config.steps is not None
        found = self.adapter.param_groups(
            model, self.settings, lr=config.lr, weight_decay=config.weight_decay
        )
        groups = divide(found, model)
        projected = self._projected(groups)
        optimizer = build_optimizer(groups, config)
        with errors_of(f"--method {config.method}"):
            hook = self.adapter.step_hook(
                model, self.settings, num_steps=config.steps, optimizer=optimizer
            )
        return Prepared(model, optimizer, projected, groups, hook, self.lr_factor())

    def _projected(self, groups: list[Group]) -> list[Tensor]:
        """Return which weights count as projected: without a low-rank optimizer, the adapter's own.

        Raises:
            UserError: A low-rank optimizer would project none of its own.
        """
        config = self.config
        own = [{**group, "params": _own(group["params"])} for group in groups]
        if not find_optimizer(config.optimizer).is_low_rank:
            return [weight for group in own for _, weight in group["params"]]
        advice = f"give it a rank of at least {_SMALLEST_SIDE},"
        check_ranks_fit(config, own, trained=f"--method {config.method}", advice=advice)
        return projected_parameters(groups)

    def _with_whole(self, names: list[str]) -> Any:
        """Return the settings with these names beside those that are given."""
        given = getattr(self.settings, self.whole_setting) or []
        given = [given] if isinstance(given, str) else given
        return replace(self.settings, **{self.whole_setting: [*dict.fromkeys([*given, *names])]})


class AdaptedByPeft(Adapted):
    """LoRA or one of its kind is trained, with the head if that is new."""

    whole_setting = "modules_to_save"

    def check(self, empty_model: Any) -> None:
        """See that targets, optimizer and methods fit."""
        prepared = self.prepare(self.apply(empty_model, []))
        run_methods(self.config, prepared.model, prepared.optimizer)

    def save(self, model: Any, optimizer: Optimizer, folder: Path) -> None:
        """Write an adapter of peft."""
        self.adapter.export(model, folder)
        # Names and number of classes, for a base model that does not know them.
        model.config.save_pretrained(folder)

    def implied_settings(self) -> dict[str, Any]:
        """Return peft's name of the task."""
        return {"task_type": self.task.adapter_type}

    def names_of(self, model: Any, new_weights: list[str]) -> list[str]:
        """Return the topmost modules of which every weight is new, by their full names.

        No adapter of peft goes into modules that are saved whole.
        """
        everything = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        old = everything.difference(new_weights)
        return sorted({_topmost_without(old, name) for name in new_weights})


def divide(groups: list[Group], model: nn.Module) -> list[Group]:
    """Name the weights of groups, and tell matrices, which may be projected, from the rest."""
    names = {id(param): name for name, param in model.named_parameters()}
    divided: list[Group] = []
    for group in groups:
        parts: dict[bool, list[tuple[str, Tensor]]] = {True: [], False: []}
        for param in group["params"]:
            is_matrix = param.dim() == 2 and min(param.shape) >= _SMALLEST_SIDE
            parts[is_matrix].append((names[id(param)], param))
        for is_matrix, params in parts.items():
            stacked = {"stacked": False} if is_matrix else {}
            divided.append({**group, "params": params, "project": is_matrix, **stacked})
    return [group for group in divided if group["params"]]


def _find(name: str) -> Any:
    try:
        if name == "lora":
            return import_with_hint("adarankgrad.finetune.methods.plain_lora")
        return find_adapter(name)
    except ImportError as error:
        raise UserError(f"--method {name}: {error}") from error


def _topmost_without(old: set[str], weight: str) -> str:
    """Return the topmost module with a weight but none of the old ones, else the weight's own."""
    parts = weight.split(".")[:-1]
    modules = [".".join(parts[: depth + 1]) for depth in range(len(parts))]
    without = (each for each in modules if not any(name.startswith(f"{each}.") for name in old))
    return next(without, modules[-1])


def _own(named: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Return which weights are the adapter's own: A, B, gates, SaRA's values; not a head."""
    return [(name, weight) for name, weight in named if any(part in name for part in _OWN_PARTS)]
