"""A gradient that is not finite, in a real run: the step is skipped and told, or ends the run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_inputs import call, tiny_flags, write_inputs

from adarankgrad.train.files import read_jsonl
from adarankgrad.train.trainer import RunTrainer

METHOD = {"optimizer": "adarankgrad", "max_rank": 8}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("adarankgrad.train.plots.write_plots", lambda run_dir: [])
    monkeypatch.setattr("adarankgrad.train.report.write_report", lambda run_dir: run_dir)
    return tmp_path


@pytest.fixture
def poison(monkeypatch):
    """Breaks one entry of one gradient at given steps, after the backward pass."""
    original = RunTrainer.training_step

    def arm(*steps, value=math.nan):
        def training_step(self, model, *inputs, **options):
            loss = original(self, model, *inputs, **options)
            if self.state.global_step + 1 in steps:
                name, param = list(model.named_parameters())[3]
                param.grad.view(-1)[5] = value
            return loss

        monkeypatch.setattr(RunTrainer, "training_step", training_step)

    return arm


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_step_is_skipped_counted_and_told(workplace, poison, capsys, value):
    poison(3, 6, value=value)
    assert call("train", *tiny_flags(**METHOD)) == 0
    told = capsys.readouterr().err
    assert told.count("warning: skipped step") == 2
    assert "skipped step 3, whose gradients were not finite (1 skipped so far)" in told
    run = Path("run")
    rows = [row for row in read_jsonl(run / "metrics.jsonl") if "loss" in row]
    assert [row["skipped_steps"] for row in rows] == [0, 1, 2]
    assert rows[-1]["grad_norm"] is None
    assert json.loads((run / "summary.json").read_text())["skipped_steps"] == 2
    weights = load_file(run / "model" / "model.safetensors")
    assert all(bool(torch.isfinite(weight).all()) for weight in weights.values())


def test_a_broken_step_ends_the_run_on_request(workplace, poison, capsys):
    poison(5)
    flags = tiny_flags(**METHOD, **{"optimizer-args": "nonfinite=raise"})
    assert call("train", *flags) == 3
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the norm of the gradients is nan" in last
    assert "at step 5. Lower --lr" in last
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["checkpoint-3"]
    assert call("train", "--resume", "--output", "run") == 3
    poison()
    assert call("train", "--resume", "--output", "run") == 0


def test_an_optimizer_that_cannot_skip_has_no_such_number(workplace):
    assert call("train", *tiny_flags(optimizer="adamw")) == 0
    assert json.loads(Path("run/summary.json").read_text())["skipped_steps"] is None
