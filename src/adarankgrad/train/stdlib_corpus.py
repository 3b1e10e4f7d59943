"""Text that every machine with Python has: the source code of its standard library.

The choice of files depends on their names only, so that two machines with the same Python train
on the same text.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from adarankgrad.train.errors import UserError
from adarankgrad.train.files import write_atomic

MAX_TRAIN_BYTES = 4 << 20
MIN_TRAIN_BYTES = 200_000
VALIDATION_BYTES = 120_000
MAX_VALIDATION_FILE_BYTES = 30_000
"""Several small files make a steadier validation loss than one large one."""

# Tests, other people's packages, and tables rather than code.
_LEFT_OUT = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}


@dataclass(frozen=True)
class StdlibCorpus:
    """The text, by file; whole files are held out for validation.

    Attributes:
        train: Path inside the library and text of each file.
        validation: The same, of other files.
    """

    train: list[tuple[str, str]]
    validation: list[tuple[str, str]]

    @property
    def num_files(self) -> int:
        """Files in both parts."""
        return len(self.train) + len(self.validation)

    @property
    def num_bytes(self) -> int:
        """Bytes of text in both parts."""
        return _num_bytes(self.train) + _num_bytes(self.validation)

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write ``train.jsonl`` and ``validation.jsonl`` with rows ``{"path", "text"}``.

        Returns:
            The two files.
        """
        folder.mkdir(parents=True, exist_ok=True)
        paths = (folder / "train.jsonl", folder / "validation.jsonl")
        for path, rows in zip(paths, (self.train, self.validation), strict=True):
            lines = (json.dumps({"path": name, "text": text}) + "\n" for name, text in rows)
            write_atomic(path, "".join(lines))
        return paths


def read_stdlib(root: Path | None = None) -> StdlibCorpus:
    """Read the library's source, at most `MAX_TRAIN_BYTES` of it to train on.

    Args:
        root: The library's folder; by default that of the running Python.

    Raises:
        UserError: The library's source is not on this machine.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    corpus = _choose(_source_files(root), root)
    if _num_bytes(corpus.train) < MIN_TRAIN_BYTES or not corpus.validation:
        raise UserError(
            f"the source of Python's standard library is not in {root} (some systems ship it as a "
            "separate package or as compiled files only): install it, or train on your own text "
            "with `adarankgrad train --data`."
        )
    return corpus


def _source_files(root: Path) -> list[Path]:
    """List the source files, in an order that is fixed but unrelated to the alphabet.

    A cap on the size then takes a sample of the library instead of its first letters.
    """
    found = [
        path
        for path in root.rglob("*.py")
        if not _LEFT_OUT.intersection(path.relative_to(root).parts) and path.is_file()
    ]
    return sorted(found, key=lambda path: hashlib.sha256(_name(path, root).encode()).digest())


def _choose(paths: Iterable[Path], root: Path) -> StdlibCorpus:
    train: list[tuple[str, str]] = []
    validation: list[tuple[str, str]] = []
    train_bytes = validation_bytes = 0
    for path in paths:
        text = _read(path)
        size = len(text.encode())
        if not text.strip():
            continue
        if validation_bytes < VALIDATION_BYTES and size <= MAX_VALIDATION_FILE_BYTES:
            validation.append((_name(path, root), text))
            validation_bytes += size
        elif train_bytes + size <= MAX_TRAIN_BYTES:
            train.append((_name(path, root), text))
            train_bytes += size
    return StdlibCorpus(sorted(train), sorted(validation))


def _read(path: Path) -> str:
    """Return a file's text, or nothing where it is not readable UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _num_bytes(rows: list[tuple[str, str]]) -> int:
    return sum(len(text.encode()) for _, text in rows)
