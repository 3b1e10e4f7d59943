"""The examples that a run learns from and is judged by: read, checked, divided, and kept."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from adarankgrad.finetune.columns import Columns, show
from adarankgrad.finetune.table import Table, data_files, read_table
from adarankgrad.finetune.tasks.interface import Example, Task
from adarankgrad.train.errors import UserError
from adarankgrad.train.files import check_undamaged, read_jsonl, staged_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from adarankgrad.finetune.config import FinetuneConfig

HELD_BACK_SHARE = 0.1
_DRAW_SEED = 0
"""Of what is held back and of subsets: not the run's, so that runs with other seeds compare."""


class Examples(NamedTuple):
    """What to learn from, what to be judged by, and lines that say where they come from."""

    train: list[Example]
    validation: list[Example]
    columns: Columns
    notes: tuple[str, ...] = ()


def input_files(config: FinetuneConfig) -> list[Path]:
    """Return the files that a run reads its examples from."""
    files = data_files(config.data)
    if config.validation is not None:
        files += data_files(config.validation, "--validation")
    return files


def load_examples(config: FinetuneConfig, task: Task) -> Examples:
    """Read and check the examples of a run.

    Raises:
        UserError: They are missing, or do not fit the task or each other.
    """
    table = read_table(config.data)
    columns = task.columns(table)
    train = _examples_of(table, columns, task)
    notes = [show(columns)]
    if config.validation is None:
        train, validation = _hold_back(train, task)
        notes.append(
            f"no --validation: {len(validation):,} of {table.name}'s {len(table.rows):,} examples "
            "are held back for it, the same for every seed"
        )
    else:
        validation = _examples_of(_validation_table(config.validation, columns), columns, task)
    train = _subset(train, config.train_examples)
    validation = _subset(validation, config.eval_examples)
    if not train or not validation:
        part = "validation" if train else "training"
        raise UserError(
            f"{config.data} leaves no {part} examples: give more of them, "
            "or --validation; a .txt file is one example."
        )
    notes += [f"warning: {doubt}" for doubt in task.doubts(train, columns)]
    notes += _shared_examples(train, validation)
    return Examples(train, validation, columns, tuple(notes))


def save_examples(folder: Path, examples: Examples, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write both parts and the tokenizer into a folder that appears only when complete."""
    with staged_folder(folder) as staging:
        for name in ("train", "validation"):
            part: list[Example] = getattr(examples, name)
            lines = "".join(json.dumps(example) + "\n" for example in part)
            (staging / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        (staging / "columns.json").write_text(json.dumps(examples.columns), encoding="utf-8")
        tokenizer.save_pretrained(staging / "tokenizer")


def saved_examples(folder: Path) -> Examples:
    """Read the examples of a run that is resumed.

    Raises:
        UserError: They are missing or damaged.
    """
    check_undamaged(folder, "data")
    train, validation = (read_jsonl(folder / f"{name}.jsonl") for name in ("train", "validation"))
    columns = json.loads((folder / "columns.json").read_text(encoding="utf-8"))
    return Examples(train, validation, columns)


def _validation_table(name: str, columns: Columns) -> Table:
    table = read_table(name, split="validation", setting="--validation")
    for role, column in columns.items():
        if column not in table.columns:
            raise UserError(
                f"{name} has no column {column!r}, which training reads the {role} from: it has "
                f"{', '.join(table.columns)}."
            )
    return table


def _examples_of(table: Table, columns: Columns, task: Task) -> list[Example]:
    return [
        task.example(row, columns, f"{table.name}, row {number}")
        for number, row in enumerate(table.rows, start=1)
    ]


def _hold_back(examples: Sequence[Example], task: Task) -> tuple[list[Example], list[Example]]:
    """Divide examples at random; of every stratum with two or more, both parts get some."""
    strata: dict[Hashable, list[int]] = defaultdict(list)
    generator = torch.Generator().manual_seed(_DRAW_SEED)
    for position in torch.randperm(len(examples), generator=generator).tolist():
        strata[task.stratum(examples[position])].append(position)
    held_back = set()
    for positions in strata.values():
        count = max(round(len(positions) * HELD_BACK_SHARE), min(1, len(positions) - 1))
        held_back |= set(positions[:count])
    parts: tuple[list[Example], list[Example]] = ([], [])
    for position, example in enumerate(examples):
        parts[position in held_back].append(example)
    return parts


def _subset(examples: list[Example], count: int | None) -> list[Example]:
    if count is None or count >= len(examples):
        return examples
    generator = torch.Generator().manual_seed(_DRAW_SEED)
    chosen = torch.randperm(len(examples), generator=generator)[:count]
    return [examples[position] for position in sorted(chosen.tolist())]


def _shared_examples(train: list[Example], validation: list[Example]) -> list[str]:
    """Say how many validation inputs are training inputs too, which makes a score too good."""
    known = {_input_of(example) for example in train}
    count = sum(_input_of(example) in known for example in validation)
    if not count:
        return []
    return [f"warning: {count:,} of {len(validation):,} validation inputs are in training too"]


def _input_of(example: Example) -> str:
    asked = {name: value for name, value in example.items() if name not in _ANSWERS}
    if "messages" in asked:
        asked["messages"] = [part for part in asked["messages"] if part["role"] != "assistant"]
    return json.dumps(asked)


_ANSWERS = ("label", "completion")
