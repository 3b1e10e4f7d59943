"""Text in, pieces of documents out: files of several kinds, or a dataset from the hub.

A source can be read several times (to measure it, to train a tokenizer, to encode it) and never
holds more than a piece of a file in memory.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from adarankgrad.train.errors import UserError

HELD_BACK_SHARE = 0.05
MAX_HELD_BACK_CHARACTERS = 4_000_000
"""About a million tokens: enough for a steady validation loss, few enough to evaluate often."""

PIECE_CHARACTERS = 1 << 18
_JSON_SUFFIXES = {".jsonl", ".json", ".ndjson"}
_KNOWN_SUFFIXES = _JSON_SUFFIXES | {".parquet", ".txt", ".md", ".py", ".csv", ".gz", ".zip"}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class Piece(NamedTuple):
    """A part of a document; long documents come in several pieces."""

    text: str
    ends_document: bool


class Source(Protocol):
    """Text that can be read again and again, always in the same order."""

    def pieces(self) -> Iterator[Piece]:
        """Read all documents."""
        ...


@dataclass(frozen=True)
class Files:
    """Documents in files: a text file is one, a row of .jsonl, .json or .parquet is one.

    Attributes:
        name: What the user called it, for messages.
        paths: The files, in reading order.
        text_column: Column of the text in files with rows.
        skips_binary: Leave out files that are no text, instead of raising.
    """

    name: str
    paths: tuple[Path, ...]
    text_column: str
    skips_binary: bool

    def pieces(self) -> Iterator[Piece]:
        """Read all documents, file by file."""
        for path in self.paths:
            reader = _reader(path)
            try:
                yield from reader(path, self.text_column)
            except UnicodeDecodeError as error:
                if not self.skips_binary:
                    raise UserError(f"{path} is not UTF-8 text ({error.reason}).") from error
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror or error}.") from error

    def num_bytes(self) -> int | None:
        """Return the size of the files, or None where it says little about the text."""
        if any(path.suffix == ".parquet" for path in self.paths):
            return None
        return sum(path.stat().st_size for path in self.paths)


@dataclass
class HubDataset:
    """The ``train`` split of a dataset on the hub, streamed; as much as the run can use.

    Attributes:
        name: ``owner/name`` or ``name``.
        text_column: Column of the text.
        max_characters: Stop reading after so much text.
        setting: What names it, for messages.
    """

    name: str
    text_column: str
    max_characters: int
    setting: str = "data"
    _documents: list[str] = field(default_factory=list)

    def pieces(self) -> Iterator[Piece]:
        """Read the documents; the first pass downloads them, later ones come from memory."""
        if not self._documents:
            self._documents = list(self._download())
        for document in self._documents:
            yield from split_document(document)

    def _download(self) -> Iterator[str]:
        from datasets import load_dataset

        num_characters = 0
        try:
            for row in load_dataset(self.name, split="train", streaming=True):
                text = _text_of(row, self.text_column, self.name)
                num_characters += len(text)
                yield text
                if num_characters >= self.max_characters:
                    return
        except UserError:
            raise
        except Exception as error:  # datasets and its transports raise many kinds
            raise UserError(
                f"{self.setting} {self.name!r} is neither a file, folder or glob here, nor a "
                f"dataset that the hub would give ({type(error).__name__}): check the path or the "
                "name."
            ) from error


@dataclass(frozen=True)
class Slice:
    """The characters [start, stop) of a source, for holding back a contiguous part."""

    source: Source
    start: int
    stop: int

    def pieces(self) -> Iterator[Piece]:
        """Read the documents inside; the ones at the borders are cut."""
        position = 0
        for piece in self.source.pieces():
            low, high = max(self.start - position, 0), self.stop - position
            if high <= 0:
                return
            position += len(piece.text)
            text = piece.text[low:high]
            if text:
                yield Piece(text, piece.ends_document or position >= self.stop)


def find_source(
    name: str, text_column: str, max_characters: int, *, setting: str = "data"
) -> Files | HubDataset:
    """Find what a user means by ``data``: files if there are any, else a name on the hub.

    Args:
        name: A file, folder, glob, or hub name.
        text_column: Column of the text in files with rows.
        max_characters: The most text to fetch from the hub.
        setting: What names it, for messages.

    Raises:
        UserError: Nothing is there, or it is empty.
    """
    path = Path(name).expanduser()
    if path.is_file():
        found, skips_binary = [path], False
    elif path.is_dir():
        found, skips_binary = [p for p in path.rglob("*") if _is_visible(p, path)], True
    else:
        matches = glob.iglob(str(path), recursive=True)
        found, skips_binary = [Path(match) for match in matches], True
        if not found and _could_be_hub_name(name):
            return HubDataset(name, text_column, max_characters, setting)
    files = tuple(sorted(p for p in found if p.is_file() and not (skips_binary and _is_binary(p))))
    if not files:
        reason = "holds no text files" if found else "does not exist"
        raise UserError(f"{setting} {name!r} {reason}: give a file, folder, glob or hub name.")
    if sum(p.stat().st_size for p in files) == 0:
        raise UserError(f"{setting} {name!r} is empty.")
    return Files(name, files, text_column, skips_binary)


def count_characters(source: Source) -> int:
    """Return the number of characters of a source, reading it once."""
    return sum(len(piece.text) for piece in source.pieces())


def hold_back(source: Source, num_characters: int) -> tuple[Slice, Slice]:
    """Divide a source into training text and, from its end, validation text.

    Contiguous and always the same, so that runs with other seeds or optimizers compare.
    """
    held_back = min(int(num_characters * HELD_BACK_SHARE), MAX_HELD_BACK_CHARACTERS)
    cut = num_characters - held_back
    return Slice(source, 0, cut), Slice(source, cut, num_characters)


def split_document(text: str) -> Iterator[Piece]:
    """Cut a long document into pieces, at line ends where there are any."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        newline = text.rfind("\n", start, start + PIECE_CHARACTERS)
        stop = newline + 1 if newline >= start else start + PIECE_CHARACTERS
        yield Piece(text[start:stop], False)
        start = stop
    if text:
        yield Piece(text[start:], True)


def _reader(path: Path) -> Callable[[Path, str], Iterator[Piece]]:
    if path.suffix in _JSON_SUFFIXES:
        return _read_json
    return _read_parquet if path.suffix == ".parquet" else _read_text


def _read_text(path: Path, text_column: str) -> Iterator[Piece]:
    # newline="" keeps line ends as they are; the last, shorter read is known one read later.
    with path.open(encoding="utf-8", newline="") as file:
        text = file.read(PIECE_CHARACTERS)
        while more := file.read(PIECE_CHARACTERS):
            cut = text.rfind("\n") + 1 or len(text)
            yield Piece(text[:cut], False)
            text = text[cut:] + more
        yield from split_document(text)


def _read_json(path: Path, text_column: str) -> Iterator[Piece]:
    with path.open(encoding="utf-8") as file:
        if file.read(1) == "[":
            file.seek(0)
            rows: Any = enumerate(_parse_json(file.read(), path, 1), start=1)
        else:
            file.seek(0)
            rows = (
                (number, _parse_json(line, path, number))
                for number, line in enumerate(file, start=1)
                if line.strip()
            )
        for number, row in rows:
            yield from split_document(_text_of(row, text_column, f"{path}, row {number}"))


def _parse_json(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}, line {line} is not valid JSON: {error}.") from error


def _read_parquet(path: Path, text_column: str) -> Iterator[Piece]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        _require_column(text_column, file.schema_arrow.names, str(path))
        for batch in file.iter_batches(batch_size=256, columns=[text_column]):
            for row in batch.to_pylist():
                yield from split_document(_text_of(row, text_column, str(path)))
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is not a valid parquet file: {error}.") from error


def _text_of(row: Any, text_column: str, where: str) -> str:
    if not isinstance(row, dict):
        raise UserError(f"{where} is not an object with a {text_column!r} column.")
    _require_column(text_column, list(row), where)
    text = row[text_column]
    if not isinstance(text, str):
        raise UserError(f"{where}: column {text_column!r} holds {type(text).__name__}, not text.")
    return text


def _require_column(text_column: str, columns: list[str], where: str) -> None:
    if text_column not in columns:
        raise UserError(
            f"{where} has no column {text_column!r}: name one of {', '.join(columns)} "
            "with --text-column."
        )


def _is_visible(path: Path, root: Path) -> bool:
    parts = path.relative_to(root).parts
    return not any(part.startswith(".") or part == "__pycache__" for part in parts)


def _is_binary(path: Path) -> bool:
    """Tell whether a file is no text, by reading all of it as UTF-8; parquet is welcome."""
    if path.suffix == ".parquet":
        return False
    try:
        with path.open(encoding="utf-8") as file:
            while block := file.read(1 << 20):
                if "\0" in block:
                    return True
    except (UnicodeDecodeError, OSError):
        return True
    return False


def _could_be_hub_name(name: str) -> bool:
    return bool(_HUB_NAME.fullmatch(name)) and Path(name).suffix.lower() not in _KNOWN_SUFFIXES
