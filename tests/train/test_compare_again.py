"""Comparisons that are stopped, grown, continued with fewer words, or started twice."""

import contextlib
import signal
import sys

import pytest

from adarankgrad.compare.cells import CellRunner, describe_cell, outcome_of
from adarankgrad.compare.plan import make_plan
from adarankgrad.train import Interrupted


def plan_of(shared, output, **changes):
    given = {"optimizers": ["adamw"], "lrs": [1e-3], "seeds": [0]}
    return make_plan(output, {**shared, **given, **changes})


def exit_with(exit_code, sent=None):
    """A program that exits (negative: by a signal), after sending its parent a signal."""
    ending = f"os.kill(os.getpid(), {-exit_code})" if exit_code < 0 else f"sys.exit({exit_code})"
    sending = f"os.kill(os.getppid(), {sent}); time.sleep(0.2)" if sent else "pass"
    ignoring = "signal.signal(signal.SIGTERM, signal.SIG_IGN)" if sent else "pass"
    return f"import os, signal, sys, time\n{ignoring}\n{sending}\n{ending}\n"


@pytest.mark.parametrize(
    ("program", "status", "said"),
    [
        (exit_with(-signal.SIGTERM), "missing", ""),  # killed during start-up, by request
        (
            exit_with(-signal.SIGKILL),
            "failed",
            "signal 9, which without a person means too little memory",
        ),
        (exit_with(-signal.SIGABRT), "failed", "killed by signal 6"),
        (exit_with(2), "failed", "exit code 2"),
        (exit_with(2, sent=int(signal.SIGTERM)), "missing", ""),
        (exit_with(-signal.SIGKILL, sent=int(signal.SIGTERM)), "missing", ""),
        (exit_with(3, sent=int(signal.SIGTERM)), "diverged", "exit code 3"),
    ],
)
def test_a_run_that_ends_on_request_is_stopped_and_only_sigkill_hints_at_memory(
    program, status, said, shared, tmp_path, monkeypatch
):
    plan = plan_of(shared, tmp_path / "cmp")
    runner = CellRunner(plan, 1, lambda line: None)
    monkeypatch.setattr(runner, "_command", lambda cell: [sys.executable, "-Sc", program])
    monkeypatch.setattr(runner, "_needs_run", lambda cell: not runner._log(cell).exists())
    with contextlib.suppress(Interrupted):
        runner.run(list(plan.all_possible_cells()))
    outcome = outcome_of(plan, next(plan.all_possible_cells()))
    assert outcome.status == status
    assert said in outcome.message
    assert ("memory" in outcome.message) == ("memory" in said)


@pytest.mark.parametrize("rates", [(0.0012345678, 0.0012345679), (1.0, 1.0 + 2**-52)])
def test_rates_that_differ_have_folders_that_differ(rates, shared, tmp_path):
    plan = plan_of(shared, tmp_path / "cmp", lrs=list(rates))
    names = [cell.name for cell in plan.all_possible_cells()]
    assert len(set(names)) == len(names)
    assert len({describe_cell(cell) for cell in plan.all_possible_cells()}) == len(names)
