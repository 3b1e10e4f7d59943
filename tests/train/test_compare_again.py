"""Comparisons that are stopped, grown, continued with fewer words, or started twice."""

import contextlib
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from adarankgrad.compare.cells import CellRunner, describe_cell, outcome_of
from adarankgrad.compare.grow import plan_to_resume
from adarankgrad.compare.plan import load_plan, make_plan
from adarankgrad.compare.run import compare
from adarankgrad.compare.tune import settings_to_resume, tune
from adarankgrad.train import Interrupted, UserError
from adarankgrad.train.lock import locked


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


def resumed(output, **given):
    return plan_to_resume(output, given)


def cells_of(plan):
    return {
        (m.label, rate, seed) for m in plan.methods for rate, _ in m.rates for seed in plan.seeds
    }


def save(plan):
    plan.output.mkdir()
    plan.save()
    return cells_of(plan)


def test_a_resumed_comparison_grows_by_what_is_named_and_loses_nothing(shared, tmp_path):
    saved = plan_of(shared, tmp_path / "cmp", optimizers=["adamw", "galore"], lrs=[2e-3, 1e-3])
    before = save(saved)
    more = resumed(saved.output, seeds=[2, 1])
    assert more.seeds == (0, 2, 1)  # rates stay chosen on the first
    assert cells_of(more) > before
    more = resumed(saved.output, optimizers=["orthogonalized-sgd"])
    assert [method.label for method in more.methods] == ["AdamW", "GaLore", "Orthogonalized SGD"]
    assert more.methods[2].lrs == saved.lrs  # a new method tries what the others tried
    more = resumed(saved.output, lrs=[4e-3])
    assert [method.lrs for method in more.methods] == [(1e-3, 2e-3, 4e-3)] * 2
    more = resumed(saved.output, optimizers=["adamw"], lrs=[4e-3])
    assert [method.lrs for method in more.methods] == [(1e-3, 2e-3, 4e-3), (2e-3, 1e-3)]
    assert resumed(saved.output) == saved
    assert resumed(saved.output, steps=12, optimizers=["AdamW"]) == saved


def test_methods_with_rates_of_their_own_keep_them_when_seeds_are_added(shared, tmp_path):
    table = {"optimizer": "torch.optim.Adagrad", "lrs": [1e-2], "optimizer_args": {"eps": 1e-8}}
    saved = make_plan(tmp_path / "cmp", {**shared, "methods": {"A": table}, "lrs": [1e-3]})
    save(saved)
    for names in ([], ["A"]):
        more = resumed(saved.output, optimizers=names, seeds=[0, 1])
        assert more == replace(saved, seeds=(0, 1))
    assert resumed(saved.output, optimizers=["adamw"]).methods[1].lrs == (1e-3,)


def test_settings_that_are_given_again_by_value_or_by_default_are_no_change(
    shared, tmp_path, monkeypatch
):
    saved = plan_of(shared, tmp_path / "cmp")
    save(saved)
    monkeypatch.chdir(Path(shared["data"]).parent)
    again = {
        "data": "text.txt",
        "model": "tiny/config.json",
        "weight_decay": 0.0,
        "precision": None,
    }
    assert resumed(saved.output, **again) == saved
    with pytest.raises(UserError, match=r"with weight_decay = 0.0 instead of 0.1: name another"):
        resumed(saved.output, weight_decay=0.1)
    with pytest.raises(UserError, match="runs of GaLore at its default rate, to which lrs cannot"):
        default = plan_of(shared, tmp_path / "other", optimizers=["galore"], lrs=[])
        save(default)
        resumed(default.output, lrs=[1e-3])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"methods": 3}, "methods must be tables"),
        ({"optimizers": "adamw"}, "optimizers = 'adamw' must be a list"),
        ({"lrs": 1e-3}, "lrs = 0.001 must be a list"),
        ({"seeds": [-1]}, "seed = -1 must not be negative"),
        ({"stepz": 3}, "unknown setting 'stepz'"),
    ],
)
def test_additions_that_make_no_sense_are_refused(given, message, shared, tmp_path):
    saved = plan_of(shared, tmp_path / "cmp")
    save(saved)
    with pytest.raises(UserError, match=message):
        resumed(saved.output, **given)


def test_a_smaller_plan_that_resumes_a_larger_one_discards_nothing(shared, children, tmp_path):
    plan = plan_of(shared, tmp_path / "cmp", seeds=[0, 1], steps=3)
    compare(plan)
    smaller = plan_of(shared, plan.output, optimizers=["orthogonalized-sgd"], steps=3)
    children.exit_codes = {"orthogonalized-sgd": (1, "broken")}
    results = compare(smaller, resume=True)
    assert [method["label"] for method in results["methods"]] == ["AdamW", "Orthogonalized SGD"]
    assert set(results["methods"][0]["val_loss"]["by_seed"]) == {"0", "1"}
    assert load_plan(plan.output).seeds == (0, 1)


def search_of(shared, output, **changes):
    lists = {"lrs": [1e-3], "plain_lrs": [2e-3], "seeds": [0]}
    return make_plan(
        output, {**shared, **lists, "methods": {"AdamW": {"optimizer": "adamw"}}} | changes
    )


@pytest.mark.parametrize("start", [compare, tune])
@pytest.mark.parametrize("resume", [False, True])
def test_a_comparison_or_search_in_use_is_refused_and_stays_as_it_is(
    start, resume, shared, tmp_path
):
    plan = search_of(shared, tmp_path / "cmp")
    with locked(plan.output), pytest.raises(UserError, match="is in use by another process"):
        start(plan, resume=resume)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lrs": [2e-3]}, "another search, with --lr 0.001 instead of 0.002"),
        ({"plain_lrs": [1e-3]}, "another search, with --plain-lr 0.002 instead of 0.001"),
        ({"seeds": [1]}, "another search, with --seed 0 instead of 1"),
        ({"methods": {"Fira": {"optimizer": "fira"}}}, "with --optimizer AdamW instead of Fira"),
        ({"steps": 3}, "another comparison, with steps = 12 instead of 3"),
    ],
)
def test_a_search_is_continued_with_what_it_was_started_with(changes, message, shared, tmp_path):
    plan = search_of(shared, tmp_path / "search")
    save(plan)
    settings = settings_to_resume(plan.output)
    assert (settings["lr"], settings["plain_lr"], settings["seed"]) == (1e-3, 2e-3, 0)
    with pytest.raises(UserError, match=message):
        tune(search_of(shared, plan.output, **changes), resume=True)


def test_a_comparison_is_not_continued_as_a_search(shared, tmp_path):
    plan = plan_of(shared, tmp_path / "cmp", seeds=[0, 1])
    save(plan)
    with pytest.raises(UserError, match="holds a comparison: resume it with adarankgrad compare"):
        settings_to_resume(plan.output)
