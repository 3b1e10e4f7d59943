"""Training with gradients that are projected in the backward pass."""

from __future__ import annotations

import pytest

from adarankgrad.cli import main
from adarankgrad.train import TrainConfig, UserError, train
from adarankgrad.train.flow import Flow
from adarankgrad.train.optimizers import projected_parameters
from adarankgrad.train.run_config import read_toml

RANK, OVERSAMPLING, PROBES = 6, 8, 8
OPTIMIZER_ARGS = {"refresh_max_gap": 4, "residual": "none"}


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    monkeypatch.setattr("adarankgrad.train.plots.write_plots", lambda run_dir: [])
    monkeypatch.setattr("adarankgrad.train.report.write_report", lambda run_dir: run_dir)


def run(settings):
    return train(TrainConfig.from_settings(settings))


def test_gradients_take_what_is_measured_of_them_and_not_more(settings, monkeypatch):
    projected = []
    start = Flow.on_step_begin

    def on_step_begin(self, args, state, control, **parts):
        groups = parts["optimizer"].param_groups
        projected[:] = [param.shape for param in projected_parameters(groups)]
        return start(self, args, state, control, **parts)

    monkeypatch.setattr(Flow, "on_step_begin", on_step_begin)
    base = {
        "optimizer": "adarankgrad",
        "max_rank": RANK,
        "energy": 1.0,
        "optimizer_args": OPTIMIZER_ARGS,
        "gradient_accumulation": 2,
    }
    whole = run(settings("whole", **base))
    held = run(settings("held", accumulate_in_backward=True, **base))
    assert whole["gradient_bytes"] == whole["weight_bytes"]
    # Most is held at a step that sketches for the next basis: rows in the basis and outside it, and
    # the sketch, with what they are measured by; the present basis is state.
    # (m, n) with the short side m; a sketch has as many columns as the ceiling plus oversampling.
    width = RANK + OVERSAMPLING
    expected = sum(
        4 * ((RANK + PROBES + width) * n + (width + PROBES) * m)
        for m, n in (sorted(shape) for shape in projected)
    )
    plain = whole["weight_bytes"] - sum(4 * m * n for m, n in projected)
    assert held["gradient_bytes"] == plain + expected
    assert held["mean_rank"] == RANK


def test_it_trains_as_sketched_bases_do_without_it(settings):
    base = {"optimizer": "adarankgrad", "max_grad_norm": 0.0, "gradient_accumulation": 2}
    arguments = {**OPTIMIZER_ARGS, "basis": "sketched"}
    whole = run(settings("whole", **base, optimizer_args=arguments))
    held = run(settings("held", **base, optimizer_args=OPTIMIZER_ARGS, accumulate_in_backward=True))
    # Float32 in another order of summation: Adam's first steps are as large where an entry is
    # nothing but rounding, which moves the loss by about a hundredth of what twelve steps do.
    assert held["val_loss"] == pytest.approx(whole["val_loss"], abs=0.02)
    assert held["mean_rank"] == pytest.approx(whole["mean_rank"], abs=1.0)


def test_a_switch_turns_off_what_a_file_turned_on(settings, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(TrainConfig.from_settings(settings("file")).to_toml())
    path.write_text(path.read_text().replace("backward = false", "backward = true"))
    with pytest.raises(SystemExit) as end:
        main.main(["train", "--config", str(path)])
    assert end.value.code == 2  # adamw
    with pytest.raises(SystemExit) as end:
        main.main(["train", "--config", str(path), "--no-accumulate-in-backward"])
    assert not end.value.code
    settings = read_toml(tmp_path / "file" / "config.toml", TrainConfig)
    assert settings["accumulate_in_backward"] is False


def test_a_run_from_before_there_was_the_setting_resumes(settings, tmp_path):
    run(settings("old"))
    path = tmp_path / "old" / "config.toml"
    path.write_text(path.read_text().replace("accumulate_in_backward = false\n", ""))
    train(TrainConfig.from_settings(settings("old")), resume=True)
    with pytest.raises(UserError, match="accumulate_in_backward = True: it was False"):
        changed = settings("old", accumulate_in_backward=True)
        train(TrainConfig.from_settings(changed), resume=True)
