"""Files of a run folder: written whole or not at all, read tolerantly, checked by manifest."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adarankgrad.train.errors import UserError

MANIFEST_NAME = "manifest.json"
PARTIAL_PREFIX = ".partial-"
"""Of what is being written; left behind only by a kill, and never read."""
_REPLACED_PREFIX = f"{PARTIAL_PREFIX}replaced-"


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part.

    Args:
        path: The file; its folder must exist.
        data: The whole content; text is written as UTF-8.
    """
    content = data.encode("utf-8") if isinstance(data, str) else data
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{PARTIAL_PREFIX}{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read one JSON object per line; a last line cut off by a kill is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def keep_steps_up_to(path: Path, step: int) -> None:
    """Drop the lines of a JSONL file that belong to later steps, and a cut-off last line.

    Args:
        path: Rewritten in place (atomically); nothing happens where it does not exist.
        step: The last step to keep.
    """
    if path.is_file():
        kept = [row for row in read_jsonl(path) if row["step"] <= step]
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes `target` only when complete.

    On leaving without an error, a manifest (size and SHA-256 of every file) is added, everything
    is flushed to disk, and the folder is renamed to `target`; a folder already there is replaced.
    On an error the temporary folder is removed and `target` stays as it was. A kill leaves `target`
    old or new, at worst under another name until `restore_replaced`.
    """
    restore_replaced(target.parent)
    staging = target.parent / f"{PARTIAL_PREFIX}{target.name}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        seal_folder(staging)
        _swap_in(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def seal_folder(folder: Path) -> None:
    """Add a manifest (size and SHA-256 of every file) to a finished folder, and flush it to disk.

    `find_fault` reads it.
    """
    files = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": _sha256(path),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST_NAME
    }
    write_atomic(folder / MANIFEST_NAME, json.dumps({"files": files}, indent=1))
    _flush_folder(folder)


def restore_replaced(parent: Path) -> None:
    """Give folders their names back that a kill left nameless, while they were being replaced."""
    for replaced in parent.glob(f"{_REPLACED_PREFIX}*"):
        target = parent / replaced.name.removeprefix(_REPLACED_PREFIX)
        if not target.exists() and find_fault(replaced) is None:
            replaced.rename(target)


def remove_partial(folder: Path) -> None:
    """Delete what a kill left half-written directly in a folder."""
    for path in folder.glob(f"{PARTIAL_PREFIX}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def check_undamaged(folder: Path, what: str) -> None:
    """See that a folder written by `staged_folder` is intact, to go on from it.

    Args:
        folder: The folder.
        what: It holds, in the plural, for the message.

    Raises:
        UserError: Something is missing or damaged.
    """
    fault = find_fault(folder)
    if fault is not None:
        raise UserError(
            f"the {what} in {folder} are damaged ({fault}): restore them, or train again with "
            "--overwrite."
        )


def find_fault(folder: Path) -> str | None:
    """Say what is wrong with a folder written by `staged_folder`, or None when it is intact."""
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        for name, entry in manifest["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
            if _sha256(path) != entry["sha256"]:
                return f"the checksum of {name} does not match"
    except FileNotFoundError:
        return f"{MANIFEST_NAME} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST_NAME} cannot be read"
    return None


def is_writable_target(path: Path) -> bool:
    """Tell whether a folder could be written at `path`, leaving nothing behind."""
    parent = path
    while not parent.exists():
        parent = parent.parent
    try:
        os.rmdir(tempfile.mkdtemp(dir=parent, prefix=".write-check-"))
    except OSError:
        return False
    return True


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush_folder(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _swap_in(staging: Path, target: Path) -> None:
    """Rename `staging` to `target`; a folder cannot be renamed onto a full one.

    Killed between the two renames, `restore_replaced` brings the old folder back.
    """
    replaced = target.parent / f"{_REPLACED_PREFIX}{target.name}"
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        target.rename(replaced)
    staging.rename(target)
    handle = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    shutil.rmtree(replaced, ignore_errors=True)
