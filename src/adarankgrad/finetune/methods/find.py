"""From a method's name to the method."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adarankgrad.finetune.methods.adapted import AdaptedByPeft
from adarankgrad.finetune.methods.full import Full
from adarankgrad.finetune.methods.interface import Method
from adarankgrad.finetune.methods.sara import SaRA
from adarankgrad.finetune.methods.sora import SoRA

if TYPE_CHECKING:
    from adarankgrad.finetune.config import FinetuneConfig
    from adarankgrad.finetune.tasks.interface import Task

_METHODS: dict[str, type[Method]] = {
    "full": Full,
    "lora": AdaptedByPeft,
    "prilora": AdaptedByPeft,
    "sora": SoRA,
    "sara": SaRA,
}


def find_method(config: FinetuneConfig, task: Task) -> Method:
    """Return the method of a run, one of `finetune.config.METHODS`.

    Raises:
        UserError: A setting of it is unknown or out of range, or a package is missing.
    """
    return _METHODS[config.method](config, task)
