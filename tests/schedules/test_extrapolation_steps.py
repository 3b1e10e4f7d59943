"""Gradients are taken ahead of the weights, and steps from where they were, to the bit."""

from __future__ import annotations

import io
import math

import pytest
import torch
from torch import nn

from adarankgrad import AdaGradNorm, Fira, GaLore, param_groups
from adarankgrad.schedules.extrapolation import Extrapolation, ExtrapolationConfig
from same_values import assert_same_values

from .extrapolated_models import (
    OPTIMIZERS,
    SOURCES,
    batches,
    net,
    same,
    scalar,
    setup,
    train,
    train_by_hand,
    train_plainly,
)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_of_zero_is_the_run_without_to_the_bit(name, source):
    plain = net()
    optimizer = OPTIMIZERS[name](plain)
    train_plainly(plain, optimizer, batches(10))
    model, own, extrapolation = setup(name, step=0.0, **SOURCES[source])
    train(model, own, extrapolation, batches(10))
    assert same(plain, model)
    assert_same_values(optimizer.state_dict(), own.state_dict())


@pytest.mark.parametrize("num_parts", [1, 2])
@pytest.mark.parametrize("source", ["past-local", "fresh", "past-global"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_a_copy_that_is_ahead_to_the_bit(name, source, num_parts):
    steps = batches(6, num_parts)
    expected = net()
    by_hand = OPTIMIZERS[name](expected)
    # Two parts: their halves, and twice a half, are exact.
    train_by_hand(expected, by_hand, source, 0.3, steps)
    model, optimizer, extrapolation = setup(name, num_parts, **SOURCES[source])
    train(model, optimizer, extrapolation, steps)
    assert same(expected, model)
    assert_same_values(by_hand.state_dict(), optimizer.state_dict())
    unmoved = net()
    train_plainly(unmoved, OPTIMIZERS[name](unmoved), steps)
    assert not same(unmoved, model)


TORCH_OPTIMIZERS = [
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adamax",
    "ASGD",
    "NAdam",
    "RAdam",
    "RMSprop",
]


@pytest.mark.parametrize("make", [*TORCH_OPTIMIZERS, "Rprop", AdaGradNorm, GaLore, Fira])
def test_any_optimizer_takes_the_steps_of_a_copy_that_is_ahead(make):
    def optimizer_of(model):
        if make in (GaLore, Fira):
            return make(param_groups(model, smallest_side=2), lr=0.02, rank=4)
        chosen = getattr(torch.optim, make) if isinstance(make, str) else make
        return chosen(model.parameters(), lr=0.02)

    expected = net()
    train_by_hand(expected, optimizer_of(expected), "past-local", 0.3, batches(4, 2))
    model = net()
    optimizer = optimizer_of(model)
    extrapolation = Extrapolation(optimizer, model, ExtrapolationConfig(0.3), num_micro_batches=2)
    train(model, optimizer, extrapolation, batches(4, 2))
    assert same(expected, model)


def test_a_fresh_gradient_contracts_a_quadratic_as_computed():
    model, weight, optimizer = scalar(2.0)
    extrapolation = Extrapolation(optimizer, model, ExtrapolationConfig(0.4, "fresh"))

    def backward():
        (0.5 * 3.0 * weight.square()).sum().backward()

    with extrapolation.extrapolate(backward):
        backward()
    optimizer.step()
    # x(1 - γλ + γγ̂λ²) with λ = 3, γ = 0.1, γ̂ = 0.4; a few roundings of float64.
    assert weight.item() == pytest.approx(2.0 * (1 - 0.3 + 0.36), rel=1e-14)


def test_two_steps_by_the_past_gradient_as_computed():
    model, weight, optimizer = scalar(1.0)
    extrapolation = Extrapolation(optimizer, model, ExtrapolationConfig(0.5))
    for expected in (0.8, 0.8 - 0.1 * 2 * (0.8 - 0.5 * 2.0)):
        with extrapolation.extrapolate():
            weight.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        # The first step has no past gradient. A few roundings of float64.
        assert weight.item() == pytest.approx(expected, rel=1e-14)


def test_extragradient_contracts_a_bilinear_game_on_which_gradient_descent_diverges():
    norms = []
    for step in (0.0, 0.1):
        x, y = (nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in "xy")
        model = nn.ParameterList([x, y])
        groups = [{"params": [x]}, {"params": [y], "maximize": True}]
        optimizer = torch.optim.SGD(groups, lr=0.1)
        extrapolation = Extrapolation(optimizer, model, ExtrapolationConfig(step, "fresh"))
        for _ in range(50):

            def backward(x=x, y=y):
                (x * y).sum().backward()

            with extrapolation.extrapolate(backward):
                backward()
            optimizer.step()
            optimizer.zero_grad()
        norms.append(math.hypot(x.item(), y.item()) / math.sqrt(2.0))
    # Descent multiplies the norm by √(1 + γ²) a step, extragradient by √(1 - γ² + γ⁴).
    assert norms[0] == pytest.approx(1.01**25, rel=1e-12)
    assert norms[1] == pytest.approx((1 - 0.01 + 0.0001) ** 25, rel=1e-12)


@pytest.mark.parametrize("source", ["past-local", "past-global", "noise"])
def test_one_pass_a_step_and_random_numbers_and_buffers_as_without(source):
    states = []
    for step in (0.0, 0.3):
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(3)
        model = nn.Sequential(nn.Linear(12, 3), norm, nn.Dropout(0.5))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        config = ExtrapolationConfig(step, **SOURCES[source])
        extrapolation = Extrapolation(optimizer, model, config)
        for parts in batches(3):
            with extrapolation.extrapolate():
                model(parts[0]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert norm.num_batches_tracked == 3
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", ["sgd", "bfloat16"])
def test_a_resumed_run_is_the_same_to_the_bit(name, source):
    steps = batches(6, 2)
    whole, optimizer, extrapolation = setup(name, 2, **SOURCES[source])
    train(whole, optimizer, extrapolation, steps)
    model, optimizer, extrapolation = setup(name, 2, **SOURCES[source])
    train(model, optimizer, extrapolation, steps[:3])
    file = io.BytesIO()
    parts = [part.state_dict() for part in (model, optimizer, extrapolation)]
    torch.save([*parts, torch.get_rng_state()], file)
    file.seek(0)
    *parts, rng = torch.load(file, weights_only=True)
    again = setup(name, 2, **SOURCES[source])
    for part, state in zip(again, parts, strict=True):
        part.load_state_dict(state)
    torch.set_rng_state(rng)
    train(*again, steps[3:])
    assert same(whole, again[0])
