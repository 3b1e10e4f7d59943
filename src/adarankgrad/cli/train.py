"""``adarankgrad train``: flags and TOML to a `TrainConfig`, then training.

The flags are made from the fields of `TrainConfig`, so they cannot differ from the TOML keys.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from adarankgrad.train.config import (
    FIELDS,
    TrainConfig,
    parse_optimizer_args,
    parse_rank,
    read_toml,
)
from adarankgrad.train.errors import UserError

_METAVARS = {
    "str": "TEXT",
    "int": "INT",
    "float": "NUMBER",
    "rank": "INT|SHARE",
    "dict": "NAME=VALUE,...",
}


def _option_for(name: str) -> inspect.Parameter:
    """Make the flag of one setting."""
    spec = FIELDS[name]
    kind = spec.metadata["kind"]
    default = (
        ""
        if spec.default is None or not isinstance(spec.default, str | int | float)
        else (f"  [default: {spec.default}]")
    )
    option = typer.Option(
        f"--{name.replace('_', '-')}",
        help=spec.metadata["help"] + default,
        show_default=False,
        metavar=_METAVARS[kind],
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, option]
    )


def _flag(name: str, help_text: str) -> inspect.Parameter:
    annotation = Annotated[bool, typer.Option(f"--{name}", help=help_text, show_default=False)]
    return inspect.Parameter(
        f"wants_{name}", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation
    )


_CONFIG_OPTION = inspect.Parameter(
    "config",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        Path | None, typer.Option("--config", help="TOML file of settings; flags override it.")
    ],
)
_PARAMETERS = [
    *(_option_for(name) for name in FIELDS),
    _CONFIG_OPTION,
    _flag("resume", "Continue the run in --output from its newest intact checkpoint."),
    _flag("overwrite", "Replace the run in --output."),
    _flag("json", "Print the summary as one JSON object, the last line of standard output."),
]


def train(**options: Any) -> None:
    """Train a causal language model and report what its optimizer did.

    Example: adarankgrad train --data corpus/ --output runs/first --steps 500
    """
    config_path = options.pop("config")
    resume, overwrite, wants_json = (
        options.pop(f"wants_{name}") for name in ("resume", "overwrite", "json")
    )
    settings = read_toml(config_path) if config_path is not None else {}
    settings |= _parse({name: value for name, value in options.items() if value is not None})
    if resume:
        settings = _with_saved(settings, overwrite=overwrite)
    config = TrainConfig.from_settings(settings)

    from rich.console import Console

    from adarankgrad.train.display import Display
    from adarankgrad.train.run import train as run_training

    summary = run_training(
        config,
        resume=resume,
        overwrite=overwrite,
        command=["adarankgrad", *sys.argv[1:]],
        display=Display(Console(stderr=True)),
    )
    if wants_json:
        sys.stdout.write(json.dumps(summary) + "\n")
        sys.stdout.flush()


train.__signature__ = inspect.Signature(_PARAMETERS)  # type: ignore[attr-defined]
train.__annotations__ = {parameter.name: parameter.annotation for parameter in _PARAMETERS}


def _parse(flags: dict[str, str]) -> dict[str, Any]:
    """Turn the flags' text into values; typer's own errors would not name the text."""
    settings: dict[str, Any] = {}
    for name, text in flags.items():
        parser, wanted = _PARSERS[FIELDS[name].metadata["kind"]]
        try:
            settings[name] = parser(text)
        except UserError:
            raise
        except ValueError as error:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} {text!r} is not {wanted}.") from error
    return settings


_PARSERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "str": (str, "a text"),
    "int": (int, "a whole number"),
    "float": (float, "a number"),
    "rank": (parse_rank, "a number of columns such as 64, or a share such as 0.25"),
    "dict": (parse_optimizer_args, "name=value,..."),
}


def _with_saved(settings: dict[str, Any], *, overwrite: bool) -> dict[str, Any]:
    """Complete the settings of a resume by those saved with the run, so that few are needed."""
    from adarankgrad.train.folder import check_output
    from adarankgrad.train.settings import settings_to_resume

    if settings.get("output") is None:
        raise UserError("--resume needs the run folder: name it with --output.")
    run_dir = Path(settings["output"]).expanduser()
    check_output(run_dir, resume=True, overwrite=overwrite)
    return settings_to_resume(run_dir, settings) | {"output": settings["output"]}
