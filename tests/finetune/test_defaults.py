"""Optimizers and rates that are taken where nothing is said."""

from __future__ import annotations

import pytest
import torch

from adarankgrad.finetune.config import FinetuneConfig
from adarankgrad.finetune.defaults import with_optimizer
from adarankgrad.optim.groups import param_groups
from adarankgrad.train import UserError
from adarankgrad.train.optimizers import build_optimizer


class NoDefault(torch.optim.SGD):
    """An optimizer whose rate has to be given."""

    def __init__(self, params, lr):
        super().__init__(params, lr)


def decided(**changes):
    given = {"task": "regression", "model": "m", "data": "d", "output": "o", "steps": 1}
    config = with_optimizer(FinetuneConfig(**given, **changes))
    return config.optimizer, config.lr, config.plain_lr


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("adarankgrad", 3e-4, 2e-4)),
        ({"optimizer": "fira"}, ("fira", 2e-4, 5e-5)),
        ({"optimizer": "adamw"}, ("adamw", 5e-5, 5e-5)),
        ({"optimizer": "adagrad-norm"}, ("adagrad-norm", 1.0, 1.0)),
        ({"optimizer": "torch.optim.Adadelta"}, ("torch.optim.Adadelta", 1.0, 5e-5)),
        ({"lr": 0.1}, ("adarankgrad", 0.1, 0.1)),
        ({"lr": 0.1, "plain_lr": 0.2}, ("adarankgrad", 0.1, 0.2)),
        ({"method": "lora"}, ("adamw", 5e-4, None)),
        ({"method": "sora", "optimizer": "galore"}, ("galore", 8e-4, None)),
        ({"method": "lora", "optimizer": "adagrad-norm"}, ("adagrad-norm", 1.0, None)),
    ],
    ids=str,
)
def test_rates_follow_method_and_optimizer(given, expected):
    assert decided(**given) == expected


@pytest.mark.parametrize("method", ["full", "lora"])
def test_an_optimizer_without_a_rate_of_its_own_wants_one(method):
    name = f"{__name__}.NoDefault"
    with pytest.raises(UserError, match="NoDefault has no default learning rate: give --lr"):
        decided(optimizer=name, method=method)
    assert decided(optimizer=name, method=method, lr=0.1)[1] == 0.1


@pytest.mark.parametrize(
    ("arguments", "expected"), [({}, "normalized"), ({"residual": "none"}, "none")], ids=str
)
def test_the_residual_is_normalized_unless_another_is_given(arguments, expected):
    given = {"task": "regression", "model": "m", "data": "d", "output": "o", "steps": 1}
    config = with_optimizer(FinetuneConfig(**given, optimizer_args=arguments))
    groups = param_groups(torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)))
    (residual,) = {group["residual"] for group in build_optimizer(groups, config).param_groups}
    assert residual == expected
