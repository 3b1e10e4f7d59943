"""AdaRankGrad is AdamW where its basis does nothing, and GaLore where its choices are GaLore's."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types

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


@pytest.fixture
def galore_adamw(monkeypatch):
    """The ``AdamW`` of the galore-torch package, without its __init__, which needs bitsandbytes."""
    spec = importlib.util.find_spec("galore_torch")
    if spec is None:
        pytest.skip("the galore-torch package, the oracle of this test, is not installed")
    pytest.importorskip("transformers", reason="galore-torch imports transformers")
    before = {name for name in sys.modules if name.partition(".")[0] == "galore_torch"}
    package = types.ModuleType("galore_torch")
    package.__path__ = list(spec.submodule_search_locations)
    monkeypatch.setitem(sys.modules, "galore_torch", package)
    yield importlib.import_module("galore_torch.adamw").AdamW
    for name in [name for name in sys.modules if name.startswith("galore_torch.")]:
        if name not in before:
            del sys.modules[name]


@pytest.mark.parametrize("shape", [(24, 10), (10, 24), (12, 12)])
@pytest.mark.parametrize(("side", "proj_type"), [("short", "std"), ("long", "reverse_std")])
def test_fixed_rank_with_kept_moments_is_galore(galore_adamw, shape, side, proj_type):
    """70 steps over refreshes at 0, 15, 30, 45 and 60, float32, where GaLore decomposes.

    GaLore adds eps to the uncorrected root, hence an eps that neither side notices; its ``scale``
    is ours. For the long side of a square matrix GaLore's code puts the basis on the left, as we
    do. Both decompose the same stored matrix, so even the signs of the bases agree.
    """
    rank, gap, lr, scale, num_steps = 4, 15, 0.01, 0.25, 70
    gradients = list(drifting_gradients(*shape, num_steps))
    start = torch.randn(shape)
    theirs = torch.nn.Parameter(start.clone())
    galore = galore_adamw(
        [
            {
                "params": [theirs],
                "rank": rank,
                "update_proj_gap": gap,
                "scale": scale,
                "proj_type": proj_type,
            }
        ],
        lr=lr,
        eps=1e-30,
        weight_decay=0.0,
        no_deprecation_warning=True,
    )
    ours = torch.nn.Parameter(start.clone())
    options = full_rank_options(
        max_rank=rank, min_rank=rank, refresh_max_gap=gap, carry="keep", scale=scale, side=side
    )
    optimizer = AdaRankGrad([ours], lr=lr, eps=1e-30, weight_decay=0.0, **options)
    for grad in gradients:
        expected = run(galore, theirs, [grad])
        result = run(optimizer, ours, [grad])
    report = optimizer.report().layers[0]
    assert (report.rank, report.num_refreshes) == (rank, 5)
    tolerance = rounding_tolerance(num_steps, lr * scale, rank, torch.float32)
    # Weights of size one round at every step as well: half a unit each, on both sides.
    tolerance += num_steps * torch.finfo(torch.float32).eps * start.abs().max().item()
    torch.testing.assert_close(result, expected, rtol=0, atol=tolerance)
    assert (result - start).abs().max() > 1000 * tolerance


@pytest.mark.parametrize("carry", ["squared", "ldadam", "published", "reset"])
def test_every_other_carry_is_not_galore(galore_adamw, carry):
    """The comparison above can tell: with carried moments the weights part at the first refresh."""
    gradients = list(drifting_gradients(10, 24, 40))
    start = torch.randn(10, 24)
    theirs, ours = (torch.nn.Parameter(start.clone()) for _ in range(2))
    group = {"params": [theirs], "rank": 4, "update_proj_gap": 15, "scale": 1.0, "proj_type": "std"}
    galore = galore_adamw([group], lr=0.01, eps=1e-30, no_deprecation_warning=True)
    options = full_rank_options(max_rank=4, min_rank=4, refresh_max_gap=15, carry=carry)
    optimizer = AdaRankGrad([ours], lr=0.01, eps=1e-30, **options)
    before = [run(galore, theirs, gradients[:15]), run(optimizer, ours, gradients[:15])]
    torch.testing.assert_close(*before, rtol=0, atol=1e-4)
    after = [run(galore, theirs, gradients[15:]), run(optimizer, ours, gradients[15:])]
    assert (after[0] - after[1]).abs().max() > 0.01
