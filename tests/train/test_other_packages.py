"""Optimizers of other packages, by dotted path: trained, measured, resumed, refused."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from adarankgrad.train import TrainConfig, UserError, train
from adarankgrad.train.dotted_path import build_paired
from adarankgrad.train.files import read_jsonl
from adarankgrad.train.optimizers import held_bytes
from adarankgrad.train.paired import PairedOptimizer

MUON = pytest.param(
    "torch.optim.Muon",
    marks=pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon yet"),
)


class CompressingOptimizer(torch.optim.SGD):
    """Keeps an object in its state, as APOLLO does."""

    class Projector:
        def __init__(self):
            self.matrix = torch.ones(4, 5)

    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                self.state[weight].setdefault("projector", self.Projector())
        return super().step(closure)


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    monkeypatch.setattr("adarankgrad.train.plots.write_plots", lambda run_dir: [])
    monkeypatch.setattr("adarankgrad.train.report.write_report", lambda run_dir: run_dir)
    monkeypatch.setitem(sys.modules, "other_package", sys.modules[__name__])


def run(settings, **options):
    return train(TrainConfig.from_settings(settings), **options)


def losses(settings):
    rows = read_jsonl(Path(settings["output"]) / "metrics.jsonl")
    return [row["loss"] for row in rows if "loss" in row]


def weights_with_gradients():
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(7))]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    return weights


def pair(weights):
    matrix, vector = weights
    return PairedOptimizer(
        [torch.optim.Adagrad([matrix], lr=0.1), torch.optim.AdamW([vector], lr=0.02)]
    )


def test_a_pair_steps_each_weight_by_its_own_optimizer():
    paired, alone = weights_with_gradients(), weights_with_gradients()
    both = pair(paired)
    parts = [torch.optim.Adagrad([alone[0]], lr=0.1), torch.optim.AdamW([alone[1]], lr=0.02)]
    for _ in range(3):
        both.step()
        for part in parts:
            part.step()
    assert all(torch.equal(first, second) for first, second in zip(paired, alone, strict=True))


def test_a_scheduler_reaches_the_parts_of_a_pair_also_after_loading():
    weights = weights_with_gradients()
    both = pair(weights)
    both.step()
    both.load_state_dict(both.state_dict())
    schedule = torch.optim.lr_scheduler.LambdaLR(both, lambda step: 0.5**step)
    both.step()
    schedule.step()
    assert [part.param_groups[0]["lr"] for part in both.parts] == [0.05, 0.01]


def test_a_loaded_pair_goes_on_as_the_saved_one():
    first, second = weights_with_gradients(), weights_with_gradients()
    one, other = pair(first), pair(second)
    one.step()
    other.step()
    fresh = pair(second)
    fresh.load_state_dict(other.state_dict())
    one.step()
    fresh.step()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_state_of_another_pair_is_refused():
    weights = weights_with_gradients()
    with pytest.raises(ValueError, match="holds 0 optimizers, this one has 2"):
        pair(weights).load_state_dict(torch.optim.AdamW(weights).state_dict())


def test_a_closure_is_evaluated_once_with_gradients_on():
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        return torch.tensor(1.5)

    assert pair(weights_with_gradients()).step(closure) == 1.5
    assert calls == [True]


def test_rates_and_decay_of_groups_reach_both_parts():
    matrix, vector = weights_with_gradients()
    groups = [
        {"params": [("matrix", matrix)], "project": True, "weight_decay": 0.1},
        {"params": [("vector", vector)], "project": False, "weight_decay": 0.0, "lr": 0.5},
    ]
    both = build_paired(torch.optim.Adagrad, groups, lr=0.1, group={"rank": 3}, lr_decay=0.01)
    adagrad, adamw = (part.param_groups[0] for part in both.parts)
    assert (adagrad["lr"], adagrad["weight_decay"], adagrad["rank"]) == (0.1, 0.1, 3)
    assert adagrad["lr_decay"] == 0.01
    assert (adamw["lr"], adamw["weight_decay"]) == (0.5, 0.0)


def test_adagrad_by_dotted_path_trains_the_projected_weights_with_half_of_adamws_state(settings):
    summary = run(settings(optimizer="torch.optim.Adagrad", lr=0.02))
    # One accumulator a weight, where AdamW holds two moments.
    assert 2 * summary["projected_state_bytes"] == summary["adamw_projected_state_bytes"]
    trained = losses(settings())
    assert trained[-1] < trained[0]


@pytest.mark.parametrize("optimizer", ["torch.optim.Adagrad", MUON])
def test_a_resumed_run_ends_like_one_that_was_never_stopped(settings, optimizer):
    shared = {"optimizer": optimizer, "lr_schedule": "constant", "warmup_steps": 1}
    whole = run(settings("whole", **shared))
    run(settings("halves", **shared, steps=8))
    halves = run(settings("halves", **shared), resume=True)
    assert halves["val_loss"] == whole["val_loss"]
    assert losses(settings("halves"))[-1] == losses(settings("whole"))[-1]


def test_a_state_with_objects_is_measured_and_refused_on_resume(settings):
    shared = {"optimizer": "other_package.CompressingOptimizer", "lr_schedule": "constant"}
    summary = run(settings(**shared, steps=4, eval_every=4))
    projected = 14  # seven matrices a layer, two layers
    assert summary["projected_state_bytes"] == projected * 4 * 5 * 4
    with pytest.raises(UserError, match="holds objects of its package.*--overwrite"):
        run(settings(**shared, eval_every=4), resume=True)


@pytest.mark.parametrize(
    ("changes", "expected"),
    {
        "no such package": ({"optimizer": "no_such_package.Lion"}, "cannot import no_such_package"),
        "no such class": ({"optimizer": "torch.optim.Lyon"}, "torch.optim has no Lyon"),
        "no optimizer": ({"optimizer": "torch.nn.Linear"}, "torch.nn.Linear is no optimizer"),
        "wrong argument": (
            {"optimizer": "torch.optim.Adagrad", "optimizer_args": {"epsilon": 1e-8}},
            "unknown argument of torch.optim.Adagrad 'epsilon': did you mean eps",
        ),
        "bad value": (
            {"optimizer": "torch.optim.Adagrad", "optimizer_args": {"eps": -1.0}},
            "torch.optim.Adagrad refuses its arguments",
        ),
        "group without names": (
            {"optimizer": "torch.optim.Adagrad", "optimizer_args": {"group": 3}},
            "group = 3 must be a table",
        ),
        "needs a closure": (
            {"optimizer": "torch.optim.LBFGS"},
            "torch.optim.LBFGS evaluates the loss several times a step",
        ),
    }.values(),
)
def test_what_cannot_be_built_is_refused_before_anything_is_written(
    settings, tmp_path, changes, expected
):
    with pytest.raises(UserError, match=expected):
        run(settings(**changes))
    assert list(tmp_path.iterdir()) == []


def test_bytes_are_counted_through_lists_tables_and_quantised_tensors():
    class Quantised(torch.Tensor):
        """A wrapper of one byte a number and a scale for every two."""

        def __new__(cls, codes, scales):
            wrapper = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)
            wrapper.codes, wrapper.scales = codes, scales
            return wrapper

        def __tensor_flatten__(self):
            return ["codes", "scales"], None

        __torch_dispatch__ = None

    quantised = Quantised(torch.zeros(8, dtype=torch.uint8), torch.zeros(4))
    state = {
        "step": torch.tensor(3.0),
        "bases": [torch.zeros(2, 2), [torch.zeros(3, dtype=torch.bfloat16)]],
        "moment": quantised,
        "name": "left out",
    }
    assert held_bytes(state) == 4 * 4 + 3 * 2 + 8 + 4 * 4
