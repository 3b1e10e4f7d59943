"""Moments and bases in bfloat16 and int8: they follow those in float32, and survive saving."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from adarankgrad import AdaRankGrad, describe
from adarankgrad.core.quantize import UNSIGNED, num_blocks
from adarankgrad.core.rounding import round_stochastically
from adarankgrad.optim.stored_state import forms_of, read, stored

COMPACT = ["bfloat16", "int8"]
SLOW_STEPS = 600
BETAS = (0.9, 0.999)


def vector_with_squares(num_values=16 * 256):
    """Gradients whose roots span four decades, with the largest of each block at 1."""
    gradient = torch.logspace(-2, 0, 256).repeat(num_values // 256)
    return gradient * (1 - 2 * (torch.arange(num_values) % 2))


def second_moment(optimizer, param):
    form = optimizer.defaults["state_dtype"]
    state = optimizer.state[param]
    return (
        state["exp_avg_sq"] if form == "float32" else read(state, "exp_avg_sq", form, torch.float32)
    )


def train_vector(gradients, **options):
    param = nn.Parameter(torch.zeros(gradients[0].shape))
    optimizer = AdaRankGrad([("vector", param)], betas=BETAS, **options)
    for gradient in gradients:
        param.grad = gradient
        optimizer.step()
    return optimizer, param


def gap_of(form, value, largest):
    """Between neighbours of a second moment, at most (`tests.core.test_quantize`)."""
    if form == "bfloat16":
        return value * 2**-7
    share = value / largest
    return largest * 4 * (share**0.25 + 1 / UNSIGNED.levels) ** 3 / UNSIGNED.levels


GRADIENTS = {
    # Moments rise from zero to 45 % of the gradient's square, by 0.1 % of the way a step.
    "constant": [vector_with_squares()] * SLOW_STEPS,
    # Then they fall by 0.1 % of themselves a step, but for one of each block that stays.
    "decaying": [vector_with_squares()] * 60
    + [vector_with_squares() * (vector_with_squares().abs() == 1)] * SLOW_STEPS,
}


@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize("form", COMPACT)
def test_a_second_moment_that_moves_slowly_is_followed(form, kind):
    """What rounding to the nearest would leave where it is: see the next test.

    A step that moves a moment by δ between values a gap apart adds a variance of δ·gap at most, so
    a path of length s has a standard deviation of √(s·gap). Entries are rounded independently.
    """
    num_rising = 60 if kind == "decaying" else SLOW_STEPS
    exact = second_moment(*train_vector(GRADIENTS[kind], state_dtype="float32"))
    held = second_moment(*train_vector(GRADIENTS[kind], state_dtype=form))
    peak = vector_with_squares().square() * (1 - BETAS[1] ** num_rising)
    path = 2 * peak - exact if kind == "decaying" else exact
    deviation = (path * gap_of(form, peak, exact.max())).sqrt()
    # 16 blocks, and of each all values but the largest, which its scale keeps exactly.
    error, bound, exact = (part.view(16, 256)[:, :255] for part in (held - exact, deviation, exact))
    # Five deviations of the mean over blocks, six of single values; 1e-3 for the float32 roundings
    # of so many steps.
    assert (error.mean(0).abs() <= 5 * bound[0] / 4 + 1e-3 * exact[0]).all()
    assert (error.abs() <= 6 * bound + 1e-3 * exact).all()
    assert (held > 0).all()


@pytest.mark.parametrize("form", COMPACT)
def test_rounding_to_the_nearest_would_stop_a_slow_second_moment(form):
    """0.1 % of the way to a value twice as large is less than half a gap: why there is chance."""
    values = torch.full((256,), 0.2)
    values[0] = 1.0
    start = read(stored(values, "exp_avg_sq", form), "exp_avg_sq", form, torch.float32)
    moved = start.lerp(2 * start, 0.001)
    moved[0] = 1.0
    again = read(stored(moved, "exp_avg_sq", form), "exp_avg_sq", form, torch.float32)
    assert torch.equal(again, start)


@pytest.mark.parametrize("form", COMPACT)
def test_moments_in_a_basis_follow_those_in_float32(form):
    """One basis throughout, so that both optimizers see the same coordinates.

    The largest column goes on; the others' moments fall from where 60 steps brought them.
    """
    gradient = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    gradient[:, 0] *= 10
    last = torch.zeros_like(gradient)
    last[:, 0] = gradient[:, 0]
    held = {}
    for dtype in ("float32", form):
        weight = nn.Parameter(torch.zeros(16, 256))
        optimizer = AdaRankGrad(
            [("weight", weight)],
            max_rank=4,
            min_rank=4,
            residual="none",
            refresh_max_gap=1000,
            state_dtype=dtype,
        )
        for step in range(360):
            weight.grad = gradient if step < 60 else last
            optimizer.step()
        held[dtype] = second_moment(optimizer, weight)
    exact, compact = (held[dtype][:, 1:] for dtype in ("float32", form))
    # As above: a path up to the peak and down again, with gaps of the peak at most.
    peak = exact / BETAS[1] ** 300
    largest = held["float32"].amax(-1, keepdim=True)
    variance = (2 * peak - exact) * gap_of(form, peak, largest)
    error = compact - exact
    deviation_of_mean = (variance.mean() / exact.numel()).sqrt()
    assert error.mean().abs() <= 5 * deviation_of_mean + 1e-3 * exact.mean()
    assert (error.abs() <= 6 * variance.sqrt() + 1e-3 * exact).all()


@pytest.mark.parametrize(("form", "bound"), [("bfloat16", 2**-8), ("int8", 4 / 127)])
@pytest.mark.parametrize("kind", ["spread", "concentrated"])
def test_a_basis_stays_orthonormal_to_its_rounding(form, bound, kind):
    """A column's error e: 2⁻⁸ of each entry; in int8 √(x·a)/127 at most of an entry x in a block
    with the largest a, so ‖e‖² ≤ Σ a·Σ|x| / 127² ≤ Σ a·16·‖block‖ / 127² ≤ (4/127)² for a unit
    column. Two columns' product is then off by 2‖e‖ + ‖e‖² at most.
    """
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(512, 24, generator=generator)
    if kind == "concentrated":
        matrix *= torch.logspace(0, -4, 512).unsqueeze(-1)
    basis = torch.linalg.qr(matrix).Q
    held = read(stored(basis, "basis", form), "basis", form, torch.float32)
    # 2 % for half a code at the smallest codes and float32 rounding.
    error = torch.linalg.vector_norm(held - basis, dim=0)
    assert (error <= 1.02 * bound).all()
    gram_error = (held.mT @ held - torch.eye(24)).abs().max()
    assert gram_error <= 1.02 * (2 * bound + bound**2)


def trained(steps=7, dtype=torch.float32, **options):
    torch.manual_seed(0)
    params = [
        ("weight", nn.Parameter(torch.randn(24, 16, dtype=dtype))),
        ("bias", nn.Parameter(torch.randn(16, dtype=dtype))),
    ]
    optimizer = AdaRankGrad(params, max_rank=6, refresh_max_gap=3, **options)
    train(optimizer, params, range(steps))
    return optimizer, params


def train(optimizer, params, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for _, param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


ALL_INT8 = {"state_dtype": "int8", "basis_dtype": "int8"}


def test_a_state_of_another_form_brings_its_form_along():
    saved, params = trained(**ALL_INT8)
    other, other_params = trained(steps=2)
    other.load_state_dict(saved.state_dict())
    with torch.no_grad():
        for (_, to), (_, source) in zip(other_params, params, strict=True):
            to.copy_(source)
    assert other.param_groups[0]["state_dtype"] == "int8"
    for optimizer, members in ((saved, params), (other, other_params)):
        train(optimizer, members, range(7, 12))
    for (_, left), (_, right) in zip(params, other_params, strict=True):
        assert torch.equal(left, right)


def test_a_state_from_before_there_were_forms_loads_as_float32():
    saved, _ = trained()
    state_dict = copy.deepcopy(saved.state_dict())
    for group in state_dict["param_groups"]:
        for name in ("state_dtype", "basis_dtype", "weight_rounding"):
            del group[name]
    other, _ = trained(steps=0, **ALL_INT8)
    other.load_state_dict(state_dict)
    assert other.param_groups[0]["state_dtype"] == "float32"
    train(other, [("weight", other.param_groups[0]["params"][0])], [8])


BROKEN_FORMS = {
    "a scale is missing": lambda state: state[0].pop("exp_avg_scale"),
    "a scale has another shape": lambda state: state[0].update(basis_scale=torch.ones(1, 1)),
    "codes have another dtype": lambda state: state[0].update(exp_avg_sq=state[0]["exp_avg"]),
    "the scale of a plain weight is missing": lambda state: state[1].pop("exp_avg_sq_scale"),
    "a plain moment is wide": lambda state: state[1].update(exp_avg=torch.zeros(16)),
    "a correction is there": lambda state: state[0].update(
        correction=torch.zeros(24, 16, dtype=torch.int8)
    ),
}


@pytest.mark.parametrize("how", BROKEN_FORMS)
def test_a_state_that_is_not_in_the_form_it_says_is_refused_and_changes_nothing(how):
    saved, _ = trained(**ALL_INT8)
    state_dict = copy.deepcopy(saved.state_dict())
    BROKEN_FORMS[how](state_dict["state"])
    other, params = trained(steps=0, **ALL_INT8)
    with pytest.raises(ValueError, match="of another optimizer, shape, side or form"):
        other.load_state_dict(state_dict)
    assert not other.state


def test_reading_and_keeping_a_basis_again_changes_no_code():
    optimizer, params = trained(**ALL_INT8)
    state = optimizer.state[params[0][1]]
    basis = read(state, "basis", "int8", torch.float32)
    again = stored(basis, "basis", "int8")
    assert torch.equal(again["basis"], state["basis"])
    assert torch.equal(again["basis_scale"], state["basis_scale"])


def test_state_is_small_by_hand():
    """24 x 16 at rank 4, the short side projected: blocks are shorter than 256, one scale each."""
    optimizer, _ = trained(**ALL_INT8, min_rank=4, energy=1e-6)
    basis, moment, seen = 4 * (16 + 4), 4 * (24 + 4), 4 * 4
    report = optimizer.report()
    assert report.layers[0].state_bytes == basis + 2 * moment + seen
    assert report.plain_state_bytes == 2 * (16 + 4)
    assert num_blocks(257) == 2


def test_the_description_counts_compact_state():
    weight = nn.Parameter(torch.zeros(1024, 1024))
    wide, compact = (
        describe(AdaRankGrad([("weight", weight)], max_rank=256, **options))
        for options in ({}, ALL_INT8)
    )
    # (1024 + 2·1024 + 1)·256 numbers of 4 bytes; 3·(1024 + 4·4)·256 bytes, and 1024 of `seen`.
    assert "at most 3.00 MiB of state" in wide
    assert "at most 0.76 MiB of state" in compact


def test_a_budget_buys_more_directions_in_fewer_bits():
    ranks = {}
    for form in ("float32", "int8"):
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(64, 64)) for _ in range(2)]
        optimizer = AdaRankGrad(
            weights,
            memory_budget="24KiB",
            max_rank=64,
            energy=0.99,
            state_dtype=form,
            basis_dtype=form,
        )
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.randn(64, 64)
            optimizer.step()
        report = optimizer.report()
        assert report.projected_state_bytes <= 24 * 1024
        ranks[form] = report.mean_rank
    # A direction costs 4·193 bytes, or 3·68 + 4.
    assert ranks["int8"] > 3 * ranks["float32"]


def test_nothing_is_converted_at_the_defaults():
    assert forms_of(AdaRankGrad([nn.Parameter(torch.ones(4, 4))]).param_groups[0]) == {}


def test_a_positive_second_moment_stays_positive_in_bfloat16():
    tiny = torch.full((1000,), 1e-42)
    generator = torch.Generator().manual_seed(0)
    assert (round_stochastically(tiny, generator) == 0).any()
    held = stored(tiny, "exp_avg_sq", "bfloat16", torch.Generator().manual_seed(0))
    assert (held["exp_avg_sq"] > 0).all()


def test_complex_weights_keep_their_moments_with_a_warning():
    param = torch.nn.Parameter(torch.ones(8, dtype=torch.complex64))
    optimizer = AdaRankGrad([("phase", param)], state_dtype="int8")
    message = r"phase \(8,\) is complex; its moments are kept in torch.complex64"
    with pytest.warns(UserWarning, match=message) as caught:
        for _ in range(2):
            param.grad = torch.ones_like(param)
            optimizer.step()
    assert len(caught) == 1
    assert optimizer.state[param]["exp_avg"].dtype is torch.complex64
