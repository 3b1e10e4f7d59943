"""``adarankgrad plan``: what a training run will need, before it is started."""

from __future__ import annotations

import inspect
import json
from typing import Annotated, Any

import typer

from adarankgrad.cli.options import flag, option_for, parse_flags
from adarankgrad.train.config import FIELDS, TrainConfig

_SETTINGS = (
    "model",
    "vocab_size",
    "batch_size",
    "seq_len",
    "gradient_accumulation",
    "precision",
    "optimizer",
    "optimizer_args",
    "max_rank",
    "min_rank",
    "energy",
)
PLANNED = (
    "adarankgrad",
    "adarankgrad-low-memory",
    "adarankgrad-published",
    "galore",
    "fira",
    "orthogonalized-sgd",
    "adamw",
    "adamw-8bit",
    "lora",
)
"""What can be planned for, without importing what knows it."""
_OWN_HELP = {"optimizer": f"Whose switches are compared: {', '.join(PLANNED)}."}
_SHORT_FLAGS = {"batch_size": "--batch", "seq_len": "--seq"}


def _text_option(name: str, help_text: str, default: str | None, metavar: str) -> Any:
    option = typer.Option(f"--{name}", help=help_text, metavar=metavar)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[str | None, option],
    )


_PARAMETERS = [
    *(
        option_for(FIELDS[name], _SHORT_FLAGS.get(name), help_text=_OWN_HELP.get(name))
        for name in _SETTINGS
    ),
    _text_option("device", "Where training will run: cuda or cpu.", "cuda", "TEXT"),
    _text_option("gpu", "Memory to stay within, such as 24GiB.", None, "SIZE"),
    flag("json", "Print the plan as one JSON object, the last line of standard output."),
]


def plan(**options: Any) -> None:
    """Predict weights, gradients, optimizer state, activations, workspace and peak.

    Example: adarankgrad plan --model 7b --batch 1 --seq 2048 --precision bfloat16 --gpu 24GiB
    """
    from rich.console import Console

    from adarankgrad.memory_plan.plan import make_plan
    from adarankgrad.memory_plan.request import PlanRequest
    from adarankgrad.memory_plan.table import advice, table_of

    device, gpu, wants_json = (options.pop(name) for name in ("device", "gpu", "wants_json"))
    given = {name: value for name, value in options.items() if value is not None}
    settings = parse_flags(given, TrainConfig)
    result = make_plan(PlanRequest.from_settings(settings, device=device, gpu=gpu))
    console = Console(stderr=wants_json)
    console.print(table_of(result))
    for line in advice(result):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if wants_json:
        print(json.dumps(result.as_dict()))


plan.__signature__ = inspect.Signature(_PARAMETERS)  # type: ignore[attr-defined]
plan.__annotations__ = {parameter.name: parameter.annotation for parameter in _PARAMETERS}
