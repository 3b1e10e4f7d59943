"""Moments from basis to basis: what must not change, what must not go negative, what is closest."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adarankgrad.core.adam import adam_direction
from adarankgrad.core.carry import CARRIES, Moments, carry_moments

from .matrices import few_examples, random_orthonormal, seeds
from .moments import BETAS, correction, moments_of_age, trained_moments

ROTATING = ("squared", "ldadam", "published")
methods = st.sampled_from(CARRIES)


def random_rotation(num_new, num_old, seed=0):
    """Rotation between two random bases of a space that holds both."""
    num_rows = num_new + num_old
    new, old = (
        random_orthonormal(num_rows, num_new, seed),
        random_orthonormal(num_rows, num_old, seed + 1),
    )
    return new.mT @ old


def signed_permutation(rank, seed=0):
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(rank, generator=generator)
    signs = torch.randint(0, 2, (rank,), generator=generator).double() * 2 - 1
    return torch.eye(rank, dtype=torch.float64)[:, order] * signs


def next_update(basis, grad, moments, step=21):
    """Adam's next direction, lifted back to the weight's space."""
    coords = basis.mT @ grad
    copies = [part.clone() for part in moments]
    return basis @ adam_direction(coords, *copies, step=step, betas=BETAS, eps=1e-8)


def update_after_signed_permutation(method, seed):
    basis = random_orthonormal(7, 4, seed)
    grad = torch.randn(7, 5, dtype=torch.float64)
    moments = trained_moments(4, 5, seed=seed)
    new_basis = basis @ signed_permutation(4, seed)
    rotation = new_basis.mT @ basis
    carried = carry_moments(moments, rotation, method, first_correction=correction(20))
    step = 1 if method == "reset" else 21
    start = [torch.zeros_like(part) for part in moments] if method == "reset" else moments
    before = next_update(basis, grad, start, step=step)
    after = next_update(new_basis, grad, carried, step=step)
    return before, after


@few_examples
@given(method=st.sampled_from([m for m in CARRIES if m != "keep"]), seed=seeds)
def test_signs_and_order_of_the_basis_leave_the_next_update_unchanged(method, seed):
    before, after = update_after_signed_permutation(method, seed)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-11)


def test_keep_reads_the_moments_in_a_basis_they_do_not_belong_to():
    """GaLore's flaw, kept for comparison: a change of sign alone changes the update."""
    before, after = update_after_signed_permutation("keep", 0)
    relative = torch.linalg.vector_norm(after - before) / torch.linalg.vector_norm(before)
    assert relative > 0.3


@few_examples
@given(method=st.sampled_from(["squared", "ldadam", "published", "keep"]), seed=seeds)
def test_an_unchanged_basis_leaves_the_moments_unchanged(method, seed):
    """For ldadam up to the rounding of m² subtracted and added back."""
    moments = trained_moments(4, 6, seed=seed)
    identity = torch.eye(4, dtype=torch.float64)
    carried = carry_moments(moments, identity, method, first_correction=correction(20))
    for part, before in zip(carried, moments, strict=True):
        torch.testing.assert_close(part, before, rtol=1e-12, atol=1e-15)


@few_examples
@given(
    method=methods,
    num_new=st.integers(1, 8),
    num_old=st.integers(0, 8),
    num_steps=st.integers(1, 40),
    seed=seeds,
)
def test_the_second_moment_is_never_negative_and_never_nan(
    method, num_new, num_old, num_steps, seed
):
    moments = trained_moments(num_old, 5, num_steps, seed)
    rotation = random_rotation(num_new, num_old, seed)
    carried = carry_moments(moments, rotation, method, first_correction=correction(num_steps))
    assert carried.exp_avg.shape == carried.exp_avg_sq.shape == (num_new, 5)
    assert carried.seen.shape == (num_new, 1)
    assert torch.all(carried.exp_avg_sq >= 0)
    assert torch.all((carried.seen >= 0) & (carried.seen <= 1))
    assert torch.all(torch.isfinite(carried.exp_avg))


def test_the_published_linear_rotation_turns_negative_without_the_absolute_value():
    """R = −I on half of the axes, as an SVD does at whim: half of R v is negative, its root NaN."""
    moments = trained_moments(4, 6)
    exp_avg_sq = moments.exp_avg_sq
    rotation = torch.diag(torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64))
    linear = rotation @ exp_avg_sq
    assert (linear < 0).double().mean() == 0.5
    assert torch.isnan(linear.sqrt()).double().mean() == 0.5
    carried = carry_moments(moments, rotation, "published")
    torch.testing.assert_close(carried.exp_avg_sq, exp_avg_sq)
    random = random_orthonormal(16, 16, 0) @ trained_moments(16, 30).exp_avg_sq
    assert 0.2 < (random < 0).double().mean() < 0.8


@pytest.mark.parametrize("method", ROTATING)
def test_only_the_published_rule_depends_on_the_signs_of_the_old_basis(method):
    """|R v| mixes signed entries: flipping an old vector flips a column of R, but not v.

    In a rotation by 45 degrees of v = (4, 2): |4 + 2|/√2 becomes |4 − 2|/√2. The other rules
    square the signs away, so that whatever a decomposition returned before does not matter.
    """
    moments = trained_moments(4, 6)
    rotation = random_orthonormal(4, 4, 1)
    signs = torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=torch.float64)
    flipped_moments = moments._replace(exp_avg=signs.unsqueeze(-1) * moments.exp_avg)
    first_correction = correction(20)
    one = carry_moments(moments, rotation, method, first_correction=first_correction)
    flipped = carry_moments(
        flipped_moments, rotation * signs, method, first_correction=first_correction
    )
    torch.testing.assert_close(one[0], flipped[0])
    difference = (one[1] - flipped[1]).abs().max() / one[1].max()
    assert difference > 0.1 if method == "published" else difference < 1e-12


def test_a_rotation_by_45_degrees_by_hand():
    """m = (1, 0), v = (4, 2), R = [[1, 1], [−1, 1]]/√2.

    R m = (1, −1)/√2. squared: (3, 3). published: |(6, −2)|/√2. ldadam with both corrections 1:
    variances (4 − 1, 2 − 0) rotate to (2.5, 2.5), plus squared means 0.5 each: (3, 3).
    """
    root = math.sqrt(0.5)
    rotation = root * torch.tensor([[1.0, 1.0], [-1.0, 1.0]], dtype=torch.float64)
    exp_avg = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    exp_avg_sq = torch.tensor([[4.0], [2.0]], dtype=torch.float64)
    expected = {
        "squared": [3.0, 3.0],
        "published": [6.0 * root, 2.0 * root],
        "ldadam": [3.0, 3.0],
    }
    for method, second in expected.items():
        moments = Moments(exp_avg, exp_avg_sq, torch.ones(2, 1, dtype=torch.float64))
        new_avg, new_sq, _ = carry_moments(moments, rotation, method)
        assert new_avg.flatten().tolist() == pytest.approx([root, -root])
        assert new_sq.flatten().tolist() == pytest.approx(second)


def test_ldadam_and_squared_differ_where_means_interfere():
    """m = (1, 1), v = (1, 1): no variance. In the rotated basis the mean is (√2, 0), v = (2, 0).

    ldadam knows; squared says (1, 1).
    """
    root = math.sqrt(0.5)
    rotation = root * torch.tensor([[1.0, 1.0], [-1.0, 1.0]], dtype=torch.float64)
    ones = torch.ones(2, 1, dtype=torch.float64)
    moments = Moments(ones, ones, ones)
    ldadam = carry_moments(moments, rotation, "ldadam").exp_avg_sq
    squared = carry_moments(moments, rotation, "squared").exp_avg_sq
    assert ldadam.flatten().tolist() == pytest.approx([2.0, 0.0], abs=1e-15)
    assert squared.flatten().tolist() == pytest.approx([1.0, 1.0])


def test_ldadams_variance_may_dip_below_zero_and_its_size_is_taken():
    """Recent gradients larger than old ones: m = (1, 1) but v = (1/4, 1/4), so v − m² = −3/4.

    Rotated by 45 degrees the mean is (√2, 0): 2 − 3/4 = 5/4, and |0 − 3/4|.
    """
    root = math.sqrt(0.5)
    rotation = root * torch.tensor([[1.0, 1.0], [-1.0, 1.0]], dtype=torch.float64)
    ones = torch.ones(2, 1, dtype=torch.float64)
    carried = carry_moments(Moments(ones, ones / 4, ones), rotation, "ldadam")
    assert carried.exp_avg_sq.flatten().tolist() == pytest.approx([1.25, 0.75])


def test_ldadams_bias_corrections_are_removed_and_put_back():
    """A constant gradient g has m = (1 − β₁ᵗ) g and v = (1 − β₂ᵗ) g²; so it must stay, rotated."""
    grad = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    step = 7
    exp_avg = (1 - BETAS[0] ** step) * grad
    exp_avg_sq = (1 - BETAS[1] ** step) * grad.square()
    rotation = random_orthonormal(2, 2, 3)
    moments = moments_of_age(exp_avg, exp_avg_sq, step)
    carried = carry_moments(moments, rotation, "ldadam", first_correction=correction(step))
    rotated = rotation @ grad
    torch.testing.assert_close(carried[0], (1 - BETAS[0] ** step) * rotated)
    torch.testing.assert_close(carried[1], (1 - BETAS[1] ** step) * rotated.square())


@pytest.mark.parametrize("method", ROTATING)
def test_the_first_moment_follows_exactly_within_the_shared_span(method):
    """A basis that contains the old one loses nothing: Q_new R m = Q_old m."""
    wide = random_orthonormal(10, 6, 0)
    old = wide[:, :3] @ random_orthonormal(3, 3, 1)
    moments = trained_moments(3, 4)
    carried = carry_moments(moments, wide.mT @ old, method, first_correction=correction(20))
    torch.testing.assert_close(wide @ carried.exp_avg, old @ moments.exp_avg)


@pytest.mark.parametrize("method", ROTATING)
def test_a_shrinking_basis_drops_the_directions_that_it_loses(method):
    moments = trained_moments(4, 5)
    rotation = torch.eye(4, dtype=torch.float64)[:2]
    carried = carry_moments(moments, rotation, method, first_correction=correction(20))
    for part, before in zip(carried, moments, strict=True):
        torch.testing.assert_close(part, before[:2])


@pytest.mark.parametrize("method", ["squared", "ldadam", "published", "keep"])
def test_a_growing_basis_keeps_what_it_had_and_starts_the_new_rows_at_zero(method):
    moments = trained_moments(2, 5)
    rotation = torch.eye(4, dtype=torch.float64)[:, :2]
    carried = carry_moments(moments, rotation, method, first_correction=correction(20))
    for moment, before in zip(carried, moments, strict=True):
        torch.testing.assert_close(moment[:2], before)
        assert torch.all(moment[2:] == 0)


def test_keep_takes_rows_as_they_stand_whatever_the_rotation():
    moments = trained_moments(3, 5)
    for num_new in (2, 3, 5):
        carried = carry_moments(moments, random_rotation(num_new, 3), "keep")
        shared = min(num_new, 3)
        for moment, before in zip(carried, moments, strict=True):
            assert torch.equal(moment[:shared], before[:shared])
            assert torch.all(moment[shared:] == 0)


@few_examples
@given(method=methods, num_new=st.integers(1, 4), num_old=st.integers(1, 4), seed=seeds)
def test_results_are_new_tensors_and_the_old_ones_are_left_alone(method, num_new, num_old, seed):
    moments = trained_moments(num_old, 5, seed=seed)
    copies = [moment.clone() for moment in moments]
    rotation = random_rotation(num_new, num_old, seed)
    carried = carry_moments(moments, rotation, method, first_correction=correction(20))
    for moment in carried:
        moment.fill_(7.0)
    for moment, copied in zip(moments, copies, strict=True):
        assert torch.equal(moment, copied)


@pytest.mark.parametrize("method", CARRIES)
def test_a_stack_is_carried_matrix_by_matrix(method):
    moments = [trained_moments(3, 5, seed=seed) for seed in range(2)]
    rotations = [random_rotation(4, 3, seed) for seed in range(2)]
    stacked = Moments(*(torch.stack(parts) for parts in zip(*moments, strict=True)))
    first_correction = correction(20)
    together = carry_moments(
        stacked, torch.stack(rotations), method, first_correction=first_correction
    )
    for index in range(2):
        alone = carry_moments(
            moments[index], rotations[index], method, first_correction=first_correction
        )
        for one, two in zip(alone, together, strict=True):
            torch.testing.assert_close(two[index], one)


def steps_along_a_new_direction(num_steps, is_own):
    """Adam's directions on a direction orthogonal to the old basis, which is 9999 steps old."""
    rotation = torch.zeros(1, 2, dtype=torch.float64)
    old = moments_of_age(*torch.rand(2, 2, 400, dtype=torch.float64), 9999)
    carried = carry_moments(old, rotation, "squared")
    if not is_own:
        carried.seen.fill_(1 - BETAS[1] ** 9999)
    generator = torch.Generator().manual_seed(1)
    for step in range(10000, 10000 + num_steps):
        coords = torch.randn(1, 400, generator=generator, dtype=torch.float64)
        yield adam_direction(coords, *carried, step=step, betas=BETAS, eps=0.0)


def test_a_new_direction_under_the_global_correction_starts_three_times_too_fast():
    """m = (1 − β₁) g and v = (1 − β₂) g²: every entry is ±0.1/√0.001 = ±3.16."""
    (direction,) = steps_along_a_new_direction(1, is_own=False)
    expected = (1 - BETAS[0]) / math.sqrt(1 - BETAS[1])
    assert expected == pytest.approx(3.16, abs=0.01)
    # Bias corrections at t = 10000 are 1 − 5e-5 (second) and 1 (first).
    torch.testing.assert_close(
        direction.abs(), torch.full_like(direction, expected), rtol=1e-4, atol=0
    )


def test_a_new_direction_with_a_correction_of_its_own_starts_at_a_tenth_of_a_sign_step():
    """m = (1 − β₁) g and v̂ = g²: every entry is ±0.1."""
    (direction,) = steps_along_a_new_direction(1, is_own=True)
    torch.testing.assert_close(direction.abs(), torch.full_like(direction, 1 - BETAS[0]))


def test_a_new_direction_with_a_correction_of_its_own_soon_has_the_usual_length():
    """For noise of variance 1, v̂ is 1 and m has variance (1 − β₁)/(1 + β₁) = 0.0526: rms 0.23.

    After 50 steps v̂ is a mean of 50 squares, so it deviates by √(2/50) = 0.2 an entry, and the
    mean of 1/v̂ is 1 + 0.04; the rms over 400 entries has a relative error of about 1/√800.
    """
    *_, direction = steps_along_a_new_direction(50, is_own=True)
    usual = math.sqrt((1 - BETAS[0]) / (1 + BETAS[0]))
    assert direction.square().mean().sqrt().item() == pytest.approx(usual, rel=0.15)
    *_, misled = steps_along_a_new_direction(50, is_own=False)
    assert misled.square().mean().sqrt() > 4 * usual


def test_what_a_direction_has_seen_shrinks_by_the_share_of_a_direction_that_is_new():
    """A row at 60 degrees to the old basis: 1/4 of it is old, and so is 1/4 of what it knows.

    The unbiased second moment is that of the old direction.
    """
    rotation = torch.tensor([[0.5]], dtype=torch.float64)
    moments = Moments(*torch.tensor([[[1.0]], [[8.0]], [[0.8]]], dtype=torch.float64).unbind())
    for method in ("squared", "ldadam"):
        carried = carry_moments(moments, rotation, method)
        assert carried.seen.item() == pytest.approx(0.2)
        assert carried.exp_avg.item() == 0.5
    assert carry_moments(moments, rotation, "squared").exp_avg_sq.item() == 2.0


def test_an_unknown_method_is_refused_by_name():
    moments = trained_moments(2, 3)
    with pytest.raises(ValueError, match="carry must be one of squared, .*, got 'linear'"):
        carry_moments(moments, torch.eye(2, dtype=torch.float64), "linear")
