"""What of a model is trained, and what comes out: all weights, or an adapter."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from adarankgrad.adapters.interface import Adapter, StepHook, find_adapter, import_with_hint
from adarankgrad.core.patterns import matching_names
from adarankgrad.optim.groups import Group
from adarankgrad.reparam import export_plain
from adarankgrad.train.errors import UserError, unknown_name
from adarankgrad.train.folder import ADAPTER_FOLDER
from adarankgrad.train.loop import check_trains, prepare_model, prepare_optimizer, run_methods
from adarankgrad.train.method_settings import errors_of
from adarankgrad.train.optimizers import (
    build_optimizer,
    check_ranks_fit,
    find_optimizer,
    group_parameters,
    projected_parameters,
    widen_corrected_weights,
)
from adarankgrad.train.presets import checkpoint_activations

if TYPE_CHECKING:
    from adarankgrad.finetune.config import FinetuneConfig
    from adarankgrad.finetune.tasks.interface import Task

_SMALLEST_SIDE = 8
_OWN_PARTS = (".lora_", "parametrizations.")
"""Of the names of an adapter's own weights."""


@dataclass(frozen=True)
class Prepared:
    """A model ready to train.

    Attributes:
        model: With what is trained.
        optimizer: Of it.
        projected: Weights that count as projected; of an adapter without a low-rank optimizer,
            all of its own.
        groups: The optimizer's groups, by name.
        hook: What the method does around steps; None for nothing.
        lr_factor: From the steps done to the rate's factor; None for the schedule of the settings.
    """

    model: Any
    optimizer: Optimizer
    projected: list[Tensor]
    groups: list[Group]
    hook: StepHook | None = None
    lr_factor: Callable[[float], float] | None = None


class Method(ABC):
    """One way to fine-tune a model.

    Args:
        config: The settings.
        task: What is learnt.
    """

    def __init__(self, config: FinetuneConfig, task: Task) -> None:
        self.config = config
        self.task = task

    @abstractmethod
    def check(self, empty_model: Any) -> None:
        """See on a model without memory that settings and model fit; a `UserError` says why not."""

    @abstractmethod
    def apply(self, model: Any, new_weights: list[str]) -> Any:
        """Give a model what is trained, in place; before it moves to its device."""

    @abstractmethod
    def prepare(self, model: Any) -> Prepared:
        """Build the optimizer of a model from `apply`."""

    @abstractmethod
    def save(self, model: Any, optimizer: Optimizer, folder: Path) -> None:
        """Write what plain transformers or peft load; training cannot go on afterwards."""

    def save_beside(self, model: Any, run_dir: Path) -> None:  # noqa: B027 - most have nothing
        """Write what else the run folder is to hold, before `save`."""

    def summary(self, model: Any) -> dict[str, Any]:
        """Return what the method adds to summary.json, of the model that is delivered."""
        return {}


class Full(Method):
    """Every weight is trained."""

    def check(self, empty_model: Any) -> None:
        """See that optimizer and methods take the model."""
        check_trains(empty_model, self.config)

    def apply(self, model: Any, new_weights: list[str]) -> Any:
        """Train by powers and compute activations again, where the settings ask for it."""
        return prepare_model(model, self.config)

    def prepare(self, model: Any) -> Prepared:
        """Build the optimizer, hooks included."""
        optimizer, projected = prepare_optimizer(model, self.config)
        return Prepared(model, optimizer, projected, group_parameters(model, self.config))

    def save(self, model: Any, optimizer: Optimizer, folder: Path) -> None:
        """Write a plain model."""
        widen_corrected_weights(model, optimizer)
        export_plain(model)
        model.save_pretrained(folder)


class Adapted(Method):
    """An adapter is trained, with the head if that is new."""

    def __init__(self, config: FinetuneConfig, task: Task) -> None:
        super().__init__(config, task)
        self.adapter = _find(config.method)
        allowed = [spec.name for spec in fields(self.adapter.Config) if spec.name != "task_type"]
        for name in config.adapter:
            if name not in allowed:
                raise unknown_name(f"setting of {config.method}", name, allowed)
        self.settings = self._settings()

    def check(self, empty_model: Any) -> None:
        """See that targets, optimizer and methods fit."""
        if self.config.method == "sara":
            model, optimizer = empty_model, self._optimizer_before_selection(empty_model)
        else:
            prepared = self.prepare(self.apply(empty_model, []))
            model, optimizer = prepared.model, prepared.optimizer
        run_methods(self.config, model, optimizer)

    def _optimizer_before_selection(self, model: Any) -> Optimizer:
        """Build the optimizer of the model's own weights: SaRA's are known from values alone."""
        named = list(model.named_parameters())
        with errors_of(f"--method {self.config.method}"):
            dense = matching_names(self.settings.train_fully, named, "train_fully")
            _sara().candidates(named, self.settings, dense)
        return build_optimizer(_divide([{"params": list(model.parameters())}], model), self.config)

    def apply(self, model: Any, new_weights: list[str]) -> Any:
        """Add the adapter."""
        if new_weights:
            self.settings = self._with_new(model, new_weights)
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
        groups = _divide(found, model)
        projected = self._projected(groups)
        optimizer = build_optimizer(groups, config)
        with errors_of(f"--method {config.method}"):
            hook = self.adapter.step_hook(
                model, self.settings, num_steps=config.steps, optimizer=optimizer
            )
        return Prepared(model, optimizer, projected, groups, hook, self._lr_factor())

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

    def _lr_factor(self) -> Callable[[float], float] | None:
        """Return the schedule that SoRA's phases bring with them."""
        if self.config.method != "sora" or self.settings.num_phases == 0:
            return None
        adapter: Any = self.adapter
        factor: Callable[[float], float] = adapter.lr_factor(
            self.settings, num_steps=self.config.steps
        )
        return factor

    def save(self, model: Any, optimizer: Optimizer, folder: Path) -> None:
        """Write an adapter of peft; of SaRA, the whole model with the adapter in its weights."""
        if self.config.method == "sara":
            _sara().merge(model).save_pretrained(folder)
            return
        self.adapter.export(model, folder)
        # Names and number of classes, for a base model that does not know them.
        model.config.save_pretrained(folder)

    def save_beside(self, model: Any, run_dir: Path) -> None:
        """Write SaRA's values by themselves too."""
        if self.config.method == "sara":
            self.adapter.export(model, run_dir / ADAPTER_FOLDER)

    def summary(self, model: Any) -> dict[str, Any]:
        """Count what SoRA's gates have left of A and B."""
        if self.config.method != "sora":
            return {}
        adapter: Any = self.adapter
        return {"surviving_parameters": adapter.num_surviving_parameters(model)}

    def _settings(self) -> Any:
        """Return the adapter's settings as they are given."""
        given = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in self.config.adapter.items()
        }
        if self.config.method == "sara":
            implied: dict[str, Any] = {"seed": self.config.seed}
        else:
            implied = {"task_type": self.task.adapter_type}
        with errors_of("--adapter"):
            return self.adapter.Config(**{**implied, **given})

    def _with_new(self, model: Any, new_weights: list[str]) -> Any:
        """Return the settings with new weights trained and saved whole, beside what is given."""
        if self.config.method == "sara":
            name, new = "train_fully", [f"^{re.escape(weight)}$" for weight in new_weights]
        else:
            name, new = "modules_to_save", _new_modules(model, new_weights)
        given = getattr(self.settings, name) or []
        given = [given] if isinstance(given, str) else given
        return replace(self.settings, **{name: [*dict.fromkeys([*given, *new])]})


def find_method(config: FinetuneConfig, task: Task) -> Method:
    """Return the method of a run.

    Raises:
        UserError: A setting of it is unknown or out of range, or a package is missing.
    """
    if config.method == "full":
        return Full(config, task)
    return Adapted(config, task)


def _find(name: str) -> Adapter:
    try:
        if name == "lora":
            return cast(Adapter, import_with_hint("adarankgrad.finetune.plain_lora"))
        return find_adapter(name)
    except ImportError as error:
        raise UserError(f"--method {name}: {error}") from error


def _sara() -> Any:
    return find_adapter("sara")


def _new_modules(model: nn.Module, new_weights: list[str]) -> list[str]:
    """Return the topmost modules of which every weight is new, by their full names.

    No adapter of peft goes into modules that are saved whole.
    """
    everything = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    old = everything.difference(new_weights)
    return sorted({_topmost_without(old, name) for name in new_weights})


def _topmost_without(old: set[str], weight: str) -> str:
    """Return the topmost module with a weight but none of the old ones, else the weight's own."""
    parts = weight.split(".")[:-1]
    modules = [".".join(parts[: depth + 1]) for depth in range(len(parts))]
    without = (each for each in modules if not any(name.startswith(f"{each}.") for name in old))
    return next(without, modules[-1])


def _own(named: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Return which weights are the adapter's own: A, B, gates, SaRA's values; not a head."""
    return [(name, weight) for name, weight in named if any(part in name for part in _OWN_PARTS)]


def _divide(groups: list[Group], model: nn.Module) -> list[Group]:
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
