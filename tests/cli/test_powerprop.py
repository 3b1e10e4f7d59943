"""``adarankgrad train --powerprop``: neutral at alpha 1, resumable, and plain in the end."""

import json
import os
import signal

import pytest
from safetensors.torch import load_file
from train_inputs import call, tiny_flags, write_inputs

from adarankgrad.train.files import read_jsonl
from adarankgrad.train.flow import Flow


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("adarankgrad.train.plots.write_plots", lambda run_dir: [])
    monkeypatch.setattr("adarankgrad.train.report.write_report", lambda run_dir: run_dir)
    return tmp_path


def weights_of(run):
    return load_file(run / "model" / "model.safetensors")


def losses_of(run):
    return [row.get("loss", row.get("val_loss")) for row in read_jsonl(run / "metrics.jsonl")]


def assert_same(first, second):
    assert losses_of(first) == losses_of(second)
    weights, others = weights_of(first), weights_of(second)
    assert weights.keys() == others.keys()
    assert all(bool((weights[name] == others[name]).all()) for name in weights)


@pytest.mark.parametrize("more", ["", ",adam_mode=preconditioned", ",decay_on=weight"])
def test_alpha_1_trains_as_without_it_to_the_bit(more, folder):
    flags = {"optimizer": "adarankgrad", "weight_decay": 0.1}
    assert call("train", *tiny_flags(output="plain", **flags)) == 0
    assert call("train", *tiny_flags(output="neutral", powerprop=f"alpha=1{more}", **flags)) == 0
    assert_same(folder / "plain", folder / "neutral")


def test_a_stopped_run_resumes_to_the_bit_and_saves_a_plain_model(folder, monkeypatch):
    powerprop = "alpha=2,adam_mode=preconditioned,decay_on=weight,exclude=lm_head"
    flags = {"optimizer": "adarankgrad", "powerprop": powerprop, "weight_decay": 0.1}
    assert call("train", *tiny_flags(output="whole", **flags)) == 0
    original = Flow.on_step_end

    def on_step_end(self, args, state, control, **options):
        if state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, args, state, control, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Flow, "on_step_end", on_step_end)
        assert call("train", *tiny_flags(output="parts", **flags)) == 128 + signal.SIGTERM
    assert call("train", "--resume", "--output", "parts") == 0
    assert_same(folder / "whole", folder / "parts")
    assert not [name for name in weights_of(folder / "parts") if "parametrizations" in name]


def test_the_dense_end_of_the_curve_is_the_run_and_the_other_is_worse(folder, capfd):
    flags = {"steps": 30, "lr": 1e-2, "eval_every": 30, "save_every": 30}
    assert call("train", *tiny_flags(powerprop="alpha=2", **flags)) == 0
    summary = json.loads((folder / "run" / "summary.json").read_text())
    capfd.readouterr()
    curve = ("sparsify", "--run", "run", "--densities", "0.01,1,0.2", "--device", "cpu", "--json")
    assert call(*curve) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert json.loads((folder / "run" / "sparsity.json").read_text()) == result
    assert (folder / "run" / "plots" / "sparsity.png").stat().st_size > 1000
    points = result["points"]
    assert [point["density"] for point in points] == [1.0, 0.2, 0.01]
    # The same mean in another order; and the model went through float32 files.
    assert points[0]["val_loss"] == pytest.approx(summary["val_loss"], rel=1e-5)
    assert points[0]["val_loss"] < points[1]["val_loss"] < points[2]["val_loss"]
    assert points[0]["num_kept"] == points[0]["num_weights"] > points[1]["num_kept"]

    assert call(*curve, "--scope", "global", "--double-output") == 0
    doubled = json.loads(capfd.readouterr().out.splitlines()[-1])["points"]
    num_output = weights_of(folder / "run")["lm_head.weight"].numel()
    num_others = points[0]["num_weights"] - num_output
    # Rounded once over all layers below, and once in the output layer.
    assert doubled[1]["num_kept"] == round(0.2 * num_others) + round(0.4 * num_output)
    assert call("train", *tiny_flags(overwrite=True, powerprop="alpha=2", steps=1)) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--run", "absent"], "absent is not a finished run"),
        (["--run", "absent", "--densities", "few"], "--densities 'few' is not a list"),
        (["--run", "absent", "--densities", "0"], "0 is outside (0, 1]"),
        (["--run", "absent", "--scope", "row"], "scope 'row' is unknown"),
    ],
)
def test_a_curve_that_cannot_be_drawn_is_refused_in_one_line(folder, capfd, flags, message):
    assert call("sparsify", *flags) == 2
    err = capfd.readouterr().err
    assert len(err.strip().splitlines()) == 1 and message in err
