"""How far weights are moved ahead: past gradients, noise, schedules."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from adarankgrad.schedules.extrapolation import Extrapolation, ExtrapolationConfig

from .extrapolated_models import batches, loss_of, net, scalar, setup, train


def test_the_past_gradient_is_not_the_clipped_one():
    shifts = []
    for is_clipped in (False, True):
        for source in ("past-local", "past-global"):
            model, weight, optimizer = scalar(1.0)
            extrapolation = Extrapolation(optimizer, model, ExtrapolationConfig(0.5, source))
            with extrapolation.extrapolate():
                (5.0 * weight).sum().backward()
            if is_clipped:
                nn.utils.clip_grad_norm_([weight], 0.1)
            before = weight.item()
            extrapolation.begin()
            shifts.append(before - weight.item())
            extrapolation.abandon()
    assert shifts == [2.5] * 4


@pytest.mark.parametrize(
    ("scale", "expected"), [(0.5, 0.5), ("layer", math.sqrt(4.25)), ("filter", None)]
)
@pytest.mark.parametrize("noise", ["gaussian", "uniform"])
def test_noise_has_the_scale_that_was_asked_for(noise, scale, expected):
    model = nn.ParameterList([nn.Parameter(torch.ones(2, 50_000))])
    with torch.no_grad():
        model[0][1] = math.sqrt(7.5)
    before = model[0].detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = ExtrapolationConfig(2.0, "noise", scale, noise)
    extrapolation = Extrapolation(optimizer, model, config)
    shifts = []
    for _ in range(2):
        extrapolation.begin()
        shifts.append((model[0].detach() - before) / 2.0)
        extrapolation.end()
    deviations = [1.0, math.sqrt(7.5)] if scale == "filter" else [expected] * 2
    for row, deviation in zip(shifts[0], deviations, strict=True):
        # A mean of 50,000 has a spread of 0.0045 deviations, a deviation of at most 0.0032: both
        # within five of them.
        assert abs(row.mean().item()) < 0.0225 * deviation
        assert row.std().item() == pytest.approx(deviation, rel=0.016)
    # √3 deviations bound a uniform number; 100,000 normal ones pass 3.
    assert (shifts[0].abs().max() < 1.733 * max(deviations)) == (noise == "uniform")
    assert not torch.equal(*shifts)


def test_noise_follows_the_past_gradient_of_each_weight():
    model, optimizer, extrapolation = setup(step=0.3, source="noise", scale="gradient")
    train(model, optimizer, extrapolation, batches(1))
    past = extrapolation.state_dict()["past"]
    assert sorted(past) == [0, 1, 2, 3]  # not of weights that had no gradient
    loss_of(net(), batches(1)[0][0]).backward()
    twin = net()
    loss_of(twin, batches(1)[0][0]).backward()
    # The norm of 144 squares in another order.
    expected = twin.inner.weight.grad.square().mean().sqrt()
    torch.testing.assert_close(past[0], expected, rtol=1e-5, atol=0)


def test_the_step_follows_the_rate_of_a_scheduler_up_to_its_own_length():
    model, weight, optimizer = scalar(1.0)
    factors = [0.5, 1.0, 3.0, 0.25]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factors[step % 4])
    shifts = []
    for follow in (True, False):
        config = ExtrapolationConfig(1.0, follow_lr=follow)
        extrapolation = Extrapolation(optimizer, model, config)
        extrapolation.load_state_dict(
            {"source": "past-local", "num_draws": 0, "past": {0: torch.ones(1).double()}}
        )
        before = weight.item()
        extrapolation.begin()
        shifts.append(before - weight.item())
        extrapolation.abandon()
    assert shifts == [0.5, 1.0]
    lengths = []
    extrapolation = Extrapolation(optimizer, model, ExtrapolationConfig(1.0))
    while len(lengths) < len(factors):
        before = weight.item()
        with extrapolation.extrapolate():
            lengths.append(before - weight.item())
            weight.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    # The gradient is 1; the first step has none. Differences of numbers near 1 round at 2^-53.
    assert lengths == pytest.approx([0.0, 1.0, 1.0, 0.25], abs=1e-15)
