"""Fine-tuning killed by SIGKILL, whenever that is, goes on to what a run left alone leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

import killed
from adarankgrad.finetune import FinetuneConfig, finetune
from adarankgrad.train.files import find_fault
from adarankgrad.train.folder import is_run
from run_folders import rows

NUM_KILLS = 2  # of seven steps with the start, and one more by the clock
METHODS = {
    "every weight": {"optimizer": "adarankgrad", "max_rank": 4},
    "an adapter": {"method": "sora", "adapter": {"rank": 4, "shrinkage": 0.05}},
}


def resume(settings, events):
    from adarankgrad.train import plots, report

    plots.write_plots = report.write_report = lambda run_dir: None
    run_dir = Path(settings["output"])
    events.follow_trainer(run_dir)
    finetune(FinetuneConfig.from_settings(settings), resume=is_run(run_dir))


def files_of(run_dir):
    """Every file by its path in the run, but TensorBoard's: a session writes one of its own."""
    paths = {path.relative_to(run_dir): path for path in run_dir.rglob("*") if path.is_file()}
    return {name: path for name, path in paths.items() if name.parts[0] != "tensorboard"}


@pytest.mark.parametrize("name", METHODS)
def test_fine_tuning_killed_again_and_again_ends_like_a_run_left_alone(name, settings):
    changes = METHODS[name] | {"steps": 6, "eval_every": 3, "log_every": 1}
    whole, parts = (settings(output=output, **changes) for output in ("whole", "parts"))
    killed.kill_again_and_again(resume, whole, parts, num_kills=NUM_KILLS, seed=name)
    whole_dir, parts_dir = Path(whole["output"]), Path(parts["output"])
    assert rows(whole_dir) == rows(parts_dir)
    expected, found = files_of(whole_dir), files_of(parts_dir)
    assert expected.keys() == found.keys()
    same = [path for path in expected if path.parts[0] in ("model", "data", "predictions.jsonl")]
    assert {path.suffix for path in same} >= {".safetensors", ".jsonl"}
    for path in same:
        assert expected[path].read_bytes() == found[path].read_bytes(), path
    for manifest in parts_dir.rglob("manifest.json"):
        assert find_fault(manifest.parent) is None, manifest
