"""From a task's name to the task."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adarankgrad.finetune.config import OF_SOME_TASKS, TASKS
from adarankgrad.finetune.tasks.causal_lm import CausalLM
from adarankgrad.finetune.tasks.classification import Classification, PairClassification
from adarankgrad.finetune.tasks.instruction import Instruction
from adarankgrad.finetune.tasks.masked_lm import MaskedLM
from adarankgrad.finetune.tasks.regression import Regression
from adarankgrad.train.errors import UserError
from adarankgrad.train.run_config import flag_of

if TYPE_CHECKING:
    from adarankgrad.finetune.config import FinetuneConfig
    from adarankgrad.finetune.tasks.interface import Task

_TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "pair-classification": PairClassification,
    "regression": Regression,
    "causal-lm": CausalLM,
    "instruction": Instruction,
    "masked-lm": MaskedLM,
}


def task_class(name: str) -> type[Task]:
    """Return the class of a task, given one of `config.TASKS`."""
    return _TASKS[name]


def find_task(config: FinetuneConfig) -> Task:
    """Return the task of a run.

    Raises:
        UserError: The metric is none of the task's, or it does not read a setting that is given.
    """
    task = task_class(config.task)(config)
    specs = config.settings()
    for name in OF_SOME_TASKS:
        if name not in task.reads and getattr(config, name) != specs[name].default:
            readers = " or ".join(other for other in TASKS if name in task_class(other).reads)
            raise UserError(
                f"{flag_of(name)} is for --task {readers}: leave it out of {config.task}."
            )
    return task
