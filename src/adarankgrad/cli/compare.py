"""``adarankgrad compare``: several optimizers on the same model and data, and what each gives."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from adarankgrad.cli.options import (
    config_option,
    flag,
    option,
    option_for,
    parse_flags,
    with_default,
)
from adarankgrad.compare.kinds import FineTuning
from adarankgrad.finetune.config import FinetuneConfig
from adarankgrad.train.config import TrainConfig
from adarankgrad.train.errors import UserError
from adarankgrad.train.run_config import flag_of
from adarankgrad.train.values import read_toml_table

_NOT_SHARED = {*FineTuning.decided, "optimizer_args"}
_LISTS = {
    "optimizers": (
        str,
        "Names, dotted paths such as torch.optim.Muon, or tables of --config; with --task also "
        "adapters: lora, prilora, sora, sara.",
    ),
    "lrs": (float, "Learning rates to try for each method. Default: the one of training."),
    "plain_lrs": (float, "The same for embeddings, head and norms; every pair is tried."),
    "seeds": (int, "Rates are chosen on the first, and used on all."),
}


def _setting_options() -> Iterator[inspect.Parameter]:
    """Make a flag of each setting that runs may share; those of one kind of runs stand apart."""
    training, tuning = TrainConfig.settings(), FinetuneConfig.settings()
    for name, spec in {**tuning, **training}.items():
        if name in _NOT_SHARED:
            continue
        panel = None
        if name not in training:
            panel = "With --task only"
        elif name not in tuning:
            panel = "Without --task only"
        yield option_for(spec, panel=panel)


def _list_option(name: str) -> inspect.Parameter:
    declaration = typer.Option(
        flag_of(name),
        help=with_default(_LISTS[name][1], "0" if name == "seeds" else None),
        show_default=False,
        metavar="A,B,...",
    )
    return option(name, Annotated[str | None, declaration])


_PARAMETERS = [
    option(
        "output",
        Annotated[Path | None, typer.Option(help="Folder of the comparison.", show_default=False)],
    ),
    *(_list_option(name) for name in _LISTS),
    *_setting_options(),
    config_option("TOML file of settings, and a table [methods.NAME] each."),
    option("workers", Annotated[int, typer.Option(help="Runs at a time.", min=1)], 1),
    flag("resume", "Continue the comparison in --output; finished runs are reused."),
    flag("json", "Print the results as one JSON object, the last line of standard output."),
]


def compare(**options: Any) -> None:
    """Train the same model with several optimizers and compare loss, memory and speed.

    With --task, fine-tune a pretrained model with several optimizers and adapters and compare them
    by the task's metric.

    Example: adarankgrad compare --data corpus/ --optimizers adamw,galore,fira,adarankgrad
    --lrs 1e-3,2e-3,4e-3 --seeds 0,1,2 --output comparisons/first
    """
    from rich.console import Console

    from adarankgrad.compare.grow import plan_to_resume
    from adarankgrad.compare.plan import make_plan
    from adarankgrad.compare.report import results_table
    from adarankgrad.compare.run import compare as run_comparison

    output, config, workers = (options.pop(name) for name in ("output", "config", "workers"))
    resume, wants_json = (options.pop(f"wants_{name}") for name in ("resume", "json"))
    if output is None:
        raise UserError("--output is missing: name the folder of the comparison.")
    output = output.expanduser()
    settings = read_toml_table(config) if config is not None else {}
    given = {name: value for name, value in options.items() if value is not None}
    lists = {name: _parse_list(name, given.pop(name)) for name in _LISTS if name in given}
    settings |= lists | _parse_settings(given)
    plan = plan_to_resume(output, settings) if resume else make_plan(output, settings)

    console = Console(stderr=True)

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    results = run_comparison(plan, resume=resume, workers=workers, say=say)
    Console(stderr=wants_json).print(results_table(plan))
    say(f"Report: {results['report']}")
    if wants_json:
        print(json.dumps(results))


compare.__signature__ = inspect.Signature(_PARAMETERS)  # type: ignore[attr-defined]
compare.__annotations__ = {parameter.name: parameter.annotation for parameter in _PARAMETERS}


def _parse_settings(given: dict[str, str]) -> dict[str, Any]:
    """Read flags of either kind of runs; the plan refuses those of the other."""
    of_training = {name: text for name, text in given.items() if name in TrainConfig.settings()}
    others = {name: text for name, text in given.items() if name not in of_training}
    return parse_flags(of_training, TrainConfig) | parse_flags(others, FinetuneConfig)


def _parse_list(name: str, text: str) -> list[Any]:
    kind = _LISTS[name][0]
    parts = [part.strip() for part in text.split(",")]
    try:
        if "" in parts:
            raise ValueError
        return [kind(part) for part in parts]
    except ValueError as error:
        raise UserError(f"{flag_of(name)} {text!r} is not a list of {_WANTED[kind]}.") from error


_WANTED = {
    str: "names such as adamw,galore",
    int: "whole numbers such as 0,1,2",
    float: "numbers such as 1e-3,2e-3",
}
