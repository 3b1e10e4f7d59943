"""What a comparison trains: methods, learning rates, seeds, and the settings they share."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from adarankgrad.compare.kinds import Kind, kind_of
from adarankgrad.compare.metric import Metric
from adarankgrad.train.errors import UserError
from adarankgrad.train.files import write_atomic
from adarankgrad.train.record import method_name
from adarankgrad.train.run_config import RunConfig, with_tables

PLAN_NAME = "comparison.json"
TOKENIZER_FOLDER = "tokenizer"
CELLS_FOLDER = "cells"
RATES = ("lrs", "plain_lrs")
_KIND = "adarankgrad comparison"


@dataclass(frozen=True)
class Method:
    """An optimizer with its arguments, or an adapter with its settings.

    Attributes:
        label: Its name in the results.
        settings: Settings of a run; ``optimizer`` is one of them, or ``method`` of fine-tuning.
        lrs: Learning rates to try; empty for the one that training would take.
        plain_lrs: The same for weights that no method projects.
    """

    label: str
    settings: dict[str, Any]
    lrs: tuple[float, ...] = ()
    plain_lrs: tuple[float, ...] = ()

    @property
    def rates(self) -> list[tuple[float | None, float | None]]:
        """Every pair of learning rates to try."""
        return list(itertools.product(self.lrs or (None,), self.plain_lrs or (None,)))


@dataclass(frozen=True)
class Cell:
    """One run of a comparison."""

    method: Method
    lr: float | None
    plain_lr: float | None
    seed: int

    @property
    def name(self) -> str:
        """What tells it from the others, readable, and usable as a path."""
        slug = re.sub(r"[^a-z0-9.]+", "-", self.method.label.lower()).strip("-") or "method"
        rates = {"lr": self.lr, "plain": self.plain_lr}
        given = [f"{name}-{rate_text(rate)}" for name, rate in rates.items() if rate is not None]
        return "/".join([slug, "_".join([*given, f"seed-{self.seed}"])])


@dataclass(frozen=True)
class Plan:
    """A comparison.

    Attributes:
        output: Its folder.
        shared: Settings that every run shares, of `TrainConfig`, or with a ``task`` of
            `FinetuneConfig`.
        methods: What to compare; the first one is what the others are compared with.
        seeds: Rates are chosen on the first; every seed gives weights and order of data.
        lrs: Learning rates of methods that name none of their own.
        plain_lrs: The same for weights that no method projects.
    """

    output: Path
    shared: dict[str, Any]
    methods: tuple[Method, ...]
    seeds: tuple[int, ...]
    lrs: tuple[float, ...] = ()
    plain_lrs: tuple[float, ...] = ()

    @property
    def kind(self) -> Kind:
        """What kind of runs are compared."""
        return kind_of(self.shared)

    @property
    def metric(self) -> Metric:
        """What runs are judged by."""
        return self.kind.metric

    def check(self) -> None:
        """See that the plan makes sense by itself, before looking at data or folders.

        Raises:
            UserError: Naming what does not.
        """
        if not self.methods:
            raise UserError(
                "--optimizers is missing: name at least one, such as adamw,adarankgrad."
            )
        if not self.seeds:
            raise UserError("--seeds is empty: give at least one, such as 0.")
        _check_distinct("seeds", self.seeds)
        slugs: dict[str, str] = {}
        for method in self.methods:
            slug = Cell(method, None, None, 0).name
            if slug in slugs:
                raise UserError(
                    f"two methods are called {method.label!r}"
                    + (f" and {slugs[slug]!r}" if slugs[slug] != method.label else "")
                    + ": give each a table [methods.NAME] with a name of its own."
                )
            slugs[slug] = method.label
            _check_distinct(f"learning rates of {method.label}", method.lrs)
            _check_distinct(f"plain learning rates of {method.label}", method.plain_lrs)
        for cell in self.all_possible_cells():
            for seed in self.seeds:
                self.config(replace(cell, seed=seed))

    def all_possible_cells(self) -> Iterator[Cell]:
        """Every rate of every method on the first seed."""
        for method in self.methods:
            for lr, plain_lr in method.rates:
                yield Cell(method, lr, plain_lr, self.seeds[0])

    def config(self, cell: Cell) -> RunConfig:
        """Return the settings of one run.

        Raises:
            UserError: They contradict each other or a range.
        """
        settings = {
            **self.shared,
            **cell.method.settings,
            "lr": cell.lr,
            "plain_lr": cell.plain_lr,
            "seed": cell.seed,
            "output": str(self.run_dir(cell)),
        }
        if settings.get("tokenizer") is None and self.tokenizer_dir.is_dir():
            settings["tokenizer"] = str(self.tokenizer_dir)
        try:
            return self.kind.config_class.from_settings(settings)
        except UserError as error:
            raise UserError(f"{cell.method.label}: {error}") from error

    def run_dir(self, cell: Cell) -> Path:
        """Return the folder of one run."""
        return self.output / CELLS_FOLDER / cell.name

    @property
    def tokenizer_dir(self) -> Path:
        """The folder of the tokenizer that the runs share, if the comparison trained one."""
        return self.output / TOKENIZER_FOLDER

    def save(self) -> None:
        """Write the plan into its folder."""
        content = {"kind": _KIND, **asdict(replace(self, output=Path("."))), "output": None}
        write_atomic(self.output / PLAN_NAME, json.dumps(content, indent=1) + "\n")


def rate_text(rate: float) -> str:
    """Write a rate in as few digits as tell it from every other one."""
    short = f"{rate:g}"
    return short if float(short) == rate else repr(rate)


def make_plan(output: Path, settings: dict[str, Any]) -> Plan:
    """Build a checked plan.

    Args:
        output: Folder of the comparison.
        settings: Settings that all runs share, of `TrainConfig` or, with a ``task``, of
            `FinetuneConfig`; ``optimizers`` (names, dotted paths, or labels of ``methods``;
            default: all of ``methods``), ``seeds``, ``lrs``, ``plain_lrs``; and ``methods``: label
            to a table of settings, of which ``optimizer`` names the optimizer (or ``method`` an
            adapter of fine-tuning) and ``lrs`` and ``plain_lrs`` replace those of all.

    Raises:
        UserError: A name is unknown or a value makes no sense.
    """
    settings = dict(settings)
    tables = tables_of(settings.pop("methods", {}))
    names = settings.pop("optimizers", list(tables))
    seeds = settings.pop("seeds", [0])
    grid = {key: tuple(list_of(settings.pop(key, []), float, key)) for key in RATES}
    kind = kind_of(settings)
    kind.check_shared(settings)
    methods = [
        _from_table(kind, name, tables[name], grid)
        if name in tables
        else _from_table(kind, method_name(name), kind.table_of(name), grid)
        for name in list_of(names, str, "optimizers")
    ]
    plan = Plan(output, settings, tuple(methods), tuple(list_of(seeds, int, "seeds")), **grid)
    plan.check()
    return plan


def tables_of(methods: Any) -> dict[str, dict[str, Any]]:
    """Return the tables of methods by label, as they come from TOML.

    Raises:
        UserError: They are something else.
    """
    if not isinstance(methods, dict) or not all(isinstance(t, dict) for t in methods.values()):
        raise UserError("methods must be tables such as [methods.adamw].")
    return methods


def load_plan(output: Path) -> Plan:
    """Read the plan of a comparison.

    Raises:
        UserError: The folder holds none.
    """
    try:
        content = json.loads((output / PLAN_NAME).read_text(encoding="utf-8"))
        if content["kind"] != _KIND:
            raise ValueError
        methods = tuple(
            Method(m["label"], m["settings"], tuple(m["lrs"]), tuple(m["plain_lrs"]))
            for m in content["methods"]
        )
        grid = {key: tuple(content.get(key, ())) for key in RATES}
        return Plan(output, content["shared"], methods, tuple(content["seeds"]), **grid)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{output} holds no comparison to resume: name the folder of one, or start without "
            "--resume."
        ) from error


def _from_table(kind: Kind, label: str, table: dict[str, Any], grid: dict[str, Any]) -> Method:
    table = dict(table)
    default = grid if kind.has_plain_rate(table) else {**grid, "plain_lrs": ()}
    rates = {
        key: tuple(list_of(table.pop(key, default[key]), float, f"{key} of {label}"))
        for key in grid
    }
    kind.check_table(label, table)
    return Method(label, with_tables(table, kind.config_class), **rates)


def list_of(values: Any, kind: type, what: str) -> list[Any]:
    """Return a list whose entries are all of a kind: str, int or float.

    Raises:
        UserError: Naming the entry that is not.
    """
    if not isinstance(values, list | tuple):
        raise UserError(f"{what} = {values!r} must be a list.")
    for value in values:
        is_right = isinstance(value, kind) or (kind is float and isinstance(value, int))
        if not is_right or isinstance(value, bool):
            raise UserError(f"{what}: {value!r} is not {_WANTED[kind]}.")
    return [kind(value) for value in values]


_WANTED = {str: "a name", int: "a whole number", float: "a number"}


def _check_distinct(what: str, values: tuple[Any, ...]) -> None:
    if len(set(values)) < len(values):
        raise UserError(f"{what} {', '.join(map(str, values))}: each may stand there once.")
