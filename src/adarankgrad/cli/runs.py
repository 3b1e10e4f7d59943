"""What the commands that make one run share: their switches, and settings from flags and TOML."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from adarankgrad.cli.options import config_option, flag, parse_flags
from adarankgrad.train.errors import UserError
from adarankgrad.train.run_config import RunConfig, read_toml

RUN_PARAMETERS = [
    config_option(),
    flag("resume", "Continue the run in --output from its newest intact checkpoint."),
    flag("overwrite", "Replace the run in --output."),
    flag("json", "Print the summary as one JSON object, the last line of standard output."),
]

_Config = TypeVar("_Config", bound=RunConfig)


@dataclass(frozen=True)
class RunRequest(Generic[_Config]):
    """A run as it was asked for.

    Attributes:
        config: The settings.
        resume: Continue it.
        overwrite: Replace what is there.
        wants_json: Print the summary as JSON.
    """

    config: _Config
    resume: bool
    overwrite: bool
    wants_json: bool

    def run(self, function: Callable[..., dict[str, Any]]) -> None:
        """Call the function that makes such runs, and print what was asked for."""
        from rich.console import Console

        from adarankgrad.train.display import Display

        summary = function(
            self.config,
            resume=self.resume,
            overwrite=self.overwrite,
            command=["adarankgrad", *sys.argv[1:]],
            display=Display(Console(stderr=True)),
        )
        if self.wants_json:
            sys.stdout.write(json.dumps(summary) + "\n")
            sys.stdout.flush()


def read_request(options: dict[str, Any], config_class: type[_Config]) -> RunRequest[_Config]:
    """Turn a command's options into a request.

    Raises:
        UserError: A setting is unknown, missing or out of range.
    """
    config_path = options.pop("config")
    resume, overwrite, wants_json = (
        options.pop(f"wants_{name}") for name in ("resume", "overwrite", "json")
    )
    settings = read_toml(config_path, config_class) if config_path is not None else {}
    given = {name: value for name, value in options.items() if value is not None}
    settings |= parse_flags(given, config_class)
    if resume:
        settings = _with_saved(settings, config_class, overwrite=overwrite)
    return RunRequest(config_class.from_settings(settings), resume, overwrite, wants_json)


def _with_saved(
    settings: dict[str, Any], config_class: type[RunConfig], *, overwrite: bool
) -> dict[str, Any]:
    """Complete the settings of a resume by those saved with the run, so that few are needed."""
    from adarankgrad.train.folder import check_output
    from adarankgrad.train.settings import settings_to_resume

    if settings.get("output") is None:
        raise UserError("--resume needs the run folder: name it with --output.")
    run_dir = Path(settings["output"]).expanduser()
    check_output(run_dir, resume=True, overwrite=overwrite)
    saved = settings_to_resume(run_dir, settings, config_class)
    return saved | {"output": settings["output"]}
