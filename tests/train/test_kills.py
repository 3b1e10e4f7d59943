"""Runs killed by SIGKILL, whenever that is, go on to the result of a run that was left alone."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from run_folders import assert_same_run

import killed
from adarankgrad.train import TrainConfig, train
from adarankgrad.train.files import find_fault, restore_replaced, staged_folder
from adarankgrad.train.folder import is_run

NUM_KILLS = 6
LONGEST_S = 2.0

METHODS = {
    "adarankgrad": {"optimizer_args": {"refresh_max_gap": 3}},
    "sketched in eight bits": {
        "optimizer_args": {
            "refresh_max_gap": 3,
            "basis": "sketched",
            "state_dtype": "int8",
            "basis_dtype": "int8",
            "weight_rounding": "stochastic",
        },
        "precision": "bfloat16",
        "gradient_accumulation": 2,
    },
}


@pytest.fixture
def run_settings(settings, request):
    def build(output):
        changes = {"optimizer": "adarankgrad", "max_rank": 8, "steps": 8}
        changes |= {"save_every": 2, "log_every": 1}
        return settings(output, **changes, **METHODS[request.param])

    return build


def resume(settings, counted=".", log=None, last_operation=None):
    """Train to the end, or until just before a file operation below a part of the run folder."""
    from adarankgrad.train import plots, report

    plots.write_plots = report.write_report = lambda run_dir: None
    run_dir, numbers = Path(settings["output"]), [0]

    def note(number):
        numbers.append(number)
        if number == last_operation:
            killed.die()

    killed.file_operations(run_dir / counted, note)
    train(TrainConfig.from_settings(settings), resume=is_run(run_dir))
    if log is not None:
        log.write_text(str(numbers[-1]))


@pytest.mark.parametrize("run_settings", METHODS, indirect=True)
def test_a_run_killed_again_and_again_ends_like_one_left_alone(run_settings, tmp_path):
    whole, parts = run_settings("whole"), run_settings("parts")
    killed.finish(resume, whole, "checkpoints", tmp_path / "log")
    num_operations = int((tmp_path / "log").read_text())
    moments = random.Random(4)

    num_kills = 0
    while num_kills < NUM_KILLS:
        # Every third anywhere, the creation of the run folder included; most inside a checkpoint.
        counted = "." if num_kills % 3 == 0 else "checkpoints"
        process = killed.start(resume, parts, counted, None, moments.randrange(1, num_operations))
        process.join()
        if killed.was_killed(process):
            num_kills += 1
        else:
            assert_same_run(whole["output"], parts["output"])
            shutil.rmtree(parts["output"])
    for _ in range(2):  # in the middle of writes as well; wherever it is, if anywhere
        process = killed.start(resume, parts)
        process.join(moments.uniform(0.0, LONGEST_S))
        process.kill()
        process.join()
        killed.was_killed(process)
    killed.finish(resume, parts)
    assert_same_run(whole["output"], parts["output"])


def replace_folder(target, last_operation):
    killed.file_operations(target.parent, lambda n: n == last_operation and killed.die())
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
