"""``adarankgrad tune``: a learning rate for one optimizer, from at most eight short runs."""

from __future__ import annotations

import inspect
import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from adarankgrad.cli.options import config_option, flag, option, option_for, parse_flags
from adarankgrad.train.config import FIELDS, TrainConfig
from adarankgrad.train.errors import UserError
from adarankgrad.train.run_config import read_toml

_DEFAULT_STEPS = 200
_DEFAULTS = {"steps": str(_DEFAULT_STEPS), "eval_every": "the steps"}
"""What is another default than that of training."""

_PARAMETERS = [
    *(option_for(spec, default=_DEFAULTS.get(name)) for name, spec in FIELDS.items()),
    config_option(),
    option("runs", Annotated[int, typer.Option(help="Most runs.", min=1, max=8)], 8),
    option("workers", Annotated[int, typer.Option(help="Runs at a time.", min=1)], 1),
    flag("resume", "Continue the search in --output; finished runs are reused."),
    flag("json", "Print the result as one JSON object, the last line of standard output."),
]


def tune(**options: Any) -> None:
    """Search a learning rate with short runs: --lr and its double and half, then on from the best.

    --steps is the length of each run (default 200), --lr the first rate (default: the
    optimizer's), --plain-lr stays as it is. Example: adarankgrad tune --data corpus/ --optimizer
    galore --output tuning/galore
    """
    from rich.console import Console

    from adarankgrad.compare.plan import make_plan
    from adarankgrad.compare.tune import settings_to_resume
    from adarankgrad.compare.tune import tune as search
    from adarankgrad.train.optimizers import find_optimizer
    from adarankgrad.train.record import method_name

    config, runs, workers = (options.pop(name) for name in ("config", "runs", "workers"))
    resume, wants_json = (options.pop(f"wants_{name}") for name in ("resume", "json"))
    settings = read_toml(config, TrainConfig) if config is not None else {}
    given = {name: value for name, value in options.items() if value is not None}
    settings |= parse_flags(given, TrainConfig)
    if settings.get("output") is None:
        raise UserError("--output is missing: name the folder of the search.")
    output = Path(settings.pop("output")).expanduser()
    if resume:
        settings = settings_to_resume(output) | settings
    name = settings.pop("optimizer", FIELDS["optimizer"].default)
    spec = find_optimizer(name)
    start = settings.pop("lr", spec.default_lr)
    if start is None:
        raise UserError(f"{name} has no default learning rate: give --lr to start from.")
    table = {"optimizer": name, "optimizer_args": settings.pop("optimizer_args", {})}
    lists = {
        "lrs": [start],
        "plain_lrs": [settings.pop("plain_lr", spec.default_plain_lr)],
        "seeds": [settings.pop("seed", 0)],
    }
    steps = settings.get("steps", _DEFAULT_STEPS)
    settings = {"steps": steps, "eval_every": steps} | settings
    plan = make_plan(output, {**settings, **lists, "methods": {method_name(name): table}})

    console = Console(stderr=True)

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    result = search(plan, num_runs=runs, resume=resume, workers=workers, say=say)
    edge = ", the last rate tried at its end: a better one may lie beyond" * result["is_at_edge"]
    say(f"Lowest validation loss {result['val_loss']:.4f} at --lr {result['lr']:g}{edge}.")
    say(f"Train with --output and --steps of your own: {shlex.join(result['command'])}")
    if wants_json:
        print(json.dumps(result))


tune.__signature__ = inspect.Signature(_PARAMETERS)  # type: ignore[attr-defined]
tune.__annotations__ = {parameter.name: parameter.annotation for parameter in _PARAMETERS}
