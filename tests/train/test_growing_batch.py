"""``--adadagrad``: a batch that grows, for the same samples, and nothing else that changes."""

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adarankgrad.compare.plan import make_plan
from adarankgrad.compare.results import collect
from adarankgrad.compare.run import compare
from adarankgrad.train import Interrupted, TrainConfig, TrainingError, train
from adarankgrad.train.flow import Flow
from adarankgrad.train.growing_batch import GrowingBatch
from adarankgrad.train.trainer import RunTrainer
from run_folders import assert_same_run, rows

# Evaluations and checkpoints at the end only, which take longer than steps.
START = {
    "batch_size": 2,
    "gradient_accumulation": 2,
    "log_every": 1,
    "eval_every": 100,
    "save_every": 100,
    "steps": 6,
}


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    monkeypatch.setattr("adarankgrad.train.plots.write_plots", lambda run_dir: [])
    monkeypatch.setattr("adarankgrad.train.report.write_report", lambda run_dir: run_dir)


def run(settings, **options):
    return train(TrainConfig.from_settings(settings), **options)


def folder_of(summary):
    return Path(summary["paths"]["metrics"]).parent


def logged(summary, name):
    return [row[name] for row in rows(folder_of(summary)) if "loss" in row]


def weights(summary):
    return load_file(f"{summary['paths']['model']}/model.safetensors")


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw", "adadagrad": {"statistics": "micro-batches"}},
        {
            "optimizer": "adarankgrad",
            "adadagrad": {"statistics": "per-sample", "test": "augmented", "chunk_size": 3},
        },
        {
            "optimizer": "adarankgrad",
            "accumulate_in_backward": True,
            "adadagrad": {"statistics": "micro-batches"},
        },
    ],
    ids=["micro-batches", "per-sample", "in-backward"],
)
def test_an_infinite_tolerance_trains_as_without_it_to_the_bit(settings, changes):
    # The model has dropout, so that a test which drew random numbers would be seen.
    growing = changes["adadagrad"] | {"eta": float("inf"), "max_batch_size": 64}
    plain = run(settings("plain", **START | changes | {"adadagrad": {}}))
    tested = run(settings("tested", **START | changes | {"adadagrad": growing}))
    assert logged(plain, "loss") == logged(tested, "loss")
    assert logged(plain, "lr") == logged(tested, "lr")
    before, after = weights(plain), weights(tested)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert logged(tested, "batch_size") == [4] * 6
    measured = [scale for scale in logged(tested, "noise_scale") if scale is not None]
    # Where noise hides the gradient there is no scale; at the start of training that is rare.
    assert len(measured) > 3 and all(scale > 0 for scale in measured)
    assert "batch_size" not in plain


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adarankgrad", "adadagrad": {"statistics": "norms"}},
        {"optimizer": "adarankgrad", "accumulate_in_backward": True},
        {"optimizer": "adagrad-norm", "lr": 1.0},
        {"optimizer": "adamw", "powerprop": {"alpha": 2}},
    ],
    ids=["norms", "in-backward", "adagrad-norm", "powerprop"],
)
def test_the_batch_grows_to_the_cap_and_the_run_sees_the_same_samples(settings, changes):
    growing = {"max_batch_size": 15, "eta": 0.5} | changes.get("adadagrad", {})
    summary = run(settings(**START | changes | {"adadagrad": growing, "steps": 20}))
    sizes, tokens = logged(summary, "batch_size"), logged(summary, "tokens")
    assert sizes == sorted(sizes) and sizes[0] == 4 < sizes[-1] <= 14
    assert all(size % 2 == 0 for size in sizes)
    assert summary["batch_size"] == sizes[-1]
    assert summary["samples"] == 20 * 4 and tokens[-1] == 20 * 4 * 16
    # All steps have the batch that is logged, but for the last, which takes what is left.
    seen = [now - before for before, now in zip([0, *tokens], tokens, strict=False)]
    assert seen[:-1] == [16 * size for size in sizes[:-1]] and 0 < seen[-1] <= 16 * sizes[-1]
    assert summary["steps"] == len(sizes) < 20
    scales = logged(summary, "noise_scale")
    assert all(scale is None for scale, size in zip(scales, sizes, strict=True) if size == 14)


@pytest.mark.parametrize("changes", [{}, {"accumulate_in_backward": True}])
def test_gradients_are_not_watched_any_more_after_a_step_that_fails(settings, monkeypatch, changes):
    kept = {}
    original, init = RunTrainer._micro_batch, GrowingBatch.__init__

    def keep(self, controller, model, optimizer):
        init(self, controller, model, optimizer)
        kept["method"], kept["norms"] = self, self._norms

    def fail(self, *inputs):
        original(self, *inputs)
        kept["watched"] = [*kept["norms"]._handles]
        raise KeyboardInterrupt

    monkeypatch.setattr(GrowingBatch, "__init__", keep)
    monkeypatch.setattr(RunTrainer, "_micro_batch", fail)
    growing = {"max_batch_size": 16, "eta": 0.5}
    with pytest.raises(KeyboardInterrupt):
        run(settings(**START | changes, optimizer="adarankgrad", adadagrad=growing))
    assert kept["watched"] and not kept["norms"]._handles
    assert all(each._on_measured is None for each in kept["method"]._accumulations)


def test_the_learning_rate_goes_by_samples(settings):
    growing = {"max_batch_size": 16, "eta": 0.5}
    changes = {"steps": 24, "warmup_steps": 4, "lr": 1e-3, "adadagrad": growing}
    summary = run(settings(**START | changes))
    assert summary["steps"] < 24
    # A step's rate is that of the samples before it, in steps of 4 sequences of 16 tokens.
    positions = [tokens / (4 * 16) for tokens in [0, *logged(summary, "tokens")]]
    expected = [
        1e-3 * (at / 4 if at < 4 else 0.5 * (1 + math.cos(math.pi * (at - 4) / (24 - 4))))
        for at in positions[:-1]
    ]
    # The same few operations in float64.
    assert logged(summary, "lr") == pytest.approx(expected, rel=1e-12)


def test_a_stopped_run_takes_the_same_batches_to_the_bit(settings, monkeypatch):
    changes = {
        "adadagrad": {"max_batch_size": 24, "eta": 0.6, "test_every": 1},
        "optimizer": "adarankgrad",
        "log_every": 3,
        "steps": 20,
    }
    whole = run(settings("whole", **(START | changes)))
    parts = settings("parts", **(START | changes))
    original = Flow.on_step_end

    def on_step_end(self, args, state, control, **options):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, args, state, control, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Flow, "on_step_end", on_step_end)
        with pytest.raises(Interrupted):
            run(parts)
    resumed = run(parts, resume=True)
    sizes = logged(whole, "batch_size")
    assert sizes[0] < sizes[-1]
    assert logged(resumed, "batch_size") == sizes
    assert logged(resumed, "noise_scale") == logged(whole, "noise_scale")
    assert_same_run(folder_of(whole), folder_of(resumed))


def test_projected_gradients_are_compared_by_what_is_measured_of_them(settings, monkeypatch):
    noises = {}
    original = GrowingBatch._noise

    def keep(self, step):
        noise = original(self, step)
        noises.setdefault(bool(self._accumulations), []).append(noise)
        return noise

    monkeypatch.setattr(GrowingBatch, "_noise", keep)
    for name, in_backward in (("whole", False), ("held", True)):
        run(
            settings(
                name,
                **START,
                optimizer="adarankgrad",
                optimizer_args={"residual": "none", "basis": "sketched"},
                accumulate_in_backward=in_backward,
                adadagrad={"max_batch_size": 64, "eta": float("inf")},
            )
        )
    for whole, held in zip(noises[False], noises[True], strict=True):
        assert whole.variance > 0
        # Outside the basis norms are estimates by eight probes a weight, and over the 14 weights
        # of this model off by a twelfth or so; plain weights and the basis are exact.
        assert held.squared_mean == pytest.approx(whole.squared_mean, rel=0.35)
        assert held.variance == pytest.approx(whole.variance, rel=0.35)


def test_a_model_whose_samples_cannot_be_told_apart_ends_the_run_with_what_to_do(
    settings, tmp_path
):
    # GPT-2 looks positions up once for all samples.
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 1, "vocab_size": 300, "n_positions": 64}
    config = {"model_type": "gpt2", "tie_word_embeddings": False, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    growing = {"max_batch_size": 16, "statistics": "norms"}
    model = {"model": str(tmp_path / "config.json"), "adadagrad": growing}
    with pytest.raises(TrainingError, match="transformer.wpe saw 2 of 4 samples.*statistics of"):
        run(settings(**START | model))


def test_a_comparison_takes_it_as_a_setting_of_a_method(shared, children, tmp_path):
    growing = {
        "optimizer": "adamw",
        "gradient_accumulation": 2,
        "adadagrad": {"max_batch_size": 16, "eta": 0.5, "statistics": "micro-batches"},
    }
    settings = {"methods": {"AdamW": {"optimizer": "adamw"}, "growing": growing}, "lrs": [1e-3]}
    plan = make_plan(tmp_path / "cmp", {**shared, **settings})
    compare(plan)
    plain, grown = (result.first_run for result in collect(plan))
    assert not plain.batch_sizes and grown.batch_sizes[-1] > 4
    # As many steps at the start, of twice the samples.
    assert grown.summary["tokens"] == 2 * plain.summary["tokens"]
    assert grown.summary["steps"] < plain.summary["steps"]
