"""Which settings a run really uses: dependent defaults, and what a resume may change."""

from __future__ import annotations

import json
from dataclasses import MISSING, Field, asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from adarankgrad.train.errors import UserError
from adarankgrad.train.run_config import RunConfig, read_toml

if TYPE_CHECKING:
    import torch

RUN_NAME = "run.json"
CONFIG_NAME = "config.toml"
_FREE_ON_RESUME = {"output", "device", "save_every", "keep_checkpoints"}
PATH_SETTINGS = {"data", "validation", "model", "tokenizer"}
_Config = TypeVar("_Config", bound=RunConfig)


def resolve(config: _Config) -> _Config:
    """Fill in the settings whose default depends on others, but for the model's vocabulary.

    Raises:
        UserError: The optimizer is unknown, or has no learning rate of its own and got none.
    """
    from adarankgrad.train.optimizers import find_optimizer

    spec = find_optimizer(config.optimizer)
    default_plain_lr = spec.default_plain_lr if config.lr is None else config.lr
    default_warmup = default_warmup_steps(config.steps)
    return replace(
        config,
        lr=default_lr(config.optimizer) if config.lr is None else config.lr,
        plain_lr=default_plain_lr if config.plain_lr is None else config.plain_lr,
        warmup_steps=default_warmup if config.warmup_steps is None else config.warmup_steps,
    )


def default_lr(optimizer: str) -> float:
    """Return the learning rate of an optimizer where nothing is said.

    Raises:
        UserError: The optimizer is unknown, or has none.
    """
    from adarankgrad.train.optimizers import find_optimizer

    found = find_optimizer(optimizer).default_lr
    if found is None:
        raise UserError(f"{optimizer} has no default learning rate: give --lr.")
    return found


def default_warmup_steps(steps: int) -> int:
    """Return how many steps warm up where nothing is said."""
    return min(steps // 10, 1000)


def settings_to_resume(
    run_dir: Path, given: dict[str, Any], config_class: type[RunConfig]
) -> dict[str, Any]:
    """Return the saved settings of a run, with those that a resume may change.

    A run that was killed before its settings were saved has only those of this call.

    Args:
        run_dir: The run folder.
        given: Settings of this call; None means not given.
        config_class: Of the command that resumes.

    Raises:
        UserError: A given setting contradicts the saved one.
    """
    path = run_dir / CONFIG_NAME
    if not path.exists():
        if given.get("data") is None:
            raise UserError(
                f"cannot resume {run_dir}: it was stopped before its settings were saved. Start "
                "again with all of them and --overwrite."
            )
        return given
    _check_command(run_dir, config_class)
    saved = read_toml(path, config_class)
    specs = config_class.settings()
    settings = dict(saved)
    for name, value in given.items():
        if value is None or name not in specs:
            continue
        if name in _FREE_ON_RESUME or (name == "steps" and _may_grow(saved, value)):
            settings[name] = value
        elif not is_same_setting(specs[name], value, saved.get(name)):
            raise UserError(_contradiction(run_dir, name, value, saved))
    return settings


def _check_command(run_dir: Path, config_class: type[RunConfig]) -> None:
    """Refuse to resume what another command began; its settings have other names."""
    info = json.loads((run_dir / RUN_NAME).read_text(encoding="utf-8"))
    command = info.get("subcommand", config_class.command)
    if command != config_class.command:
        raise UserError(
            f"cannot resume {run_dir} with {config_class.command}: continue it with "
            f"adarankgrad {command} --resume."
        )


def check_written_with(folder: Path, config: RunConfig) -> None:
    """See that a checkpoint was written with the settings that the run would go on with.

    Args:
        folder: The checkpoint, with a config.toml of its own.
        config: The settings of the resumed run.

    Raises:
        UserError: It was not: config.toml of the run was edited, or the checkpoint is of another.
    """
    saved = read_toml(folder / CONFIG_NAME, type(config))
    for name, spec in config.settings().items():
        value = getattr(config, name)
        is_free = name in _FREE_ON_RESUME or (name == "steps" and _may_grow(saved, value))
        if not is_free and not is_same_setting(spec, value, saved.get(name)):
            before = f"{name} = {saved[name]!r}" if name in saved else f"no {name}"
            raise UserError(
                f"cannot resume from {folder}: it was written with {before}, and the run's "
                f"{CONFIG_NAME} says {value!r}. Put back whichever was changed, or start again "
                "with --overwrite."
            )


def given_settings(config: RunConfig) -> dict[str, Any]:
    """Return a config as settings, to compare it with a saved one."""
    return asdict(config)


def resolve_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` into a device that is there.

    Raises:
        UserError: The name is unknown or the device absent.
    """
    import torch

    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and num_gpus == 0):
        return torch.device("cpu")
    if name in ("auto", "cuda"):
        name = "cuda:0"
    kind, _, index = name.partition(":")
    if kind != "cuda" or not index.isdecimal():
        raise UserError(f"device {name!r} is unknown: use auto, cpu, cuda or cuda:N.")
    if int(index) >= num_gpus:
        raise UserError(
            f"device {name} is not there: torch {torch.__version__} sees {num_gpus} CUDA devices. "
            "Use --device cpu, or install a CUDA build of torch and a driver."
        )
    return torch.device("cuda", int(index))


def _may_grow(saved: dict[str, Any], steps: Any) -> bool:
    is_more = isinstance(steps, int) and steps > saved.get("steps", steps)
    return is_more and saved.get("lr_schedule") == "constant"


def effective_setting(spec: Field[Any], value: Any) -> Any:
    """Return the value that a setting has where None means that it was not given."""
    return spec.default if value is None and spec.default is not MISSING else value


def is_same_setting(spec: Field[Any], value: Any, saved: Any) -> bool:
    """Tell whether two values of a setting, of which either may not be given, mean the same."""
    value, saved = effective_setting(spec, value), effective_setting(spec, saved)
    if spec.metadata["kind"] == "dict":
        return bool(_as_lists(value or {}) == _as_lists(saved or {}))
    if spec.name in PATH_SETTINGS and value is not None and saved is not None:
        return bool(value == saved) or Path(value).resolve() == Path(saved).resolve()
    return bool(value == saved) and isinstance(value, bool) == isinstance(saved, bool)


def _as_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_lists(item) for key, item in value.items()}
    return [_as_lists(item) for item in value] if isinstance(value, list | tuple) else value


def _contradiction(run_dir: Path, name: str, value: Any, saved: dict[str, Any]) -> str:
    before = repr(saved[name]) if name in saved else "not set"
    message = f"cannot resume {run_dir} with {name} = {value!r}: it was {before}."
    if name == "steps" and isinstance(value, int) and value > saved.get("steps", value):
        return (
            f"{message} A {saved.get('lr_schedule')} schedule depends on the number of steps; only "
            "runs with --lr-schedule constant can be extended."
        )
    return f"{message} Leave it out, or start another run with another --output."
