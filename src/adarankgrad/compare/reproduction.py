"""What repeats a comparison or a run of it, from any directory and into a fresh folder."""

from __future__ import annotations

import glob
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from adarankgrad.compare.cells import flags_of
from adarankgrad.compare.plan import Cell, Plan
from adarankgrad.train.settings import PATH_SETTINGS
from adarankgrad.train.values import format_arguments, toml_value

FRESH_FOLDER = "again"


def comparison_toml(plan: Plan) -> str:
    """Return a plan as the TOML file that ``adarankgrad compare --config`` reads."""
    shared = dict(plan.shared)
    # Arguments may be text in the table of a method, but not at the top of the file.
    tables = plan.kind.config_class.tables()
    arguments = {name: shared.pop(name) for name in tables if name in shared}
    blocks = [_lines({**shared, "seeds": plan.seeds})]
    for method in plan.methods:
        rates = {"lrs": method.lrs, "plain_lrs": method.plain_lrs}
        given = {name: values for name, values in rates.items() if values}
        heading = f"[methods.{toml_value(method.label)}]\n"
        blocks.append(heading + _lines({**arguments, **method.settings, **given}))
    return "\n".join(blocks)


def run_command(plan: Plan, cell: Cell) -> list[str]:
    """Return the command that repeats a cell's run, with the tokenizer of the comparison."""
    config = plan.config(cell)
    names = PATH_SETTINGS & {*config.settings()}
    paths = {name: _from_anywhere(name, getattr(config, name)) for name in names}
    output = f"{FRESH_FOLDER}/{cell.name}"
    return ["adarankgrad", config.command, *flags_of(replace(config, **paths, output=output))]


def _lines(settings: dict[str, Any]) -> str:
    texts = {
        name: format_arguments(value) if isinstance(value, dict) else value
        for name, value in settings.items()
    }
    return "".join(
        f"{name} = {toml_value(_from_anywhere(name, value))}\n"
        for name, value in texts.items()
        if value is not None and value != ""
    )


def _from_anywhere(name: str, value: Any) -> Any:
    """Return a setting with its paths made absolute, if it names some and something is there."""
    if name not in PATH_SETTINGS or value is None:
        return value
    if (whole := _absolute(value)) is not None:
        return whole
    parts = [part.strip() for part in str(value).split(",")]
    return ",".join(_absolute(part) or part for part in parts)


def _absolute(path: str) -> str | None:
    """Return the absolute path of a file, a folder or a glob; None where nothing is there."""
    path = str(Path(path).expanduser())
    return os.path.abspath(path) if os.path.exists(path) or glob.glob(path) else None
