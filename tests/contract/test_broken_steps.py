"""Steps whose gradients are not finite, and clipping by the norm that tells."""

from __future__ import annotations

import math

import pytest
import torch

from .problems import (
    SHAPES,
    assert_same_bits,
    assert_same_state,
    make_params,
    set_gradients,
    state_snapshot,
    train,
    weights_of,
)

# The last is finite, but its square is not in float32.
BROKEN = [math.nan, math.inf, -math.inf, 1e30]


def break_one(params, name, value):
    for other, param in params:
        if other == name:
            param.grad.view(-1)[3] = value


@pytest.mark.parametrize("value", BROKEN)
def test_a_step_with_a_broken_gradient_changes_nothing_and_is_counted(case, value):
    params, expected = make_params(), make_params()
    optimizer, reference = case.build(params), case.build(expected)
    # Refreshes come every third step: the steps in between and those of a refresh are all broken.
    for step in range(7):
        weights, state = weights_of(params), state_snapshot(optimizer)
        for name in SHAPES:
            set_gradients(params, step, "broken")
            break_one(params, name, value)
            optimizer.step()
            assert_same_bits(weights_of(params), weights)
            assert_same_state(state_snapshot(optimizer), state)
        train(optimizer, params, [step])
        train(reference, expected, [step])
    assert_same_bits(weights_of(params), weights_of(expected))
    assert optimizer.report().num_skipped_steps == 7 * len(SHAPES)
    assert reference.report().num_skipped_steps == 0


def all_zero(grad):
    grad.zero_()


def one_huge(grad):
    grad.view(-1)[3] = 1.5e19  # whose square is the largest power of ten float32 holds


def all_tiny(grad):
    grad.fill_(1e-40)  # a denormal


def one_tiny_alone(grad):
    grad.zero_()
    grad.view(-1)[3] = 1e-45  # the smallest


POISONS = [all_zero, one_huge, all_tiny, one_tiny_alone]


@pytest.mark.parametrize("poison", POISONS, ids=lambda poison: poison.__name__)
def test_no_poison_in_any_layer_at_any_step_leaves_anything_that_is_not_finite(case, poison):
    params = make_params()
    optimizer = case.build(params)
    for step in range(2 * len(params)):  # a refresh is at every third, each layer at two of them
        set_gradients(params, step)
        poison(params[step % len(params)][1].grad)
        optimizer.step()
        assert_finite(params, optimizer)
    for _, param in params:
        poison(param.grad)
    for _ in range(4):  # so that a refresh is among them
        optimizer.step()
        assert_finite(params, optimizer)
    before = weights_of(params)
    train(optimizer, params, range(4))
    assert_finite(params, optimizer)
    assert all(not torch.equal(weights_of(params)[name], before[name]) for name in before)


def assert_finite(params, optimizer):
    for name, param in params:
        assert bool(torch.isfinite(param).all()), name
        for key, value in optimizer.state[param].items():
            # Fira's limit on growth is infinite until there is something to grow from.
            if not (key == "residual_norm" and bool(torch.isposinf(value).all())):
                assert bool(torch.isfinite(torch.as_tensor(value)).all()), f"{name} {key}"


def test_a_broken_step_leaves_bfloat16_weights_and_their_rounding_alone(case):
    params = make_params(torch.bfloat16)
    optimizer = case.build(params)
    train(optimizer, params, range(2))
    weights, state = weights_of(params), state_snapshot(optimizer)
    set_gradients(params, 2)
    break_one(params, "wide", math.nan)
    optimizer.step()
    assert_same_bits(weights_of(params), weights)
    assert_same_state(state_snapshot(optimizer), state)


def test_the_number_of_skipped_steps_survives_resuming(case):
    params = make_params()
    optimizer = case.build(params)
    set_gradients(params, 0)
    break_one(params, "wide", math.nan)
    optimizer.step()
    resumed = case.build(make_params())
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.report().num_skipped_steps == 1


def test_a_broken_gradient_raises_on_request_and_names_the_parameter(case):
    params = make_params()
    optimizer = case.build(params, nonfinite="raise")
    train(optimizer, params, range(2))
    weights, state = weights_of(params), state_snapshot(optimizer)
    set_gradients(params, 2)
    break_one(params, "wide", math.inf)
    with pytest.raises(FloatingPointError, match="is inf, from wide; nothing was changed"):
        optimizer.step()
    assert_same_bits(weights_of(params), weights)
    assert_same_state(state_snapshot(optimizer), state)


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_in_the_step_scales_by_the_norm_as_torch_does(case, max_norm):
    params, expected = make_params(), make_params()
    optimizer = case.build(params, max_grad_norm=max_norm)
    reference = case.build(expected)
    for step in range(5):
        set_gradients(params, step)
        set_gradients(expected, step)
        optimizer.step()
        norm = optimizer.report().last_grad_norm
        weights = [param for _, param in expected]
        # Two sums of the same squares in different orders.
        assert norm == pytest.approx(
            float(torch.nn.utils.get_total_norm([param.grad for param in weights])), rel=1e-6
        )
        for param in weights:
            param.grad.mul_(min(1.0, max_norm / (norm + 1e-6)))
        reference.step()
    assert_same_bits(weights_of(params), weights_of(expected))


def test_without_need_no_norm_is_taken(case):
    params = make_params()
    optimizer = case.build(params, nonfinite="ignore")
    train(optimizer, params, range(1))
    assert optimizer.report().last_grad_norm is None
