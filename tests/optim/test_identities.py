"""AdaRankGrad is AdamW where its basis does nothing."""

from __future__ import annotations

import pytest
import torch

from adarankgrad import AdaRankGrad

from .gradient_streams import drifting_gradients

NEVER = 10**9
SHAPES = [(6, 6), (9, 5), (5, 9)]


def full_rank_options(**options):
    """A basis of all directions that is never replaced."""
    return {
        "max_rank": 1.0,
        "min_rank": 1.0,
        "energy": 1.0,
        "basis": "exact",
        "refresh_max_gap": NEVER,
        "refresh_norm": None,
        "refresh_relative_norm": None,
        "refresh_energy": None,
        "carry": "squared",
        "residual": "none",
        "scale": 1.0,
        **options,
    }


def run(optimizer, weight, gradients):
    for grad in gradients:
        weight.grad = grad.to(weight.dtype).contiguous()
        optimizer.step()
    return weight.detach().clone()


def rounding_tolerance(num_steps, lr, rank, dtype):
    """Each step has size lr·√rank at most an entry, and about twenty roundings stand behind it."""
    return 20 * num_steps * lr * rank**0.5 * torch.finfo(dtype).eps


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", ["short", "long"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_identity_basis_is_torchs_adamw(shape, side, dtype):
    """The first gradient is diagonal, so its singular vectors are the axes, up to their signs.

    On the long side a basis of short-side columns does not span everything; only a gradient that
    stays in the first rows (columns) is seen whole, so the others are zeroed.
    """
    short_side = min(shape)
    diagonal = torch.zeros(shape, dtype=torch.float64)
    diagonal[range(short_side), range(short_side)] = torch.arange(short_side, 0, -1.0).double()
    gradients = [diagonal, *drifting_gradients(*shape, 59)]
    if side == "long":
        for grad in gradients:
            grad[short_side:] = 0.0
            grad[:, short_side:] = 0.0
    start = torch.randn(shape, dtype=dtype)
    options = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}

    ours = torch.nn.Parameter(start.clone())
    optimizer = AdaRankGrad([ours], **options, **full_rank_options(side=side))
    torchs = torch.nn.Parameter(start.clone())
    adamw = torch.optim.AdamW([torchs], **options)
    result = run(optimizer, ours, gradients)
    expected = run(adamw, torchs, gradients)
    axes = optimizer.state[ours]["basis"][:short_side].abs()
    assert torch.equal(axes, torch.eye(short_side, dtype=dtype))
    assert optimizer.report().layers[0].num_refreshes == 1
    tolerance = rounding_tolerance(60, 0.01, short_side, dtype)
    torch.testing.assert_close(result, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("basis", ["exact", "randomized"])
def test_a_fixed_basis_of_full_rank_is_adamw_in_rotated_coordinates(shape, basis):
    """Rotate the weight and every gradient by the basis, run AdamW, rotate back."""
    gradients = list(drifting_gradients(*shape, 60))
    start = torch.randn(shape, dtype=torch.float64)
    options = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    ours = torch.nn.Parameter(start.clone())
    optimizer = AdaRankGrad([ours], **options, **full_rank_options(basis=basis))
    result = run(optimizer, ours, gradients)

    rotation = optimizer.state[ours]["basis"].mT
    is_right = shape[0] >= shape[1]

    def rotate(matrix):
        return matrix @ rotation.mT if is_right else rotation @ matrix

    rotated = torch.nn.Parameter(rotate(start))
    adamw = torch.optim.AdamW([rotated], **options)
    rotated_result = run(adamw, rotated, [rotate(grad) for grad in gradients])
    expected = rotated_result @ rotation if is_right else rotation.mT @ rotated_result
    # A basis orthonormal to tens of roundings δ moves each coordinate by δ; √v divides it out.
    tolerance = 100 * rounding_tolerance(60, 0.01, min(shape), torch.float64)
    torch.testing.assert_close(result, expected, rtol=0, atol=tolerance)
    plain = torch.nn.Parameter(start.clone())
    unrotated = run(torch.optim.AdamW([plain], **options), plain, gradients)
    assert (result - unrotated).abs().max() > 0.01  # Adam is not rotation-invariant


@pytest.mark.parametrize("carry", ["squared", "ldadam", "published"])
def test_at_full_rank_the_first_moment_is_exact_through_every_refresh(carry):
    """R is orthogonal then: the lifted first moment is the running mean of whole gradients."""
    weight = torch.nn.Parameter(torch.zeros(5, 8, dtype=torch.float64))
    options = full_rank_options(refresh_max_gap=7, carry=carry, betas=(0.9, 0.99))
    optimizer = AdaRankGrad([weight], lr=0.01, **options)
    mean = torch.zeros(5, 8, dtype=torch.float64)
    for grad in drifting_gradients(5, 8, 40):
        run(optimizer, weight, [grad])
        mean = 0.9 * mean + 0.1 * grad
        state = optimizer.state[weight]
        torch.testing.assert_close(state["basis"] @ state["exp_avg"], mean)
    assert optimizer.report().layers[0].num_refreshes == 6


def test_what_is_not_projected_is_torchs_adamw():
    """The same kernels in the same order: equal to the last bit."""
    gradients = [torch.randn(7, 3) for _ in range(20)]
    start = torch.randn(7, 3)
    options = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    ours, torchs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    result = run(AdaRankGrad([ours], project=False, **options), ours, gradients)
    assert torch.equal(result, run(torch.optim.AdamW([torchs], **options), torchs, gradients))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="Muon came with torch 2.9")
@pytest.mark.parametrize("shape", SHAPES)
def test_with_a_full_basis_an_orthogonalized_update_is_torchs_muon(shape):
    """Newton-Schulz commutes with rotations. Torch's runs in bfloat16, whose roundings of 2**-8 at
    random signs leave 0.4 % of the distance here; a momentum of 0.9 would leave 12 % or more.
    """
    gradients = list(drifting_gradients(*shape, 40))
    ours, torchs = (torch.nn.Parameter(torch.zeros(shape)) for _ in range(2))
    options = {"lr": 0.01, "weight_decay": 0.0}
    update = full_rank_options(update="orthogonalized", betas=(0.95, 0.0))
    muon = torch.optim.Muon(
        [torchs], momentum=0.95, nesterov=False, adjust_lr_fn="match_rms_adamw", **options
    )
    result = run(AdaRankGrad([ours], **options, **update), ours, gradients)
    expected = run(muon, torchs, gradients)
    distance = torch.linalg.vector_norm(result - expected) / torch.linalg.vector_norm(expected)
    assert distance < 0.02
