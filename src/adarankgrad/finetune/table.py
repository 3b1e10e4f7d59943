"""Rows of examples in, whatever they come in: csv, tsv, json, jsonl, parquet, text, or the hub.

Values stay as they are written: of csv and tsv they are text, never guessed numbers or missing
values, so that a sentence "null" stays one. A .tsv has no quoting: a quote in it is a quote.
"""

from __future__ import annotations

import csv
import glob
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adarankgrad.train.errors import UserError
from adarankgrad.train.hub import ask_for_dataset, is_hub_name

_MAX_FIELD = 1 << 24

Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows with the same columns.

    Attributes:
        name: What the user called the data, for messages.
        columns: Their names.
        rows: The values.
    """

    name: str
    columns: tuple[str, ...]
    rows: list[Row]


def data_files(name: str, setting: str = "data") -> list[Path]:
    """Return the files that a setting such as data names; none for a name on the hub.

    Raises:
        UserError: A part of it names nothing.
    """
    whole = _files_of(name, setting)
    if whole:
        return whole
    files: list[Path] = []
    for part in name.split(","):
        found = _files_of(part.strip(), setting)
        if not found:
            if part == name and _is_hub_name(name):
                return []
            raise UserError(
                f"{setting} {part.strip()!r} does not exist: give files, globs, or a dataset's "
                "name on the hub."
            )
        files += found
    return files


def check_data(name: str, setting: str = "data") -> None:
    """See that data are here or on the hub, without reading them.

    Raises:
        UserError: They are neither.
    """
    if not data_files(name, setting):
        ask_for_dataset(_hub_parts(name)[0])


def read_table(name: str, *, split: str = "train", setting: str = "data") -> Table:
    """Read examples.

    Args:
        name: Files, globs, or ``owner/name[:config][@split]`` on the hub.
        split: Of a dataset on the hub, unless its name says another.
        setting: What names them, for messages.

    Raises:
        UserError: There are none, a file cannot be read, or files have other columns.
    """
    files = data_files(name, setting)
    if not files:
        return _from_hub(name, split, setting)
    columns: tuple[str, ...] | None = None
    rows: list[Row] = []
    for path in files:
        found = _read_file(path)
        if not found:
            continue
        own = tuple(found[0])
        if columns is not None and set(own) != set(columns):
            raise UserError(
                f"{path} has the columns {', '.join(own)}, and other files of {name!r} have "
                f"{', '.join(columns)}: give files with the same columns."
            )
        columns = own
        rows += found
    if columns is None:
        raise UserError(f"{setting} {name!r} has no rows.")
    return Table(name, columns, rows)


def _is_hub_name(name: str) -> bool:
    dataset, *rest = _hub_parts(name)
    return is_hub_name(dataset) and Path(dataset).suffix not in READERS and "" not in rest


def _hub_parts(name: str) -> tuple[str, str | None, str | None]:
    """Divide ``owner/name[:config][@split]``."""
    whole, at, split = name.partition("@")
    dataset, colon, config = whole.partition(":")
    return dataset, config if colon else None, split if at else None


def _files_of(name: str, setting: str) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [child for child in path.iterdir() if child.suffix.lower() in READERS]
        if not found:
            raise UserError(f"{setting} {name!r} is a folder without {', '.join(READERS)} files.")
        return sorted(found)
    matches = glob.glob(str(path), recursive=True) if name else []
    return sorted(Path(match) for match in matches if Path(match).is_file())


def _read_file(path: Path) -> list[Row]:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path} is none of {', '.join(READERS)}: convert or rename it.")
    try:
        return list(reader(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}).") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}.") from error


def _read_csv(path: Path) -> Iterator[Row]:
    return _read_delimited(path, delimiter=",", quoting=csv.QUOTE_MINIMAL, strict=True)


def _read_tsv(path: Path) -> Iterator[Row]:
    return _read_delimited(path, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_delimited(path: Path, **dialect: Any) -> Iterator[Row]:
    """Read a header and rows; every row must have as many fields as the header."""
    csv.field_size_limit(_MAX_FIELD)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, **dialect)
        try:
            header = _column_names(next(reader, []), path)
            for fields in reader:
                if not fields:
                    continue
                if len(fields) != len(header):
                    raise UserError(
                        f"{path}, line {reader.line_num} has {len(fields)} fields, and the header "
                        f"has {len(header)}: repair it, or check the file's separator and quotes."
                    )
                yield dict(zip(header, fields, strict=True))
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num} cannot be read: {error}.") from error


def _column_names(header: list[str], path: Path) -> list[str]:
    names = [name.strip() or f"column {number}" for number, name in enumerate(header, start=1)]
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise UserError(f"{path} has two columns named {doubles[0]!r}: rename one.")
    return names


def _read_json(path: Path) -> Iterator[Row]:
    """Read one object a line, or one list of objects."""
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        found = _parse(text, f"{path}")
        numbered = [(f"{path}, row {number}", row) for number, row in enumerate(found, start=1)]
    else:
        # Only newlines end a line: JSON may hold other separators of Unicode unescaped.
        lines = enumerate(text.split("\n"), start=1)
        places = ((f"{path}, line {number}", line) for number, line in lines if line.strip())
        numbered = [(where, _parse(line, where)) for where, line in places]
    columns: dict[str, None] = {}
    for where, row in numbered:
        if not isinstance(row, dict):
            raise UserError(f"{where} is not an object with columns.")
        columns |= dict.fromkeys(row)
    for _, row in numbered:
        yield {name: row.get(name) for name in columns}


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON: {error}.") from error


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        # The file itself: a dataset would take a folder named label=1 for a column.
        yield from pyarrow.parquet.ParquetFile(path).read().to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is not a valid parquet file: {error}.") from error


def _read_text(path: Path) -> Iterator[Row]:
    yield {"text": path.read_text(encoding="utf-8-sig")}


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".json": _read_json,
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
"""Readers by suffix; a text file is one example."""


def _from_hub(name: str, split: str, setting: str) -> Table:
    from datasets import ClassLabel, load_dataset

    owner_name, config, own_split = _hub_parts(name)
    split = own_split or split
    ask_for_dataset(owner_name)
    try:
        dataset = load_dataset(owner_name, config, split=split)
    except Exception as error:  # datasets and its transports raise many kinds
        raise UserError(
            f"{setting} {name!r} is neither a file here, nor a dataset that the hub would give "
            f"({type(error).__name__}): check the path, the name, or its split {split!r}."
        ) from error
    rows = dataset.to_list()
    for column, feature in dataset.features.items():
        if isinstance(feature, ClassLabel):
            for row in rows:
                # Parts without labels have -1.
                is_known = row[column] is not None and row[column] >= 0
                row[column] = feature.int2str(row[column]) if is_known else None
    return Table(name, tuple(dataset.column_names), rows)
