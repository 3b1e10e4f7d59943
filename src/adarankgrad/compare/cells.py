"""Runs the cells of a comparison, each a training process; what is finished is not run again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adarankgrad.compare.metric import metrics_of
from adarankgrad.compare.plan import Cell, Plan, rate_text
from adarankgrad.train.checkpoints import list_checkpoints
from adarankgrad.train.child import STOP_SIGNALS, ChildPool, Job
from adarankgrad.train.files import find_fault, write_atomic
from adarankgrad.train.folder import SUMMARY_NAME
from adarankgrad.train.run_config import RunConfig, flag_of
from adarankgrad.train.values import format_arguments

_DIVERGED = 3
_PREFIX = "adarankgrad: error: "
_STOPPING = [-number for number in STOP_SIGNALS]
"""Exit codes of runs that such a signal ended before they could save a checkpoint."""


@dataclass(frozen=True)
class Outcome:
    """How a cell ended.

    Attributes:
        status: ``done``, ``diverged``, ``failed``, or ``missing`` where it was never run.
        metrics: Of validation, by name, where it is done; ``loss`` is one of them.
        message: What the run said, where it is not.
    """

    status: str
    metrics: dict[str, float] = field(default_factory=dict)
    message: str = ""


def outcome_of(plan: Plan, cell: Cell) -> Outcome:
    """Read from the comparison's folder how a cell ended."""
    summary = _read(plan.run_dir(cell) / SUMMARY_NAME)
    if summary is not None:
        return Outcome("done", metrics_of(summary))
    failure = _read(_beside(plan, cell, ".failure.json"))
    if failure is None:
        return Outcome("missing")
    return Outcome(failure["status"], message=failure["message"])


class CellRunner:
    """Runs cells and tells how each ended.

    A run that was stopped is continued from its checkpoint. Cells that are done or have diverged
    stay as they are; those that failed otherwise, or cannot be continued, start afresh once.

    Args:
        plan: The comparison.
        workers: How many runs at a time.
        say: Told one line about each cell.
    """

    def __init__(self, plan: Plan, workers: int, say: Callable[[str], None]) -> None:
        self._plan = plan
        self._workers = workers
        self._say = say
        self._tried: set[str] = set()

    def run(self, cells: Sequence[Cell]) -> None:
        """Run those of the cells that have no result yet.

        Raises:
            Interrupted: A signal stopped the runs, after a checkpoint each.
        """
        to_run = [cell for cell in cells if self._needs_run(cell)]
        if len(to_run) < len(cells):
            self._say(f"{len(cells) - len(to_run)} of {len(cells)} runs are there already.")
        while to_run:
            self._run_all(to_run)
            to_run = [cell for cell in to_run if self._needs_run(cell)]

    def _run_all(self, cells: list[Cell]) -> None:
        jobs = [self._job(cell) for cell in cells]
        cell_of = dict(zip(map(id, jobs), cells, strict=True))
        pool = ChildPool(self._workers)
        num_ended = 0

        def note(job: Job, exit_code: int) -> None:
            nonlocal num_ended
            num_ended += 1
            cell = cell_of[id(job)]
            was_stopped = exit_code >= 128 or exit_code in _STOPPING or pool.is_stopping
            self._note_end(cell, exit_code, was_stopped=was_stopped)
            self._say(f"[{num_ended}/{len(cells)}] {describe_cell(cell)}: {self._in_words(cell)}")

        pool.run(jobs, note)

    def _needs_run(self, cell: Cell) -> bool:
        status = outcome_of(self._plan, cell).status
        return status in ("missing", "failed") and cell.name not in self._tried

    def _job(self, cell: Cell) -> Job:
        command = self._command(cell)
        _beside(self._plan, cell, ".failure.json").unlink(missing_ok=True)
        log = self._log(cell)
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {}
        if self._workers > 1:
            threads = max(1, (os.cpu_count() or 1) // self._workers)
            environment = {"OMP_NUM_THREADS": str(threads)}
        return Job(command, sys.stderr, log, environment)

    def _command(self, cell: Cell) -> list[str]:
        run_dir = self._plan.run_dir(cell)
        program = [sys.executable, "-m", "adarankgrad", self._plan.kind.config_class.command]
        was_stopped = outcome_of(self._plan, cell).status == "missing"
        if was_stopped and any(find_fault(c.path) is None for c in list_checkpoints(run_dir)):
            return [*program, "--resume", "--output", str(run_dir)]
        self._tried.add(cell.name)
        overwrite = ["--overwrite"] if run_dir.exists() else []
        return [*program, *flags_of(self._plan.config(cell)), *overwrite]

    def _note_end(self, cell: Cell, exit_code: int, *, was_stopped: bool) -> None:
        if exit_code == 0:
            # A finished run is not continued; its model and its metrics stay.
            shutil.rmtree(self._plan.run_dir(cell) / "checkpoints", ignore_errors=True)
        elif was_stopped and exit_code != _DIVERGED:
            self._tried.add(cell.name)
        else:
            status = "diverged" if exit_code == _DIVERGED else "failed"
            failure = {"status": status, "message": self._last_words(cell, exit_code)}
            path = _beside(self._plan, cell, ".failure.json")
            write_atomic(path, json.dumps(failure) + "\n")

    def _last_words(self, cell: Cell, exit_code: int) -> str:
        lines = self._log(cell).read_text(encoding="utf-8", errors="replace").splitlines()
        said = [line for line in lines if line.startswith(_PREFIX)] or [
            x for x in lines if x.strip()
        ]
        if exit_code < 0:
            hint = ", which without a person means too little memory"
            return f"killed by signal {-exit_code}" + hint * (-exit_code == signal.SIGKILL)
        return said[-1].removeprefix(_PREFIX) if said else f"exit code {exit_code}"

    def _in_words(self, cell: Cell) -> str:
        outcome = outcome_of(self._plan, cell)
        if outcome.status == "done":
            metric = self._plan.metric
            return f"validation {metric.word} {outcome.metrics[metric.name]:.4f}"
        return f"{outcome.status} ({outcome.message})" if outcome.message else "stopped"

    def _log(self, cell: Cell) -> Path:
        return _beside(self._plan, cell, ".log")


def describe_cell(cell: Cell) -> str:
    """Name a cell in a sentence."""
    given = {"lr": cell.lr, "plain lr": cell.plain_lr}
    rates = [f"{name} {rate_text(rate)}" for name, rate in given.items() if rate is not None]
    return ", ".join([cell.method.label, *rates, f"seed {cell.seed}"])


def flags_of(config: RunConfig, leave_out: Container[str] = ()) -> list[str]:
    """Return the flags of a config's command that make it, but for some settings."""
    flags = []
    tables = config.tables()
    for name, spec in config.settings().items():
        value = getattr(config, name)
        if name in tables:
            value = format_arguments(value) or None
        if value is not None and value != spec.default and name not in leave_out:
            flags.append(flag_of(name))
            if value is not True:  # a switch stands alone
                flags.append(str(value))
    return flags


def _beside(plan: Plan, cell: Cell, suffix: str) -> Path:
    run_dir = plan.run_dir(cell)
    return run_dir.with_name(run_dir.name + suffix)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None
