"""Gradients that are not finite, projected as they become final: nothing of them stays."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from adarankgrad import AdaRankGrad
from same_values import assert_same_values

MICRO_BATCHES = 3
NUM_STEPS = 9
ORDINARY_STEP = 5
"""Neither at a refresh, where the measured range leaves nothing outside, nor before one."""


class Broken(torch.autograd.Function):
    """The identity, whose gradient is broken in one entry or in all."""

    @staticmethod
    def forward(ctx, inputs, value, is_whole):
        ctx.value, ctx.is_whole = value, is_whole
        return inputs.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = torch.full_like(grad, ctx.value) if ctx.is_whole else grad.clone()
        grad.view(-1)[3] = ctx.value
        return grad, None, None


def build(residual, nonfinite="skip"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh())
    model = model.append(nn.Linear(12, 3))
    optimizer = AdaRankGrad(
        list(model.named_parameters()),
        lr=0.01,
        basis="sketched",
        max_rank=4,
        min_rank=1,
        refresh_max_gap=3,
        residual=residual,
        nonfinite=nonfinite,
    )
    optimizer.accumulate_in_backward(model, num_micro_batches=MICRO_BATCHES)
    return model, optimizer


def backward(model, step, part, *, broken_layer=None, value=0.0, is_whole=False, loss_scale=1.0):
    generator = torch.Generator().manual_seed(10 * step + part)
    hidden = torch.randn(4, 10, generator=generator)
    for index, layer in enumerate(model):
        hidden = layer(hidden)
        if index == broken_layer:
            hidden = Broken.apply(hidden, value, is_whole)
    (loss_scale * hidden.square().mean()).backward()


def backward_with_one_broken(model, step, **broken):
    """Gradients of a step whose second micro-batch is broken in the first layer."""
    for part in range(MICRO_BATCHES):
        broken_layer = 0 if part == 1 else None
        backward(model, step, part, broken_layer=broken_layer, value=math.nan, **broken)


def copies(model):
    return [param.detach().clone() for param in model.parameters()]


def train(model, optimizer, num_steps=4):
    for step in range(num_steps):
        for part in range(MICRO_BATCHES):
            backward(model, step, part)
        optimizer.step()
        optimizer.zero_grad()


def assert_finite(model, optimizer):
    for name, param in model.named_parameters():
        assert bool(torch.isfinite(param).all()), name
        for key, entry in optimizer.state.get(param, {}).items():
            assert bool(torch.isfinite(torch.as_tensor(entry)).all()), f"{name} {key}"


@pytest.mark.parametrize("is_whole", [False, True], ids=["one entry", "all entries"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, 1e-40])
@pytest.mark.parametrize("residual", ["none", "orthogonalized", "normalized"])
def test_a_broken_micro_batch_leaves_weights_and_state_finite(residual, value, is_whole):
    model, optimizer = build(residual)
    train(model, optimizer)  # until there is a basis, and a residual with it
    for step in range(NUM_STEPS):
        for part in range(MICRO_BATCHES):
            is_broken = part == step % MICRO_BATCHES
            layer = [0, 2, 4][step // 3] if is_broken else None
            backward(model, step, part, broken_layer=layer, value=value, is_whole=is_whole)
            assert_finite(model, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        assert_finite(model, optimizer)
    skipped = NUM_STEPS if abs(value) > 1e19 or math.isnan(value) else 0
    assert optimizer.report().num_skipped_steps == skipped
    before = [param.detach().clone() for param in model.parameters()]
    train(model, optimizer)
    assert_finite(model, optimizer)
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("nonfinite", ["skip", "raise", "ignore"])
@pytest.mark.parametrize("residual", ["orthogonalized", "normalized"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_a_broken_micro_batch_takes_no_residual_step_at_all(residual, nonfinite, value):
    model, optimizer = build(residual, nonfinite)
    train(model, optimizer, ORDINARY_STEP)
    before = copies(model)
    # In one entry of the layer's result, so in one row of its weight's gradient.
    backward(model, ORDINARY_STEP, 0, broken_layer=0, value=value)
    assert torch.equal(model[0].weight, before[0])
    assert not torch.equal(model[2].weight, before[2])
    after_broken = copies(model)
    backward(model, ORDINARY_STEP, 1)
    assert not torch.equal(model[0].weight, after_broken[0])


@pytest.mark.parametrize(
    ("residual", "says"),
    [
        ("none", r"nothing was changed\. Lower lr"),
        ("normalized", "by the step; residual steps taken in the backward pass are not undone"),
    ],
)
def test_raising_changes_nothing_but_for_residual_steps_before_and_says_so(residual, says):
    model, optimizer = build(residual, "raise")
    train(model, optimizer, ORDINARY_STEP)
    before = copies(model)
    backward_with_one_broken(model, ORDINARY_STEP)
    after_backward = copies(model)
    has_moved = any(not torch.equal(*pair) for pair in zip(before, after_backward, strict=True))
    assert has_moved == (residual != "none")
    state = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(FloatingPointError, match=f"is nan, from 0.weight, .*{says}"):
        optimizer.step()
    assert_same_values(copies(model), after_backward)
    assert_same_values(optimizer.state_dict(), state)
    optimizer.zero_grad()
    train(model, optimizer)
    assert_finite(model, optimizer)


@pytest.mark.parametrize("residual", ["none", "normalized"])
def test_ignoring_takes_what_is_broken_with_the_step_and_not_before(residual):
    model, optimizer = build(residual, "ignore")
    train(model, optimizer, ORDINARY_STEP)
    backward_with_one_broken(model, ORDINARY_STEP)
    assert_finite(model, optimizer)
    optimizer.step()
    assert not bool(torch.isfinite(model[0].weight).all())
    assert bool(torch.isfinite(model[2].weight).all())
    assert optimizer.report().num_skipped_steps == 0


def test_a_step_that_a_loss_scaler_skips_leaves_finite_weights_when_ignoring():
    model, optimizer = build("normalized", "ignore")
    train(model, optimizer, ORDINARY_STEP)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(torch.ones(()))  # makes the scale
    backward_with_one_broken(model, ORDINARY_STEP, loss_scale=scaler.get_scale())
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert_finite(model, optimizer)
