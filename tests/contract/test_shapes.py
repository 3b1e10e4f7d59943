"""Weights that are not plain matrices: convolutions, stacked experts, extreme sides."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

from .problems import (
    gradient,
    make_params,
    ranks_of,
    skip_where_rounded_at_random,
    skip_where_weights_depend_on_others,
    train,
    weights_of,
)

NUM_STEPS = 7


def matrix_gradients(name, shape):
    """Gradients of a weight whose axes after the first are flattened to columns."""
    return [gradient(name, (shape[0], torch.Size(shape[1:]).numel()), t) for t in range(NUM_STEPS)]


@pytest.mark.parametrize("shape", [(12, 5, 3), (8, 4, 3, 3), (20, 4, 2, 2), (10, 2, 3, 2, 2)])
def test_a_convolution_trains_like_its_flattened_matrix_bit_for_bit(case, shape):
    start = make_params(shapes={"kernel": (shape[0], torch.Size(shape[1:]).numel())})[0][1]
    kernel = Parameter(start.detach().clone().view(shape))
    matrix = Parameter(start.detach().clone())
    optimizer, reference = case.build([("kernel", kernel)]), case.build([("kernel", matrix)])
    for grad in matrix_gradients("kernel", shape):
        kernel.grad, matrix.grad = grad.clone().view(shape), grad.clone()
        optimizer.step()
        reference.step()
    assert torch.equal(kernel.view_as(matrix), matrix)
    assert ranks_of(optimizer) == ranks_of(reference)


@pytest.mark.parametrize("is_gradient_channels_last", [True, False])
def test_a_channels_last_convolution_trains_like_a_contiguous_one(case, is_gradient_channels_last):
    shape = (8, 4, 3, 3)
    plain = Parameter(gradient("start", shape, 0).clone())
    last = Parameter(plain.detach().clone(memory_format=torch.channels_last))
    optimizer, reference = case.build([("kernel", last)]), case.build([("kernel", plain)])
    for grad in matrix_gradients("kernel", shape):
        plain.grad = grad.clone().view(shape)
        last.grad = grad.clone().view(shape)
        if is_gradient_channels_last:
            last.grad = last.grad.contiguous(memory_format=torch.channels_last)
        optimizer.step()
        reference.step()
    assert last.is_contiguous(memory_format=torch.channels_last)
    # The gradient's memory order changes the order of sums: float32 rounding, 1e-4 of the steps.
    torch.testing.assert_close(last, plain, rtol=0, atol=NUM_STEPS * 0.01 * 1e-4)


@pytest.mark.parametrize("shape", [(3, 12, 8), (2, 8, 12), (4, 10, 10)])
def test_stacked_experts_train_like_the_same_matrices_apart(case, shape):
    # One rank for all, found exactly: a stack draws one sketch where matrices draw their own. It
    # also decides as one when to refresh, which is not what is compared.
    same = {"min_rank": 4, "max_rank": 4, "basis": "exact"}
    same.update(refresh_energy=None, refresh_relative_norm=None, refresh_norm=None)
    experts = Parameter(gradient("start", shape, 0).clone())
    apart = [Parameter(expert.clone()) for expert in experts.detach()]
    stack = case.build([{"params": [("experts", experts)], "stacked": True}], **same)
    skip_where_weights_depend_on_others(stack)
    skip_where_rounded_at_random(stack)
    singles = case.build([(f"expert {i}", expert) for i, expert in enumerate(apart)], **same)
    for step in range(NUM_STEPS):
        grad = gradient("experts", shape, step) + gradient("more", shape, step, "x")
        experts.grad = grad.clone()
        for expert, expert_grad in zip(apart, grad, strict=True):
            expert.grad = expert_grad.clone()
        stack.step()
        singles.step()
    rank = 4 if case.has_basis else 0
    assert ranks_of(stack) == [rank]
    assert ranks_of(singles) == [rank] * shape[0]
    # The same operations in a batch: float32 rounding, amplified at most to 1e-4 of the steps.
    torch.testing.assert_close(
        experts.detach(),
        torch.stack([expert.detach() for expert in apart]),
        rtol=0,
        atol=NUM_STEPS * 0.01 * 1e-4,
    )


@pytest.mark.parametrize("shape", [(2, 2), (2, 50), (50, 2), (3, 3)])
def test_matrices_smaller_than_the_ceiling_are_trained(case, shape):
    params = make_params(shapes={"small": shape})
    before = weights_of(params)
    optimizer = case.build(params, max_rank=64, min_rank=64)
    train(optimizer, params, range(NUM_STEPS))
    assert ranks_of(optimizer) == [min(shape) if case.has_basis else 0]
    assert torch.isfinite(params[0][1]).all()
    assert not torch.equal(params[0][1], before["small"])


def test_a_weight_that_is_a_transposed_view_trains_like_its_own_copy(case):
    start = gradient("start", (20, 12), 0)
    view = Parameter(start.clone().mT)
    copy = Parameter(start.mT.contiguous())
    assert not view.is_contiguous()
    optimizer, reference = case.build([("weight", view)]), case.build([("weight", copy)])
    for step in range(NUM_STEPS):
        grad = gradient("weight", (12, 20), step)
        view.grad, copy.grad = grad.clone(), grad.clone()
        optimizer.step()
        reference.step()
    # Only the last product is laid out otherwise: rounding of a weight of order 1, each step.
    torch.testing.assert_close(view, copy, rtol=0, atol=NUM_STEPS * 4 * 1.2e-7 * 4)
