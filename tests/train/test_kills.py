"""Runs killed by SIGKILL, whenever that is, go on to the result of a run that was left alone."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

import killed
from adarankgrad.train import TrainConfig, train
from adarankgrad.train.files import find_fault, restore_replaced, staged_folder
from adarankgrad.train.folder import is_run
from run_folders import assert_same_run
from state_forms import STATE_FORMS

NUM_KILLS = 5  # in each form of state, of nine steps with the start


def settings_of(form):
    changes = {
        "optimizer": "adarankgrad",
        "max_rank": 8,
        "steps": 8,
        "save_every": 2,
        "log_every": 1,
        "precision": str(form.dtype).removeprefix("torch."),
        "optimizer_args": {"refresh_max_gap": 3, **form.options},
    }
    if form.accumulates_in_backward:
        changes |= {"accumulate_in_backward": True, "gradient_accumulation": 2}
    return changes


def resume(settings, events):
    from adarankgrad.train import plots, report

    plots.write_plots = report.write_report = lambda run_dir: None
    run_dir = Path(settings["output"])
    events.follow_trainer(run_dir)
    train(TrainConfig.from_settings(settings), resume=is_run(run_dir))


@pytest.mark.parametrize("name", STATE_FORMS)
def test_a_run_killed_again_and_again_ends_like_one_left_alone(name, settings):
    changes = settings_of(STATE_FORMS[name])
    whole, parts = settings("whole", **changes), settings("parts", **changes)
    killed.kill_again_and_again(resume, whole, parts, num_kills=NUM_KILLS, seed=name)
    assert_same_run(whole["output"], parts["output"])


def replace_folder(target, last_operation):
    numbers = itertools.count(1)
    killed.file_operations(target.parent, lambda: next(numbers) == last_operation and killed.die())
    with staged_folder(target) as staging:
        (staging / "content").write_text("new")


def test_a_folder_killed_while_it_is_replaced_is_old_or_new_and_whole(tmp_path):
    target = tmp_path / "folder"
    seen = []
    for operation in range(1, 100):
        with staged_folder(target) as staging:
            (staging / "content").write_text("old")
        process = killed.start(replace_folder, target, operation)
        process.join()
        seen.append("none" if not target.exists() else (target / "content").read_text())
        restore_replaced(tmp_path)
        assert find_fault(target) is None
        if not killed.was_killed(process):
            break
    # Without a name only between the two renames.
    assert seen.count("none") == 1
    assert seen.index("none") == seen.count("old")
    assert seen[-1] == "new"
