"""``adarankgrad train``: flags and TOML to a `TrainConfig`, then training."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

from adarankgrad.cli.options import config_option, flag, option_for, parse_flags
from adarankgrad.train.config import FIELDS, TrainConfig
from adarankgrad.train.errors import UserError
from adarankgrad.train.run_config import read_toml

_PARAMETERS = [
    *(option_for(spec) for spec in FIELDS.values()),
    config_option(),
    flag("resume", "Continue the run in --output from its newest intact checkpoint."),
    flag("overwrite", "Replace the run in --output."),
    flag("json", "Print the summary as one JSON object, the last line of standard output."),
]


def train(**options: Any) -> None:
    """Train a causal language model and report what its optimizer did.

    Example: adarankgrad train --data corpus/ --output runs/first --steps 500
    """
    config_path = options.pop("config")
    resume, overwrite, wants_json = (
        options.pop(f"wants_{name}") for name in ("resume", "overwrite", "json")
    )
    settings = read_toml(config_path, TrainConfig) if config_path is not None else {}
    given = {name: value for name, value in options.items() if value is not None}
    settings |= parse_flags(given, TrainConfig)
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


def _with_saved(settings: dict[str, Any], *, overwrite: bool) -> dict[str, Any]:
    """Complete the settings of a resume by those saved with the run, so that few are needed."""
    from adarankgrad.train.folder import check_output
    from adarankgrad.train.settings import settings_to_resume

    if settings.get("output") is None:
        raise UserError("--resume needs the run folder: name it with --output.")
    run_dir = Path(settings["output"]).expanduser()
    check_output(run_dir, resume=True, overwrite=overwrite)
    return settings_to_resume(run_dir, settings, TrainConfig) | {"output": settings["output"]}
