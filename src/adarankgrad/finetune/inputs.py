"""What a run starts from, model and data: found before anything heavy is imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from adarankgrad.fetch.advice import advice_for_missing
from adarankgrad.finetune.table import check_data
from adarankgrad.train.errors import UserError
from adarankgrad.train.hub import ask_for_model, is_hub_name

if TYPE_CHECKING:
    from adarankgrad.finetune.config import FinetuneConfig

_ADAPTER_FILES = ("adapter_config.json", "sara_config.json")


def check_inputs(config: FinetuneConfig, *, resume: bool) -> None:
    """See that the model is there, and the data, unless they are saved with the run.

    Raises:
        UserError: One is neither here nor on the hub.
    """
    check_model(config.model)
    if not resume:
        check_data(config.data)
        if config.validation is not None:
            check_data(config.validation, "--validation")


def check_model(name: str) -> None:
    """See that a name is the folder of a model, or that of one on the hub.

    Raises:
        UserError: It is not; an adapter is told by its base model.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        _check_folder(folder, name)
    elif folder.exists() or "/" not in name or not is_hub_name(name):
        advice = advice_for_missing(name) or (
            ": name the folder of a model, or one on the hub (owner/name)."
        )
        raise UserError(f"model {name!r} is no folder{advice}")
    else:
        ask_for_model(name)


def _check_folder(folder: Path, name: str) -> None:
    for file in _ADAPTER_FILES:
        path = folder / file
        if path.is_file() and not (folder / "model.safetensors").is_file():
            base = _base_model(path)
            of_base = f" of {base}" if base else ""
            raise UserError(
                f"{name} is an adapter{of_base}, not a model: name the base model, or merge the "
                "adapter into it first (merge_and_unload of peft) and name that folder."
            )
    if not (folder / "config.json").is_file():
        raise UserError(f"the model folder {name} has no config.json.")


def _base_model(path: Path) -> str | None:
    """Return what an adapter's settings name as its base, or None where they cannot be read."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
