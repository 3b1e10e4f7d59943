"""Flags made from the fields of `TrainConfig`, so that they cannot differ from the TOML keys."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from adarankgrad.train.config import FIELDS, TABLES, parse_arguments, parse_rank
from adarankgrad.train.errors import UserError

_METAVARS = {
    "str": "TEXT",
    "int": "INT",
    "float": "NUMBER",
    "rank": "INT|SHARE",
    "dict": "NAME=VALUE,...",
}


def option_for(name: str, short_flag: str | None = None) -> inspect.Parameter:
    """Make the flag of one setting, and another spelling of it if one is given."""
    spec = FIELDS[name]
    kind = spec.metadata["kind"]
    if kind == "bool":
        return _switch_for(name)
    default = (
        ""
        if spec.default is None or not isinstance(spec.default, str | int | float)
        else (f"  [default: {spec.default}]")
    )
    declaration = typer.Option(
        *([short_flag] if short_flag else []),
        f"--{name.replace('_', '-')}",
        help=spec.metadata["help"] + default,
        show_default=False,
        metavar=_METAVARS[kind],
    )
    return option(name, Annotated[str | None, declaration])


def _switch_for(name: str) -> inspect.Parameter:
    """Make the pair of switches of a setting that is true or false."""
    word = name.replace("_", "-")
    declaration = typer.Option(
        f"--{word}/--no-{word}", help=FIELDS[name].metadata["help"], show_default=False
    )
    return option(name, Annotated[bool | None, declaration])


def option(name: str, annotation: Any, default: Any = None) -> inspect.Parameter:
    """Make an option that is no setting of training."""
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def config_option(
    help_text: str = "TOML file of settings; flags override it.",
) -> inspect.Parameter:
    """Make ``--config``."""
    return option("config", Annotated[Path | None, typer.Option("--config", help=help_text)])


def flag(name: str, help_text: str) -> inspect.Parameter:
    """Make a switch; its value arrives as ``wants_NAME``."""
    annotation = Annotated[bool, typer.Option(f"--{name}", help=help_text, show_default=False)]
    return option(f"wants_{name}", annotation, False)


def parse_flags(flags: dict[str, Any]) -> dict[str, Any]:
    """Turn the flags' text into values; typer's own errors would not name the text."""
    settings: dict[str, Any] = {}
    for name, text in flags.items():
        if name in TABLES:
            settings[name] = parse_arguments(text, name)
            continue
        parser, wanted = _PARSERS[FIELDS[name].metadata["kind"]]
        try:
            settings[name] = parser(text)
        except ValueError as error:
            raise UserError(f"--{name.replace('_', '-')} {text!r} is not {wanted}.") from error
    return settings


_PARSERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "str": (str, "a text"),
    "int": (int, "a whole number"),
    "float": (float, "a number"),
    "rank": (parse_rank, "a number of columns such as 64, or a share such as 0.25"),
    "bool": (bool, "a switch"),
}
