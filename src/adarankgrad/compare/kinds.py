"""What kind of runs a comparison makes: pretraining on text, or fine-tuning on a task.

The kind follows from the settings: those of fine-tuning name a ``task``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import Field, dataclass
from typing import Any, ClassVar

from adarankgrad.compare.metric import Metric
from adarankgrad.finetune.config import METHODS, TASKS, FinetuneConfig
from adarankgrad.train.config import TrainConfig
from adarankgrad.train.errors import UserError, unknown_name
from adarankgrad.train.run_config import RunConfig
from adarankgrad.train.score import LOSS

ADAPTERS = tuple(name for name in METHODS if name != "full")
_OF_THE_COMPARISON = ("optimizers", "methods", "seeds", "lrs", "plain_lrs")
"""Settings that a comparison has, and no run."""
_DECIDED = {
    "output": "leave it to --output",
    "optimizer": "list --optimizers",
    "lr": "list --lrs",
    "plain_lr": "list --plain-lrs",
    "seed": "list --seeds",
}


class Kind(ABC):
    """One kind of runs; all runs of a comparison are of one.

    Attributes:
        config_class: Of the settings of a run.
        decided: Settings of a run that the comparison decides, and how to say them instead.
        of_a_method: Those of them that the table of a method may hold.
        names_of_a_method: Those of which it must hold one.
        common: Settings that the table of a method may not change.
        foreign: Another kind's config, and what to do about settings that only it has.
        trains_same_weights: Every method trains all weights, so that state compares on those that
            low-rank methods project, as a share of AdamW's; else it compares in all, in bytes.
    """

    config_class: ClassVar[type[RunConfig]]
    decided: ClassVar[dict[str, str]]
    of_a_method: ClassVar[tuple[str, ...]]
    names_of_a_method: ClassVar[tuple[str, ...]]
    common: ClassVar[tuple[str, ...]] = ()
    foreign: ClassVar[tuple[type[RunConfig], str]]
    trains_same_weights: ClassVar[bool]

    @property
    @abstractmethod
    def what(self) -> str:
        """What is compared, in the plural."""

    @property
    @abstractmethod
    def metric(self) -> Metric:
        """What runs are judged by."""

    @property
    @abstractmethod
    def loss(self) -> Metric:
        """The loss, which every run has."""

    @property
    def fields(self) -> dict[str, Field[Any]]:
        """Every setting of a run by name."""
        return self.config_class.settings()

    @abstractmethod
    def table_of(self, name: str) -> dict[str, Any]:
        """Return the settings of a method that is only named.

        Raises:
            UserError: Nothing can be of that name; what a dotted path leads to is not looked at.
        """

    def has_plain_rate(self, table: dict[str, Any]) -> bool:
        """Tell whether a method has a rate of its own for weights that none projects."""
        return True

    @abstractmethod
    def check_request(self, config: Any) -> None:
        """Find out whether a run could be made, writing nothing.

        Raises:
            UserError: It could not.
        """

    def check_shared(self, settings: dict[str, Any]) -> None:
        """See that settings may be shared by all runs.

        Raises:
            UserError: Naming one that may not, or is unknown.
        """
        allowed = {*self.fields} - {*self.decided} | {*_OF_THE_COMPARISON}
        for name in settings:
            if name in self.decided:
                raise UserError(f"{name} is decided by the comparison: {self.decided[name]}.")
            self._check_known(name, "setting", allowed)

    def check_table(self, label: str, table: dict[str, Any]) -> None:
        """See that settings may be those of a method, and name one.

        Raises:
            UserError: Naming one that may not, or is unknown.
        """
        if not any(isinstance(table.get(name), str) for name in self.names_of_a_method):
            names = " or ".join(self.names_of_a_method)
            raise UserError(
                f'methods.{label} names no {names}: add optimizer = "adamw" or another.'
            )
        own = {*self.of_a_method, "lrs", "plain_lrs"}
        allowed = {*self.fields} - {*self.decided} - {*self.common} | own
        for name in table:
            if name in self.decided and name not in self.of_a_method:
                raise UserError(
                    f"{name} of methods.{label} is decided by the comparison: {self.decided[name]}."
                )
            if name in self.common:
                raise UserError(
                    f"{name} of methods.{label} is the same for all methods: set it above them."
                )
            self._check_known(name, f"setting of methods.{label}", allowed)

    def _check_known(self, name: str, what: str, allowed: set[str]) -> None:
        if name in self.fields:
            return
        config_class, advice = self.foreign
        if name in config_class.settings():
            raise UserError(f"{name} is a setting of {config_class.command}: {advice}.")
        raise unknown_name(what, name, sorted(allowed))


@dataclass(frozen=True)
class Pretraining(Kind):
    """Runs of ``adarankgrad train``, which differ in their optimizers."""

    config_class = TrainConfig
    decided = _DECIDED
    of_a_method = names_of_a_method = ("optimizer",)
    foreign = (FinetuneConfig, "name a task too, or leave it out")
    trains_same_weights = True

    @property
    def what(self) -> str:
        """What is compared, in the plural."""
        return "optimizers"

    @property
    def metric(self) -> Metric:
        """The validation loss."""
        return self.loss

    @property
    def loss(self) -> Metric:
        """The loss of a token."""
        return Metric(LOSS, "nats per token")

    def table_of(self, name: str) -> dict[str, Any]:
        """Return the name as that of an optimizer."""
        return {"optimizer": name}

    def check_request(self, config: Any) -> None:
        """Find out whether `train` could make a run."""
        from adarankgrad.train.run import check_request

        check_request(config)


@dataclass(frozen=True)
class FineTuning(Kind):
    """Runs of ``adarankgrad finetune``, which differ in adapters, optimizers, or both.

    Attributes:
        task: What is learnt, one of `TASKS`.
        metric_name: What runs are judged by; None for the task's default.
    """

    config_class = FinetuneConfig
    decided = {**_DECIDED, **dict.fromkeys(("method", "adapter"), "give it to a [methods.NAME]")}
    of_a_method = ("optimizer", "method", "adapter")
    names_of_a_method = ("optimizer", "method")
    common = ("task", "metric")
    foreign = (TrainConfig, "leave it out, for a comparison with a task makes no such runs")
    trains_same_weights = False

    task: str
    metric_name: str | None = None

    @property
    def what(self) -> str:
        """What is compared, in the plural."""
        return f"ways to fine-tune for {self.task}"

    @property
    def metric(self) -> Metric:
        """What the best checkpoint of a run is chosen by."""
        from adarankgrad.finetune.tasks.find import task_class

        name = self.metric_name or task_class(self.task).metrics[0]
        return self.loss if name == LOSS else Metric(name)

    @property
    def loss(self) -> Metric:
        """The loss of the task."""
        from adarankgrad.finetune.tasks.find import task_class

        return Metric(LOSS, task_class(self.task).loss_unit)

    def table_of(self, name: str) -> dict[str, Any]:
        """Return the settings of an adapter with its default optimizer, or of an optimizer."""
        from adarankgrad.train.optimizers import check_optimizer_name

        if name in ADAPTERS:
            return {"method": name}
        check_optimizer_name(name, what="optimizer or adapter", others=ADAPTERS)
        return {"optimizer": name}

    def has_plain_rate(self, table: dict[str, Any]) -> bool:
        """Tell whether all weights are trained; an adapter has one rate."""
        return table.get("method", "full") not in ADAPTERS

    def check_request(self, config: Any) -> None:
        """Find out whether `finetune` could make a run."""
        from adarankgrad.finetune.run import check_request

        check_request(config)


def kind_of(settings: dict[str, Any]) -> Kind:
    """Return the kind of runs that settings are of.

    Raises:
        UserError: They name a task that is unknown.
    """
    task = settings.get("task")
    if task is None:
        return Pretraining()
    if task not in TASKS:
        raise unknown_name("task", str(task), list(TASKS))
    return FineTuning(task, settings.get("metric"))
