"""The run folder: may it be written, and what describes the run in it."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adarankgrad.train.errors import UserError
from adarankgrad.train.files import PARTIAL_PREFIX, is_writable_target, write_atomic
from adarankgrad.train.lock import LOCK_NAME
from adarankgrad.train.settings import CONFIG_NAME, RUN_NAME

if TYPE_CHECKING:
    from adarankgrad.train.run_config import RunConfig

SUMMARY_NAME = "summary.json"
TOKENS_FOLDER = "tokens"
DATA_FOLDER = "data"
ADAPTER_FOLDER = "adapter"
PREDICTIONS_NAME = "predictions.jsonl"
MODEL_FOLDER = "model"
TENSORBOARD_FOLDER = "tensorboard"
SPARSITY_NAME = "sparsity.json"
_KIND = "adarankgrad run"
_OUR_NAMES = {
    RUN_NAME,
    CONFIG_NAME,
    SUMMARY_NAME,
    SPARSITY_NAME,
    TOKENS_FOLDER,
    DATA_FOLDER,
    ADAPTER_FOLDER,
    PREDICTIONS_NAME,
    MODEL_FOLDER,
    TENSORBOARD_FOLDER,
    "checkpoints",
    "metrics.jsonl",
    "ranks.jsonl",
    "plots",
    "report.html",
}
_PACKAGES = (
    "adarankgrad",
    "torch",
    "transformers",
    "accelerate",
    "tokenizers",
    "datasets",
    "peft",
)


def is_run(folder: Path) -> bool:
    """Tell whether a folder was written by a training run of ours."""
    try:
        info = json.loads((folder / RUN_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(info, dict) and info.get("kind") == _KIND


def _is_partial(path: Path) -> bool:
    return path.name.startswith(PARTIAL_PREFIX)


def _is_ours(path: Path) -> bool:
    return path.name in _OUR_NAMES or _is_partial(path)


def _contents(run_dir: Path) -> list[Path]:
    """Return what lies in a folder, but for the lock that its process holds."""
    return [path for path in run_dir.iterdir() if path.name != LOCK_NAME]


def check_output(run_dir: Path, *, resume: bool, overwrite: bool) -> None:
    """See that the run folder may be written or continued, before any work.

    Raises:
        UserError: It holds something already, or is no run of ours.
    """
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other: choose one.")
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"output {run_dir} is a file: name a folder.")
    is_used = run_dir.is_dir() and not all(_is_partial(path) for path in _contents(run_dir))
    if resume and not is_run(run_dir):
        raise UserError(f"cannot resume {run_dir}: there is no run in it.")
    if is_used and overwrite and not is_run(run_dir):
        raise UserError(
            f"output {run_dir} holds files but no training run: --overwrite only replaces runs. "
            "Name another folder."
        )
    foreign = [path.name for path in _contents(run_dir) if not _is_ours(path)] if is_used else []
    if foreign and overwrite:
        raise UserError(
            f"output {run_dir} also holds files that no run wrote ({', '.join(foreign[:3])}): move "
            "them, or name another folder."
        )
    if is_used and not resume and not overwrite:
        raise UserError(
            f"output {run_dir} is not empty: continue that run with --resume, replace it with "
            "--overwrite, or name another folder."
        )


def check_writable(run_dir: Path) -> None:
    """See that the run folder can be created or written to.

    Raises:
        UserError: It cannot.
    """
    if not is_writable_target(run_dir):
        raise UserError(f"output {run_dir} cannot be written: name a folder you may write to.")


def check_inputs_outside(run_dir: Path, inputs: Iterable[Path]) -> None:
    """See that a run does not read what lies in its own folder, where it could be replaced.

    Args:
        run_dir: The run folder.
        inputs: Every file and folder that the run reads.

    Raises:
        UserError: An input lies in the run folder.
    """
    resolved = run_dir.resolve()
    for path in inputs:
        if resolved in (path.resolve(), *path.resolve().parents):
            raise UserError(
                f"{path} would be read, but it lies in the run folder {run_dir}: name another "
                "--output, or move it."
            )


def create_run_folder(run_dir: Path, config: RunConfig, info: dict[str, Any]) -> None:
    """Create the folder, or empty one that holds an older run, and describe the run in it.

    run.json is first, so that a run killed right here can still be told from other folders.
    Settings that are not this run's go before anything else, so that no resume starts with those of
    one run and files of another.
    """
    settings = run_dir / CONFIG_NAME
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if settings.is_file() and settings.read_text(encoding="utf-8") != config.to_toml():
            settings.unlink()
        for path in run_dir.iterdir():
            if path.name not in (RUN_NAME, CONFIG_NAME) and _is_ours(path):
                _remove(path)
        write_atomic(run_dir / RUN_NAME, json.dumps({"kind": _KIND, **info}, indent=1))
        write_atomic(settings, config.to_toml())
    except OSError as error:
        raise UserError(f"output {run_dir} cannot be written: {error.strerror}.") from error


def describe_environment(optimizers: Iterable[str] = ()) -> dict[str, Any]:
    """Return package versions, the commit of a source checkout, and the time.

    Args:
        optimizers: Names or dotted paths; the packages of dotted paths are among the versions.
    """
    versions = {"python": platform.python_version()}
    for package in (*_PACKAGES, *_distributions_of(optimizers)):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"versions": versions, "commit": _commit(), "created": created}


def _distributions_of(optimizers: Iterable[str]) -> list[str]:
    """Return the packages, by the names they are installed under, that dotted paths lead into."""
    modules = {path.partition(".")[0] for path in optimizers if "." in path}
    known = packages_distributions() if modules else {}
    return sorted({name for module in modules for name in known.get(module, [])})


def _commit() -> str | None:
    """Return the commit of the checkout that this package runs from, if it does."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    try:
        result = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
