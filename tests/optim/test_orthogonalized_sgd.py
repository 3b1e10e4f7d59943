"""The control without state: Muon's step on the bare gradient."""

import math

import pytest
import torch
from torch import nn

from adarankgrad import AdaRankGrad, OrthogonalizedSGD, describe


def weight_with_gradient(rows=12, columns=20):
    generator = torch.Generator().manual_seed(5)
    weight = nn.Parameter(torch.randn(rows, columns, generator=generator))
    weight.grad = torch.randn(rows, columns, generator=generator)
    return weight


def test_a_step_raises_all_singular_values_to_one_and_scales_them_to_adams_size():
    weight = weight_with_gradient()
    before = weight.detach().clone()
    OrthogonalizedSGD([weight], lr=0.1, scale=2.0).step()
    step = (before - weight.detach()) / (0.1 * 2.0 * 0.2 * math.sqrt(20))
    # Newton-Schulz leaves them in [0.67, 1.21] where they start above a hundredth of the norm.
    values = torch.linalg.svdvals(step)
    assert 0.66 < values.min() and values.max() < 1.22
    left, _, right = torch.linalg.svd(weight.grad, full_matrices=False)
    cosine = torch.sum(step * (left @ right)) / (step.norm() * (left @ right).norm())
    assert cosine > 0.97  # same singular vectors, values within a fifth of one


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon yet")
def test_it_is_torchs_muon_without_momentum():
    ours, theirs = weight_with_gradient(), weight_with_gradient()
    OrthogonalizedSGD([ours], lr=0.1, weight_decay=0.3).step()
    torch.optim.Muon(
        [theirs], lr=0.1, momentum=0.0, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"
    ).step()
    # Torch iterates in bfloat16, whose roundings of 2^-8 the five rounds amplify a few times.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.1 * 0.2 * math.sqrt(20) * 0.05)


def test_a_matrix_has_no_state_and_a_report_says_so():
    weight = weight_with_gradient()
    optimizer = OrthogonalizedSGD([weight])
    optimizer.step()
    layer = optimizer.report().layers[0]
    assert (layer.rank, layer.max_rank, layer.state_bytes) == (0, 0, 0)
    assert "at most 0.00 MiB of state, 0% of AdamW's" in describe(optimizer)


def test_zero_gradients_move_nothing():
    weight = weight_with_gradient()
    before = weight.detach().clone()
    weight.grad.zero_()
    OrthogonalizedSGD([weight]).step()
    assert torch.equal(weight, before)


def test_it_is_adarankgrad_without_a_basis():
    ours, control = weight_with_gradient(), weight_with_gradient()
    AdaRankGrad([ours], lr=0.1, basis="none", residual_scale=1.0).step()
    OrthogonalizedSGD([control], lr=0.1).step()
    assert torch.equal(ours, control)
