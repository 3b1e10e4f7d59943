"""What repeats a comparison or a run of it, from any directory and into a fresh folder."""

from __future__ import annotations

import glob
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from adarankgrad.compare.cells import flags_of
from adarankgrad.compare.plan import Cell, Plan
from adarankgrad.train.config import TABLES
from adarankgrad.train.settings import PATH_SETTINGS
from adarankgrad.train.values import format_arguments, toml_value

FRESH_FOLDER = "again"


def comparison_toml(plan: Plan) -> str:
    """Return a plan as the TOML file that ``adarankgrad compare --config`` reads."""
    shared = dict(plan.shared)
    # Arguments may be text in the table of a method, but not at the top of the file.
    arguments = {name: shared.pop(name) for name in TABLES if name in shared}
    blocks = [_lines({**shared, "seeds": plan.seeds})]
    for method in plan.methods:
        rates = {"lrs": method.lrs, "plain_lrs": method.plain_lrs}
        given = {name: values for name, values in rates.items() if values}
        heading = f"[methods.{toml_value(method.label)}]\n"
        blocks.append(heading + _lines({**arguments, **method.settings, **given}))
    return "\n".join(blocks)


def train_command(plan: Plan, cell: Cell) -> list[str]:
    """Return the command that repeats a cell's run, with the tokenizer of the comparison."""
    config = plan.config(cell)
    paths = {name: _from_anywhere(name, getattr(config, name)) for name in PATH_SETTINGS}
    output = f"{FRESH_FOLDER}/{cell.name}"
    return ["adarankgrad", "train", *flags_of(replace(config, **paths, output=output))]


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
    """Return a setting with its path made absolute, if it is one and something is there."""
    if name not in PATH_SETTINGS or value is None:
        return value
    path = str(Path(value).expanduser())
    return os.path.abspath(path) if os.path.exists(path) or glob.glob(path) else value
