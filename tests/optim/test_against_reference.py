"""The optimizer against the float64 reference, step by step, through refreshes and rank changes."""

from __future__ import annotations

import itertools

import pytest
import torch

from adarankgrad import AdaRankGrad
from adarankgrad.core.refresh import RefreshReason
from adarankgrad.reference import adarankgrad as reference

from .gradient_streams import drifting_gradients

SIDES = {"short": "std", "long": "reverse_std", "left": "left", "right": "right"}
CARRIES = ["squared", "ldadam", "published", "keep", "reset"]
# The other two depend on the signs that a decomposition happens to give the basis.
SIGN_BLIND_CARRIES = ["squared", "ldadam", "reset"]
NUM_STEPS = 80
LR = 0.01

COMMON = {"lr": LR, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1, "scale": 0.5}


def build_pair(
    weight,
    *,
    carry="squared",
    side="short",
    per_direction=True,
    basis="exact",
    update="adam",
    residual_scale=0.0,
    **options,
):
    """The optimizer on a copy of the weight, and the reference on another, option for option."""
    chosen = {
        "max_rank": 5,
        "min_rank": 1,
        "energy": 0.9,
        "monotone": False,
        "rank_multiple": 1,
        "refresh_max_gap": 9,
        "refresh_min_gap": 1,
        "refresh_norm": None,
        "refresh_relative_norm": None,
        "refresh_energy": None,
        **options,
    }
    param = torch.nn.Parameter(weight.clone())
    optimizer = AdaRankGrad(
        [param],
        **COMMON,
        **chosen,
        carry=carry,
        side=side,
        basis=basis,
        bias_correction="per_direction" if per_direction else "global",
        update=update,
        residual="orthogonalized" if residual_scale else "none",
        residual_scale=residual_scale,
        oversampling=4,
        power_iterations=1,
        warm_start=True,
        seed=3,
    )
    oracle = reference.AdaRankGrad(
        weight,
        eta=COMMON["lr"],
        beta1=COMMON["betas"][0],
        beta2=COMMON["betas"][1],
        epsilon=COMMON["eps"],
        weight_decay=COMMON["weight_decay"],
        alpha=COMMON["scale"],
        r_max=chosen["max_rank"],
        r_min=chosen["min_rank"],
        gamma=chosen["energy"],
        monotone=chosen["monotone"],
        rank_multiple=chosen["rank_multiple"],
        side=SIDES[side],
        max_gap=chosen["refresh_max_gap"],
        min_gap=chosen["refresh_min_gap"],
        sigma_abs=chosen["refresh_norm"],
        sigma_rel=chosen["refresh_relative_norm"],
        tau=chosen["refresh_energy"],
        second_moment=carry,
        per_direction=per_direction,
        orthogonal=update == "orthogonalized",
        rho=residual_scale,
    )
    return param, optimizer, oracle


def step_both(param, optimizer, oracle, grad, *, hand_over_basis):
    """One step of each; the reference searches for itself or takes the optimizer's basis."""
    param.grad = grad.to(param.dtype)
    optimizer.step()
    basis = optimizer.state[param]["basis"].double() if hand_over_basis else None
    oracle.step(param.grad.double(), basis)


def assert_same_decisions(state, oracle):
    assert state["basis"].shape[-1] == oracle.r
    assert state["num_refreshes"] == oracle.refreshes
    assert state["num_skipped_refreshes"] == oracle.skipped
    assert state["steps_since_refresh"] == oracle.since
    assert RefreshReason(state["refresh_reason"]).name.lower() == oracle.reason
    assert state["step"] == oracle.t


def weight_difference(param, oracle):
    return (param.detach().double() - oracle.W).abs().max().item()


def float64_tolerance(num_steps=NUM_STEPS):
    """Directions of order √5, an lr each; roundings times a conditioning of 10³ at most.

    The conditioning is that of singular vectors (1/gap, here above 10⁻² of the norm) and of the
    published carry's cancellation in R v.
    """
    return num_steps * LR * 5**0.5 * 1e3 * 20 * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (8, 8)])
@pytest.mark.parametrize("side", list(SIDES))
@pytest.mark.parametrize("carry", SIGN_BLIND_CARRIES)
def test_with_exact_bases_it_is_the_reference_for_every_carry_and_side(shape, side, carry):
    """The reference searches, selects, carries and steps on its own."""
    pair = build_pair(torch.randn(shape, dtype=torch.float64), carry=carry, side=side)
    param, optimizer, oracle = pair
    ranks = set()
    for grad in drifting_gradients(*shape, NUM_STEPS):
        step_both(*pair, grad, hand_over_basis=False)
        assert_same_decisions(optimizer.state[param], oracle)
        ranks.add(oracle.r)
    assert len(ranks) >= 3  # the carry was rectangular, growing and shrinking
    assert weight_difference(param, oracle) < float64_tolerance()
    moments = optimizer.state[param]
    signs = (oracle.Q * moments["basis"]).sum(0).sign().unsqueeze(-1)
    torch.testing.assert_close(moments["exp_avg"], signs * oracle.M, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(moments["exp_avg_sq"], oracle.V, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
@pytest.mark.parametrize("side", ["short", "long"])
@pytest.mark.parametrize("per_direction", [True, False])
@pytest.mark.parametrize("carry", CARRIES)
@pytest.mark.parametrize("basis", ["randomized", "exact"])
def test_with_its_bases_handed_over_it_is_the_reference(shape, side, per_direction, carry, basis):
    """Warm-started sketches; the reference takes each basis and does everything else itself."""
    weight = torch.randn(shape, dtype=torch.float64)
    pair = build_pair(weight, carry=carry, side=side, per_direction=per_direction, basis=basis)
    param, optimizer, oracle = pair
    for grad in drifting_gradients(*shape, NUM_STEPS):
        step_both(*pair, grad, hand_over_basis=True)
        assert_same_decisions(optimizer.state[param], oracle)
    assert oracle.refreshes >= 8
    assert weight_difference(param, oracle) < float64_tolerance()


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (8, 8)])
@pytest.mark.parametrize("side", ["short", "long"])
def test_with_an_orthogonalized_residual_it_is_the_reference(shape, side):
    """Newton-Schulz raises what is small: 3.4445 a round, five rounds, is a slope of 485."""
    pair = build_pair(torch.randn(shape, dtype=torch.float64), side=side, residual_scale=2.0)
    param, _, oracle = pair
    for grad in drifting_gradients(*shape, NUM_STEPS):
        step_both(*pair, grad, hand_over_basis=True)
    assert weight_difference(param, oracle) < 485 * float64_tolerance()


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (8, 8)])
@pytest.mark.parametrize("side", ["short", "long"])
@pytest.mark.parametrize("residual_scale", [0.0, 2.0])
def test_with_an_orthogonalized_update_it_is_the_reference(shape, side, residual_scale):
    """The slope of Newton-Schulz, as above, once for the first moment and once for the residual."""
    pair = build_pair(
        torch.randn(shape, dtype=torch.float64),
        side=side,
        update="orthogonalized",
        residual_scale=residual_scale,
    )
    param, optimizer, oracle = pair
    for grad in drifting_gradients(*shape, NUM_STEPS):
        step_both(*pair, grad, hand_over_basis=True)
        assert_same_decisions(optimizer.state[param], oracle)
    assert optimizer.state[param]["exp_avg_sq"].numel() == 0
    assert weight_difference(param, oracle) < 2 * 485 * float64_tolerance()


@pytest.mark.parametrize("carry", CARRIES)
@pytest.mark.parametrize("side", ["short", "long"])
def test_in_float32_it_follows_the_reference_to_float32_rounding(side, carry):
    """A coordinate is a sum of 12 products, off by √12 roundings of ‖g‖, which weak directions
    feel about ten times; twenty operations behind a direction, √5 of them in a weight, an lr
    each; the weight rounds once a step.
    """
    weight = torch.randn(12, 7)
    pair = build_pair(weight, carry=carry, side=side, basis="randomized")
    param, optimizer, oracle = pair
    for grad in drifting_gradients(12, 7, NUM_STEPS):
        step_both(*pair, grad, hand_over_basis=True)
        assert_same_decisions(optimizer.state[param], oracle)
    rounding = torch.finfo(torch.float32).eps
    per_step = COMMON["scale"] * LR * 5**0.5 * 10 * 12**0.5 * 20 * rounding
    tolerance = NUM_STEPS * (per_step + rounding / 2 * weight.abs().max().item())
    assert 0 < weight_difference(param, oracle) < tolerance


@pytest.mark.parametrize(
    "options",
    [
        {"monotone": True},
        {"rank_multiple": 2},
        {"min_rank": 3},
        {"energy": 1.0},
        {"energy": 0.3},
        {"refresh_max_gap": 1},
        {"refresh_max_gap": 1000, "refresh_energy": 0.85},
        {"refresh_max_gap": 1000, "refresh_energy": 0.95, "refresh_min_gap": 4},
        {"refresh_max_gap": 1000, "refresh_relative_norm": 0.7},
        {"refresh_max_gap": 1000, "refresh_norm": 1.2},
        {"refresh_max_gap": 11, "refresh_norm": 1.2, "refresh_energy": 0.8, "refresh_min_gap": 3},
    ],
    ids=str,
)
def test_rank_and_refresh_options_decide_as_in_the_reference(options):
    pair = build_pair(torch.randn(9, 14, dtype=torch.float64), **options)
    param, optimizer, oracle = pair
    for grad in drifting_gradients(9, 14, NUM_STEPS):
        step_both(*pair, grad, hand_over_basis=False)
        assert_same_decisions(optimizer.state[param], oracle)
    assert oracle.refreshes >= 2 or "refresh_norm" in options
    assert weight_difference(param, oracle) < float64_tolerance()


def test_zero_and_broken_gradients_put_a_refresh_off_in_both():
    """Zero first (no basis yet), then zero when a refresh is due."""
    pair = build_pair(torch.randn(9, 6, dtype=torch.float64), refresh_max_gap=3)
    param, optimizer, oracle = pair
    gradients = list(drifting_gradients(9, 6, 12))
    for index in (0, 1, 5, 6, 10):
        gradients[index] = torch.zeros(9, 6, dtype=torch.float64)
    for grad in gradients:
        step_both(*pair, grad, hand_over_basis=False)
        assert_same_decisions(optimizer.state[param], oracle)
    assert oracle.skipped >= 3
    assert weight_difference(param, oracle) < float64_tolerance()


def test_it_follows_the_reference_when_the_gradient_answers_to_the_weight():
    """A quadratic: differences in the weight come back through the gradient, and stay small."""
    target = torch.randn(10, 7, dtype=torch.float64)
    curvature = torch.diag(torch.logspace(0, -1, 10, dtype=torch.float64))
    pair = build_pair(torch.zeros(10, 7, dtype=torch.float64), basis="randomized")
    param, optimizer, oracle = pair
    for _ in range(NUM_STEPS):
        ours = param.detach()
        param.grad = curvature @ (ours - target)
        grad = curvature @ (oracle.W - target)
        optimizer.step()
        oracle.step(grad, optimizer.state[param]["basis"])
        assert_same_decisions(optimizer.state[param], oracle)
    assert weight_difference(param, oracle) < float64_tolerance()


def test_the_randomized_search_captures_what_the_references_does():
    """Two randomized searches of one method: ranks and captured energy agree on average."""
    shape = (30, 20)
    shares = {}
    for name in ("ours", "reference"):
        shares[name] = []
        generator = torch.Generator().manual_seed(1)
        oracle = reference.AdaRankGrad(
            torch.zeros(shape), eta=LR, r_max=8, gamma=0.9, generator=generator, max_gap=1
        )
        param = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        optimizer = AdaRankGrad(
            [param],
            lr=LR,
            max_rank=8,
            min_rank=1,
            energy=0.9,
            basis="randomized",
            oversampling=8,
            power_iterations=2,
            warm_start=False,
            refresh_max_gap=1,
        )
        for grad in drifting_gradients(*shape, 40):
            if name == "ours":
                param.grad = grad
                optimizer.step()
                layer = optimizer.report().layers[0]
                shares[name].append((layer.rank, layer.captured_energy))
            else:
                oracle.step(grad)
                energy = oracle.energy_at_refresh / grad.square().sum().item()
                shares[name].append((oracle.r, energy))
    means = {name: torch.tensor(values).mean(0) for name, values in shares.items()}
    assert (means["ours"] - means["reference"]).abs()[0] < 0.1  # ranks
    assert (means["ours"] - means["reference"]).abs()[1] < 0.005


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_bases_of_every_rank_are_reached_and_left(shape):
    """Ranks are read off the state over one stream whose strong directions come and go."""
    param, optimizer, oracle = build_pair(
        torch.randn(shape, dtype=torch.float64), max_rank=4, energy=0.97, refresh_max_gap=2
    )
    ranks = []
    for grad in drifting_gradients(*shape, 60, noise=0.01):
        step_both(param, optimizer, oracle, grad, hand_over_basis=False)
        ranks.append(optimizer.state[param]["basis"].shape[-1])
    steps = {later - earlier for earlier, later in itertools.pairwise(ranks)}
    assert min(steps) < 0 < max(steps)
    assert weight_difference(param, oracle) < float64_tolerance()
