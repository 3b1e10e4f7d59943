"""An interrupted run ends like an uninterrupted one, and a damaged checkpoint is never used."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adarankgrad.train import Interrupted, TrainConfig, UserError, train
from adarankgrad.train.display import Display
from adarankgrad.train.flow import Flow
from run_folders import assert_same_run, rows


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    """Leave out plots and report, which take longer than the runs here."""
    monkeypatch.setattr("adarankgrad.train.plots.write_plots", lambda run_dir: [])
    monkeypatch.setattr("adarankgrad.train.report.write_report", lambda run_dir: run_dir)


def run(settings: dict, **options):
    return train(TrainConfig.from_settings(settings), **options)


@pytest.fixture
def stop_after(monkeypatch):
    """Sends a signal to this process while a given step is being finished."""

    def arm(step: int, number: int = signal.SIGTERM):
        if signal.getsignal(number) == signal.SIG_IGN:  # under nohup, or behind an ampersand
            pytest.skip(f"{signal.Signals(number).name} is ignored here")
        original = Flow.on_step_end

        def on_step_end(self, args, state, control, **options):
            if state.global_step == step:
                os.kill(os.getpid(), number)
            return original(self, args, state, control, **options)

        monkeypatch.setattr(Flow, "on_step_end", on_step_end)

    yield arm


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw"},
        {"optimizer": "adarankgrad", "max_rank": 8, "optimizer_args": {"refresh_max_gap": 3}},
        {"optimizer": "adarankgrad", "precision": "bfloat16", "lr_schedule": "linear"},
        {
            "optimizer": "adarankgrad",
            "precision": "bfloat16",
            "optimizer_args": {"weight_rounding": "corrected", "state_dtype": "int8"},
        },
        {"optimizer": "adamw", "gradient_accumulation": 2, "precision": "mixed-bfloat16"},
        {
            "optimizer": "adarankgrad",
            "accumulate_in_backward": True,
            "gradient_accumulation": 2,
            "optimizer_args": {"refresh_max_gap": 3},
        },
    ],
    ids=["adamw", "adarankgrad", "bfloat16", "corrected", "accumulation", "in backward"],
)
def test_a_stopped_run_resumes_to_the_same_losses_and_weights(settings, stop_after, changes):
    run(settings("whole", **changes))
    # Step 5 lies between two log lines, so that an open sum of losses has to be carried over.
    stop_after(5)
    with pytest.raises(Interrupted) as stop:
        run(settings("parts", **changes))
    assert stop.value.exit_code == 128 + signal.SIGTERM
    assert "--resume" in str(stop.value)
    run(settings("parts", **changes), resume=True)
    assert_same_run(settings("whole")["output"], settings("parts")["output"])


def test_a_run_resumes_in_a_later_pass_over_little_data(settings, stop_after, tmp_path, inputs):
    short = tmp_path / "short.txt"
    short.write_text((inputs / "text.txt").read_text()[:400])
    changes = {"data": str(short), "validation": str(inputs / "text.txt")}
    run(settings("whole", **changes))
    stop_after(8, signal.SIGINT)
    with pytest.raises(Interrupted) as stop:
        run(settings("parts", **changes))
    assert stop.value.exit_code == 130
    run(settings("parts", **changes), resume=True)
    assert_same_run(settings("whole")["output"], settings("parts")["output"])


def kill_during(settings, tmp_path, monkeypatch, step):
    """Run until an error after a checkpoint; leaves the folder as a kill would."""
    original = Flow.on_step_begin

    def on_step_begin(self, args, state, control, **options):
        if state.global_step == step:
            raise MemoryError("killed here")
        return original(self, args, state, control, **options)

    monkeypatch.setattr(Flow, "on_step_begin", on_step_begin)
    with pytest.raises(MemoryError):
        run(settings)
    monkeypatch.setattr(Flow, "on_step_begin", original)


def test_lines_after_the_checkpoint_are_dropped_on_resume(settings, tmp_path, monkeypatch):
    run(settings("whole"))
    kill_during(settings("parts"), tmp_path, monkeypatch, 7)
    output = Path(settings("parts")["output"])
    assert rows(output)[-1]["step"] == 6
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "los')
    run(settings("parts"), resume=True)
    assert_same_run(settings("whole")["output"], output)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "no manifest"])
def test_a_damaged_checkpoint_is_skipped_for_an_older_one(settings, monkeypatch, tmp_path, damage):
    run(settings("whole"))
    kill_during(settings("parts"), tmp_path, monkeypatch, 9)
    output = Path(settings("parts")["output"])
    newest = output / "checkpoints" / "checkpoint-8"
    weights = newest / "model.safetensors"
    content = bytearray(weights.read_bytes())
    if damage == "truncated":
        weights.write_bytes(content[:-10])
    elif damage == "flipped":
        content[-1] ^= 1
        weights.write_bytes(content)
    elif damage == "missing":
        (newest / "optimizer.pt").unlink()
    else:
        (newest / "manifest.json").unlink()
    said = []
    monkeypatch.setattr(Display, "say", lambda self, line: said.append(line))
    run(settings("parts", keep_checkpoints=1), resume=True)
    assert any("skipped checkpoint-8" in line for line in said)
    assert any("after step 4" in line for line in said)
    assert_same_run(settings("whole")["output"], output)
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["checkpoint-12"]


def test_a_half_written_checkpoint_is_never_picked_up(settings, monkeypatch, tmp_path):
    kill_during(settings(), tmp_path, monkeypatch, 5)
    folder = Path(settings()["output"]) / "checkpoints"
    shutil.copytree(folder / "checkpoint-4", folder / ".partial-checkpoint-8")
    run(settings(), resume=True)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-12", "checkpoint-8"]


def test_resuming_with_only_corrupt_checkpoints_is_refused(settings, monkeypatch, tmp_path):
    kill_during(settings(), tmp_path, monkeypatch, 5)
    (Path(settings()["output"]) / "checkpoints" / "checkpoint-4" / "scheduler.pt").write_text("?")
    with pytest.raises(UserError, match="every checkpoint is corrupt.*scheduler.pt"):
        run(settings(), resume=True)


def test_a_failed_save_keeps_earlier_checkpoints_and_leaves_nothing_half_written(
    settings, monkeypatch
):
    from adarankgrad.train import TrainingError
    from adarankgrad.train.trainer import RunTrainer

    original = RunTrainer._save_rng_state

    def save_rng_state(self, folder):
        if self.state.global_step == 8:
            raise OSError(28, "No space left on device")
        return original(self, folder)

    monkeypatch.setattr(RunTrainer, "_save_rng_state", save_rng_state)
    with pytest.raises(TrainingError, match="step 8.*No space left"):
        run(settings())
    folder = Path(settings()["output"]) / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["checkpoint-4"]


def test_resuming_a_finished_run_writes_its_results_again(settings):
    first = run(settings())
    output = Path(settings()["output"])
    (output / "summary.json").unlink()
    shutil.rmtree(output / "model")
    second = run(settings(), resume=True)
    for key in ("val_loss", "train_loss", "state_bytes", "projected_state_bytes", "tokens"):
        assert first[key] == second[key]
    assert (output / "model" / "model.safetensors").exists()
    assert json.loads((output / "summary.json").read_text()) == second


def test_a_constant_schedule_may_be_extended_and_others_may_not(settings):
    constant = {"lr_schedule": "constant", "warmup_steps": 2}
    run(settings("short", **constant, steps=8))
    run(settings("short", **constant, steps=12), resume=True)
    run(settings("long", **constant, steps=12))
    weights = [
        load_file(Path(settings(name)["output"]) / "model" / "model.safetensors")
        for name in ("short", "long")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    with pytest.raises(UserError, match="steps = 4"):
        run(settings("short", **constant, steps=4), resume=True)


def test_a_resume_that_contradicts_the_run_names_the_setting(settings, stop_after):
    stop_after(4)
    with pytest.raises(Interrupted):
        run(settings())
    for change, expected in (
        ({"lr": 0.5}, "lr = 0.5: it was 0.001"),
        ({"seq_len": 8}, "seq_len = 8: it was 16"),
        ({"steps": 20}, "steps = 20: it was 12.*constant"),
        ({"max_rank": 4}, "max_rank = 4: it was not set"),
        ({"optimizer": "adarankgrad"}, "optimizer = 'adarankgrad'"),
    ):
        with pytest.raises(UserError, match=expected):
            run(settings(**change), resume=True)


def test_saving_more_often_is_allowed_on_resume(settings, stop_after):
    stop_after(4)
    with pytest.raises(Interrupted):
        run(settings())
    run(settings(save_every=2, keep_checkpoints=9), resume=True)
    names = {path.name for path in (Path(settings()["output"]) / "checkpoints").iterdir()}
    assert names == {f"checkpoint-{step}" for step in (4, 6, 8, 10, 12)}
