"""``--extrapolation``: gradients of a run taken ahead of its weights, and all else at them."""

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adarankgrad.schedules.extrapolation import Extrapolation
from adarankgrad.train import Interrupted, TrainConfig, train
from adarankgrad.train.flow import Flow
from adarankgrad.train.trainer import RunTrainer
from run_folders import assert_same_run, rows

NOISE = {"source": "noise", "scale": "gradient"}


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    monkeypatch.setattr("adarankgrad.train.plots.write_plots", lambda run_dir: [])
    monkeypatch.setattr("adarankgrad.train.report.write_report", lambda run_dir: run_dir)


def run(settings, **options):
    return train(TrainConfig.from_settings(settings), **options)


def folder_of(summary):
    return Path(summary["paths"]["metrics"]).parent


def losses(summary):
    return [row["loss"] for row in rows(folder_of(summary)) if "loss" in row]


def weights(summary):
    return load_file(f"{summary['paths']['model']}/model.safetensors")


def test_a_step_that_moves_nothing_trains_as_without_it_to_the_bit(settings):
    # The model has dropout, so that a fresh pass which drew random numbers would be seen.
    changes = {"optimizer": "adarankgrad", "gradient_accumulation": 2, "steps": 4}
    plain = run(settings("plain", **changes))
    for name, step in (("none", 0), ("below every rounding", 1e-30)):
        neutral = run(settings(name, **changes, extrapolation={"step": step, "source": "fresh"}))
        assert losses(plain) == losses(neutral)
        before, after = weights(plain), weights(neutral)
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "changes",
    [
        {
            "optimizer": "adamw",
            "extrapolation": {"source": "fresh"},
            "gradient_accumulation": 2,
            "powerprop": {"alpha": 2},
        },
        {"optimizer": "adarankgrad", "accumulate_in_backward": True},
        {
            "optimizer": "adarankgrad-low-memory",
            "precision": "bfloat16",
            "optimizer_args": {"weight_rounding": "corrected"},
            "extrapolation": NOISE,
        },
    ],
    ids=["fresh, powered", "in-backward", "low-memory"],
)
def test_a_stopped_run_continues_to_the_bit(settings, monkeypatch, changes):
    given = {"step": 2.0} | changes.get("extrapolation", {})
    changes = changes | {"extrapolation": given, "steps": 6, "eval_every": 3, "save_every": 6}
    whole = run(settings("whole", **changes))
    parts = settings("parts", **changes)
    original = Flow.on_step_end

    def on_step_end(self, args, state, control, **options):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, args, state, control, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Flow, "on_step_end", on_step_end)
        with pytest.raises(Interrupted):
            run(parts)
    assert_same_run(folder_of(whole), folder_of(run(parts, resume=True)))


def test_evaluation_checkpoints_and_the_saved_model_are_at_the_real_point(settings, monkeypatch):
    real = {}
    end = Extrapolation.end
    begin = Extrapolation.begin
    distances = []

    def watched_begin(self, backward=None):
        before = [param.clone() for param in self.model.parameters()]
        begin(self, backward)
        pairs = zip(before, self.model.parameters(), strict=True)
        distances.append(max((one - other).abs().max().item() for one, other in pairs))

    def watched_end(self):
        end(self)
        assert not self._is_ahead

    def watched_evaluate(self, *inputs, **options):
        real[self.state.global_step] = {
            name: value.clone() for name, value in self.model.state_dict().items()
        }
        return evaluate(self, *inputs, **options)

    evaluate = RunTrainer.evaluate
    monkeypatch.setattr(Extrapolation, "begin", watched_begin)
    monkeypatch.setattr(Extrapolation, "end", watched_end)
    monkeypatch.setattr(RunTrainer, "evaluate", watched_evaluate)
    changes = {"steps": 4, "eval_every": 2, "save_every": 2, "optimizer": "adarankgrad"}
    summary = run(settings(**changes, extrapolation={"step": 5.0}))
    assert distances[0] == 0 and min(distances[1:]) > 0
    for step in (2, 4):
        saved = load_file(
            folder_of(summary) / "checkpoints" / f"checkpoint-{step}" / "model.safetensors"
        )
        assert all(torch.equal(saved[name], real[step][name]) for name in saved)
    last = weights(summary)
    assert all(torch.equal(last[name], real[4][name]) for name in last)


def test_weights_are_back_when_a_step_fails(settings, monkeypatch):
    seen = []
    original = RunTrainer._micro_batch

    def fail(self, model, *inputs):
        if self.state.global_step < 2:
            return original(self, model, *inputs)
        seen.append([param.detach().clone() for param in model.parameters()])
        raise KeyboardInterrupt

    ends = []
    abandon = Extrapolation.abandon

    def watched(self):
        ahead = [param.clone() for param in self.model.parameters()]
        abandon(self)
        pairs = zip(ahead, self.model.parameters(), strict=True)
        ends.append([torch.equal(*pair) for pair in pairs])

    monkeypatch.setattr(RunTrainer, "_micro_batch", fail)
    monkeypatch.setattr(Extrapolation, "abandon", watched)
    with pytest.raises(KeyboardInterrupt):
        run(settings(extrapolation={"step": 5.0}))
    assert len(seen) == 1 and len(ends) == 1 and not any(ends[0])
