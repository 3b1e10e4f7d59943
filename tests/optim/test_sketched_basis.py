"""``basis="sketched"``: bases from linear measurements of two gradients, one step apart."""

from __future__ import annotations

import pytest
import torch

from adarankgrad import AdaRankGrad
from adarankgrad.core.projection import layout_of

from .gradient_streams import drifting_gradients

GAP = 5
OPTIONS = {
    "lr": 0.01,
    "basis": "sketched",
    "max_rank": 6,
    "min_rank": 1,
    "energy": 0.7,
    "refresh_max_gap": GAP,
    "oversampling": 2,
    "residual": "none",
}


def run(gradients, *, shape=(12, 9), **options):
    """Train on the gradients; yields the state after every step."""
    weight = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = AdaRankGrad([weight], **{**OPTIONS, **options})
    for grad in gradients:
        weight.grad = grad.clone()
        optimizer.step()
        yield optimizer.state[weight]


@pytest.mark.parametrize("shape", [(12, 9), (9, 12)])
@pytest.mark.parametrize("max_gap", [1, 2, GAP])
def test_bases_are_replaced_at_the_maximum_gap_after_a_sketch_a_step_earlier(shape, max_gap):
    gradients = drifting_gradients(*shape, 20)
    counts, sketched = zip(
        *(
            (state["num_refreshes"], state["sketch"].shape[-1] > 0)
            for state in run(gradients, shape=shape, refresh_max_gap=max_gap)
        ),
        strict=True,
    )
    assert list(counts) == [0, *(1 + step // max_gap for step in range(19))]
    assert list(sketched) == [step % max_gap == 0 for step in range(20)]


@pytest.mark.parametrize("shape", [(12, 9), (9, 12)])
def test_range_comes_from_one_gradient_and_rank_and_coordinates_from_the_next(shape):
    """By hand: the second gradient inside the range of the first, its strongest directions."""
    first, second = list(drifting_gradients(*shape, 2))
    matrices = [layout_of(first.shape).view(grad) for grad in (first, second)]
    states = list(run([first, second], shape=shape, energy=0.5, oversampling=0))
    basis = states[1]["basis"]
    assert states[1]["num_refreshes"] == 1
    assert 1 <= basis.shape[-1] <= 6
    # A sketch of six random columns: its span lies in that of the first gradient's columns.
    first_left = torch.linalg.svd(matrices[0], full_matrices=False).U
    torch.testing.assert_close(first_left @ (first_left.mT @ basis), basis, rtol=0, atol=1e-10)
    coords = basis.mT @ matrices[1]
    torch.testing.assert_close(states[1]["exp_avg"], 0.1 * coords, rtol=0, atol=1e-12)
    # Principal directions: rows of the coordinates are orthogonal, and strongest first.
    gram = coords @ coords.mT
    torch.testing.assert_close(gram, torch.diag(gram.diagonal()), rtol=0, atol=1e-10)
    assert (gram.diagonal().diff() <= 1e-12).all()


def test_noise_of_one_minibatch_does_not_raise_the_rank_of_the_next():
    """Rank-2 signal and as much noise, d = 40: what a search in one gradient finds there is gone.

    Of the noise's energy, the six strongest directions of one gradient hold 35 %, and random ones
    6 of 40 = 15 % of the next.
    """
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(40, 2, generator=generator).double() for _ in range(2))
    signal = left @ right.mT
    gradients = []
    for _ in range(2):
        noise = torch.randn(40, 40, generator=generator).double()
        gradients.append(signal + noise * signal.norm() / noise.norm())
    captured = {}
    for basis in ("randomized", "sketched"):
        options = {"basis": basis, "energy": 1.0, "min_rank": 6, "warm_start": False}
        *_, state = run(gradients, shape=(40, 40), refresh_max_gap=1, **options)
        captured[basis] = state["captured_energy"]
    assert captured["randomized"] > 0.5 + 0.5 * 0.25
    assert captured["sketched"] < 0.5 + 0.5 * 0.25


def test_a_criterion_takes_effect_two_steps_later():
    gradients = list(drifting_gradients(12, 9, 12))
    for grad in gradients[6:]:
        grad *= 1e-3
    counts = [
        state["num_refreshes"]
        for state in run(gradients, refresh_max_gap=100, refresh_min_gap=1, refresh_norm=0.1)
    ]
    # Small from the seventh step on, which notes it; the eighth sketches, the ninth refreshes.
    assert counts[:8] == [0] + [1] * 7
    assert counts[8] == 2


def test_captured_energy_is_that_of_the_second_gradient_as_estimated_by_probes():
    """Within three standard deviations of the probes' estimate, 1/√(4·6) of what lies outside."""
    gradients = list(drifting_gradients(12, 9, 2))
    *_, state = run(gradients, energy=0.5)
    matrix = layout_of(gradients[1].shape).view(gradients[1])
    total = matrix.square().sum().item()
    inside = (state["basis"].mT @ matrix).square().sum().item()
    outside = total - inside
    slack = 3 * outside / (4 * 2) ** 0.5
    assert inside / (total + slack) <= state["captured_energy"] <= inside / (total - slack)
