"""GaLore and Fira against their float64 references, through refreshes."""

from __future__ import annotations

import pytest
import torch

from adarankgrad import AdaRankGrad, Fira, GaLore
from adarankgrad.reference.fira import Fira as FiraReference
from adarankgrad.reference.galore import GaLore as GaLoreReference

from .gradient_streams import drifting_gradients

SHAPES = [(12, 7), (7, 12), (8, 8)]
RANK, GAP, NUM_STEPS, LR = 3, 9, 60, 0.01
BUILDERS = {
    "galore": (GaLore, GaLoreReference, {}, {}),
    "fira": (Fira, FiraReference, {}, {}),
    "fira-official": (Fira, FiraReference, {"residual": "official"}, {"is_official": True}),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", BUILDERS)
def test_it_is_the_reference_in_float64(shape, method):
    """Steps without gradient and tenfold gradients included, which only Fira's limiter notices."""
    build, build_reference, options, settings = BUILDERS[method]
    weight = torch.randn(shape, dtype=torch.float64)
    param = torch.nn.Parameter(weight.clone())
    common = {"scale": 0.25, "eps": 1e-4, "weight_decay": 0.1, "betas": (0.9, 0.98)}
    optimizer = build([param], LR, rank=RANK, refresh_every=GAP, **common, **options)
    oracle = build_reference(
        weight,
        eta=LR,
        r=RANK,
        T=GAP,
        alpha=0.25,
        epsilon=1e-4,
        weight_decay=0.1,
        beta1=0.9,
        beta2=0.98,
        **settings,
    )
    for step, grad in enumerate(drifting_gradients(*shape, NUM_STEPS)):
        grad = grad * {13: 0.0, 14: 0.0, 22: 10.0}.get(step, 1.0)
        param.grad = grad.clone()
        optimizer.step()
        expected = oracle.step(grad)
        # Roundings of the steps so far, each of size lr·√r, through bases whose singular values
        # are a hundredth of the norm apart: a conditioning of 10³ with the lift's.
        allowed = (step + 1) * LR * RANK**0.5 * 20 * 1e3 * torch.finfo(torch.float64).eps
        torch.testing.assert_close(param.detach(), expected, rtol=0, atol=allowed)
    assert (param.detach() - weight).abs().max() > 0.05


def test_at_full_rank_nothing_of_a_gradient_is_outside_the_papers_basis():
    """And the code's residual, at a scale of a quarter, is three quarters of the gradient."""
    norms = {}
    for residual in ("paper", "official"):
        param = torch.nn.Parameter(torch.zeros(5, 8, dtype=torch.float64))
        optimizer = Fira([param], LR, rank=1.0, scale=0.25, residual=residual)
        for grad in drifting_gradients(5, 8, 10):
            param.grad = grad.clone()
            optimizer.step()
        norms[residual] = optimizer.state[param]["residual_norm"].item()
    assert norms["paper"] < 1e-12
    assert norms["official"] > 0.1


@pytest.mark.parametrize("residual", ["fira", "fira_official", "normalized", "orthogonalized"])
def test_the_residual_step_is_proportional_to_its_scale(residual):
    """Of one first step, the part that the scale multiplies."""
    gradient = torch.randn(10, 14, dtype=torch.float64)
    moved = []
    for residual_scale in (0.0, 0.5, 1.0):
        param = torch.nn.Parameter(torch.zeros(10, 14, dtype=torch.float64))
        options = {"max_rank": 3, "residual": residual, "residual_scale": residual_scale}
        optimizer = AdaRankGrad([param], lr=1.0, **options)
        param.grad = gradient.clone()
        optimizer.step()
        moved.append(param.detach())
    torch.testing.assert_close(moved[1] - moved[0], (moved[2] - moved[0]) / 2)
    assert (moved[2] - moved[0]).norm() > 0.1


@pytest.mark.parametrize("build", [GaLore, Fira])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be an int of at least 1"),
        ({"rank": 1.5}, "rank must be .* got 1.5"),
        ({"refresh_every": 0}, "refresh_every must be an int of at least 1, got 0"),
        ({"scale": -1.0}, "scale must be at least 0"),
        ({"adam_convention": "jax"}, "adam_convention must be one of torch, transformers"),
    ],
)
def test_bad_options_are_named(build, options, message):
    with pytest.raises(ValueError, match=message):
        build([torch.nn.Parameter(torch.zeros(4, 4))], **options)
    groups = [{"params": [torch.nn.Parameter(torch.zeros(4, 4))], **options}]
    with pytest.raises(ValueError, match=message):
        build(groups)


def test_a_group_speaks_the_methods_own_words():
    weights = [torch.nn.Parameter(torch.zeros(8, 8)) for _ in range(2)]
    groups = [{"params": weights[:1], "rank": 2, "refresh_every": 5}, {"params": weights[1:]}]
    optimizer = GaLore(groups, rank=3)
    assert [group["max_rank"] for group in optimizer.param_groups] == [2, 3]
    assert [group["min_rank"] for group in optimizer.param_groups] == [2, 3]
    assert [group["refresh_max_gap"] for group in optimizer.param_groups] == [5, 200]
    with pytest.raises(ValueError, match="unknown option energy.*known are .*rank"):
        GaLore([{"params": weights, "energy": 0.9}])
    with pytest.raises(ValueError, match="residual must be one of paper, official, got 'fira'"):
        Fira(weights, residual="fira")


def test_own_words_in_a_group_of_an_optimizer_are_refused_not_ignored():
    group = Fira([torch.nn.Parameter(torch.zeros(8, 8))], rank=2).param_groups[0]
    with pytest.raises(ValueError, match="unknown option"):
        Fira([{**group, "rank": 5}])


def test_a_residual_set_later_that_is_none_is_refused_at_the_step():
    weight = torch.nn.Parameter(torch.zeros(8, 8))
    optimizer = Fira([weight], rank=2)
    optimizer.param_groups[0]["residual"] = "official"
    weight.grad = torch.randn(8, 8)
    with pytest.raises(ValueError, match="residual must be one of none, fira.* got 'official'"):
        optimizer.step()
    with pytest.raises(ValueError, match="residual must be one of paper, official"):
        Fira([weight], residual=["paper"])


@pytest.mark.parametrize("build", [GaLore, Fira])
def test_a_gradient_of_zero_puts_a_refresh_off_by_a_step(build):
    """What the packages decompose and we do not."""
    weight = torch.nn.Parameter(torch.randn(6, 9))
    optimizer = build([weight], rank=2, refresh_every=3)
    for size in (0.0, 1.0, 1.0, 1.0, 0.0, 1.0):
        weight.grad = size * torch.randn(6, 9)
        optimizer.step()
    layer = optimizer.report().layers[0]
    assert (layer.num_refreshes, layer.num_skipped_refreshes) == (2, 2)


def test_groups_of_an_optimizer_build_another_like_it():
    weight = torch.nn.Parameter(torch.zeros(8, 8))
    first = Fira([weight], rank=2, residual="official")
    second = Fira(first.param_groups)
    assert second.param_groups[0]["residual"] == "fira_official"
    assert second.param_groups[0]["max_rank"] == 2
