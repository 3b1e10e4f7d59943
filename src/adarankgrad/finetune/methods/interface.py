"""The shape of a method: how a model is given what is trained, and how that comes out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from adarankgrad.adapters.interface import StepHook
from adarankgrad.optim.groups import Group

if TYPE_CHECKING:
    from adarankgrad.finetune.config import FinetuneConfig
    from adarankgrad.finetune.tasks.interface import Task


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
