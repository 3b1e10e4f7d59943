"""Extrapolation beside loss scaling, recomputed activations, and gradients projected early."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from adarankgrad.schedules.extrapolation import Extrapolation, ExtrapolationConfig
from allocations import LiveMemory

from .extrapolated_models import SOURCES, batches, same, scalar, setup, train


def test_past_gradients_are_free_of_the_loss_scale_and_dropped_when_it_overflows():
    model, weight, optimizer = scalar(1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    extrapolation = Extrapolation(optimizer, model, ExtrapolationConfig(0.5), scaler=scaler)
    kept = []
    for factor in (3.0, math.inf, 3.0):
        with extrapolation.extrapolate():
            scaler.scale((weight * factor).sum()).backward()
        kept.append(extrapolation.state_dict()["past"].get(0))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert kept[0].item() == kept[2].item() == 3.0
    assert kept[1] is None
    assert weight.item() == pytest.approx(1.0 - 2 * 0.1 * 3.0, rel=1e-14)


class PeakMemory(LiveMemory):
    peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.peak = max(self.peak, self.num_bytes())
        return result


@pytest.mark.parametrize("source", SOURCES)
def test_the_memory_is_one_copy_of_the_weights_and_one_weight_more(source):
    peaks, held = [], []
    for step in (0.0, 0.3):
        model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(6)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        config = ExtrapolationConfig(step, **SOURCES[source])
        extrapolation = Extrapolation(optimizer, model, config)
        data = torch.ones(1, 64)

        def backward(model=model, data=data):
            model(data).sum().backward()

        with PeakMemory() as memory:
            for _ in range(3):
                with extrapolation.extrapolate(backward if source == "fresh" else None):
                    backward()
                optimizer.step()
                optimizer.zero_grad()
        peaks.append(memory.peak)
        held.append(memory.num_bytes())
    one = 64 * 64 * 4
    # Up to a KiB for activations and norms.
    assert peaks[1] - peaks[0] <= 7 * one + 1024
    expected = 6 * one if source.startswith("past") else 0
    assert held[1] - held[0] == pytest.approx(expected, abs=1024)


def test_recomputed_activations_change_nothing():
    models = []
    for recomputes in (False, True):
        model, optimizer, extrapolation = setup("adamw")
        if recomputes:
            inner = model.inner.forward
            model.inner.forward = lambda x, inner=inner: checkpoint(inner, x, use_reentrant=False)
        train(model, optimizer, extrapolation, batches(4))
        models.append(model)
    assert same(*models)


@pytest.mark.parametrize("source", ["past-local", "fresh", "noise"])
def test_gradients_projected_in_the_backward_pass_give_the_same_steps(source):
    models = []
    for in_backward in (False, True):
        model, optimizer, extrapolation = setup("adarankgrad", 2, **SOURCES[source])
        for group in optimizer.param_groups:
            group.update(basis="sketched", residual="none")
        if in_backward:
            optimizer.accumulate_in_backward(model)
        train(model, optimizer, extrapolation, batches(6, 2))
        models.append(model)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        # Measurements are summed over parts, not taken of the sum: roundings of float32, over six
        # steps that depend on each other.
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_residual_steps_in_the_backward_pass_are_from_the_real_point_or_refused():
    for num_parts in (1, 2):
        model, optimizer, extrapolation = setup("adarankgrad", num_parts)
        for group in optimizer.param_groups:
            group.update(basis="sketched", residual="normalized")
        optimizer.accumulate_in_backward(model, num_micro_batches=num_parts)
        before = model.inner.weight.clone()
        if num_parts == 1:
            train(model, optimizer, extrapolation, batches(3))
            assert not torch.equal(before, model.inner.weight)
        else:
            train(model, optimizer, extrapolation, batches(1, 2))
            with pytest.raises(RuntimeError, match="weight was changed at the extrapolated point"):
                train(model, optimizer, extrapolation, batches(2, 2))


def test_whole_gradients_that_are_not_kept_are_asked_for_in_vain():
    model, optimizer, extrapolation = setup("adarankgrad", source="past-global")
    for group in optimizer.param_groups:
        group.update(basis="sketched", residual="none")
    optimizer.accumulate_in_backward(model)
    before = model.inner.weight.clone()
    with pytest.raises(NotImplementedError, match="accumulate_in_backward"):
        train(model, optimizer, extrapolation, batches(1))
    assert torch.equal(before, model.inner.weight)
