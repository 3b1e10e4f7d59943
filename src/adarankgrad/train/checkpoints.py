"""Checkpoints that are complete or invisible: find, check, and tidy up.

A checkpoint is written by `files.staged_folder`: under another name until every byte is on disk,
with a manifest of sizes and checksums. A kill can leave a partial folder, which is never read.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from adarankgrad.train.errors import UserError
from adarankgrad.train.files import (
    PARTIAL_PREFIX,
    find_fault,
    remove_partial,
    restore_replaced,
)

CHECKPOINTS_FOLDER = "checkpoints"
_NAME = re.compile(r"checkpoint-(\d+)")


class Checkpoint(NamedTuple):
    """A checkpoint folder and the step after which it was written."""

    step: int
    path: Path


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies."""
    return run_dir / CHECKPOINTS_FOLDER / f"checkpoint-{step}"


def list_checkpoints(run_dir: Path) -> list[Checkpoint]:
    """List the checkpoints of a run, newest first, intact or not."""
    return checkpoints_in(run_dir / CHECKPOINTS_FOLDER)


def checkpoints_in(folder: Path) -> list[Checkpoint]:
    """List the folders named checkpoint-STEP in a folder, newest first; none if it is missing."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append(Checkpoint(int(match.group(1)), path))
    return sorted(found, reverse=True)


def newest_intact(run_dir: Path) -> tuple[Checkpoint | None, list[str]]:
    """Find the newest checkpoint whose files are all as they were written.

    Returns:
        The checkpoint, None where the run stopped before its first was complete, and one warning
        for each newer one that had to be skipped.

    Raises:
        UserError: There are checkpoints, and none is intact.
    """
    folder = run_dir / CHECKPOINTS_FOLDER
    restore_replaced(folder)
    warnings = [
        f"ignored {path.name}: it was being written when the run was killed"
        for path in sorted(folder.glob(f"{PARTIAL_PREFIX}checkpoint-*"))
    ]
    faults: list[str] = []
    for checkpoint in list_checkpoints(run_dir):
        fault = find_fault(checkpoint.path)
        if fault is None:
            return checkpoint, warnings + faults
        faults.append(f"skipped {checkpoint.path.name}: {fault}")
    if faults:
        raise UserError(
            f"cannot resume {run_dir}: every checkpoint is corrupt ({'; '.join(faults)}). "
            "Start again with --overwrite."
        )
    return None, warnings


def remove_old(run_dir: Path, num_kept: int, steps_kept: Collection[int | None] = ()) -> None:
    """Delete all but the newest checkpoints, and what a kill left half-written.

    Args:
        run_dir: The run folder.
        num_kept: How many of the newest to keep.
        steps_kept: Steps whose checkpoints are kept besides.
    """
    for checkpoint in list_checkpoints(run_dir)[num_kept:]:
        if checkpoint.step not in steps_kept:
            shutil.rmtree(checkpoint.path, ignore_errors=True)
    remove_partial(run_dir / CHECKPOINTS_FOLDER)


def remove_newer(run_dir: Path, step: int) -> None:
    """Delete checkpoints after `step`, which a resume skipped because they are damaged."""
    for checkpoint in list_checkpoints(run_dir):
        if checkpoint.step > step:
            shutil.rmtree(checkpoint.path, ignore_errors=True)
