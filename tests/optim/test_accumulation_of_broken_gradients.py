"""Gradients that are not finite, projected as they become final: nothing of them stays."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from adarankgrad import AdaRankGrad

MICRO_BATCHES = 3
NUM_STEPS = 9


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


def build(residual):
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
    )
    optimizer.accumulate_in_backward(model, num_micro_batches=MICRO_BATCHES)
    return model, optimizer


def backward(model, step, part, *, broken_layer=None, value=0.0, is_whole=False):
    generator = torch.Generator().manual_seed(10 * step + part)
    hidden = torch.randn(4, 10, generator=generator)
    for index, layer in enumerate(model):
        hidden = layer(hidden)
        if index == broken_layer:
            hidden = Broken.apply(hidden, value, is_whole)
    hidden.square().mean().backward()


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
