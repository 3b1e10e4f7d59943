"""Flags made from the fields of a `RunConfig`, so that they cannot differ from the TOML keys."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import Field
from pathlib import Path
from typing import Annotated, Any

import typer

from adarankgrad.train.errors import UserError
from adarankgrad.train.run_config import RunConfig, flag_of
from adarankgrad.train.values import parse_arguments, parse_rank

_METAVARS = {
    "str": "TEXT",
    "int": "INT",
    "float": "NUMBER",
    "rank": "INT|SHARE",
    "dict": "NAME=VALUE,...",
}


def option_for(
    spec: Field[Any],
    short_flag: str | None = None,
    panel: str | None = None,
    help_text: str | None = None,
    default: str | None = None,
) -> inspect.Parameter:
    """Make the flag of one setting.

    Args:
        spec: The setting.
        short_flag: Another spelling of the flag.
        panel: Heading of the part of the help it stands in.
        help_text: In place of the setting's own.
        default: What is shown as that, in place of the setting's own.
    """
    kind = spec.metadata["kind"]
    if kind == "bool":
        return _switch_for(spec, panel)
    if default is None and spec.default != "" and isinstance(spec.default, str | int | float):
        default = str(spec.default)
    declaration = typer.Option(
        *([short_flag] if short_flag else []),
        flag_of(spec.name),
        help=with_default(help_text or spec.metadata["help"], default),
        show_default=False,
        metavar=_METAVARS[kind],
        rich_help_panel=panel,
    )
    return option(spec.name, Annotated[str | None, declaration])


def with_default(help_text: str, default: str | None) -> str:
    """Return a help text with a default, which typer would put in parentheses."""
    return help_text if default is None else f"{help_text}  [default: {default}]"


def _switch_for(spec: Field[Any], panel: str | None) -> inspect.Parameter:
    """Make the pair of switches of a setting that is true or false."""
    word = spec.name.replace("_", "-")
    declaration = typer.Option(
        f"--{word}/--no-{word}",
        help=spec.metadata["help"],
        show_default=False,
        rich_help_panel=panel,
    )
    return option(spec.name, Annotated[bool | None, declaration])


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


def parse_flags(flags: dict[str, Any], config_class: type[RunConfig]) -> dict[str, Any]:
    """Turn the flags' text into values; typer's own errors would not name the text."""
    settings: dict[str, Any] = {}
    specs = config_class.settings()
    for name, text in flags.items():
        metadata = specs[name].metadata
        if metadata["kind"] == "dict":
            settings[name] = parse_arguments(text, flag_of(name), metadata["example"])
            continue
        parser, wanted = _PARSERS[metadata["kind"]]
        try:
            settings[name] = parser(text)
        except ValueError as error:
            raise UserError(f"{flag_of(name)} {text!r} is not {wanted}.") from error
    return settings


_PARSERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "str": (str, "a text"),
    "int": (int, "a whole number"),
    "float": (float, "a number"),
    "rank": (parse_rank, "a number of columns such as 64, or a share such as 0.25"),
    "bool": (bool, "a switch"),
}
