"""Float32 into bfloat16: at random without bias, or with eight more bits that give it back."""

from __future__ import annotations

import math

import pytest
import torch

from adarankgrad.core.rounding import join_correction, round_stochastically, split_correction

SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan]


def generator():
    return torch.Generator().manual_seed(5)


def all_bfloat16():
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)


def finite_bfloat16():
    numbers = all_bfloat16()
    return numbers[numbers.isfinite()]


def spread_numbers(num=20_000):
    """Both signs, over most of float32's range of normal numbers."""
    normal = torch.randn(2, num, generator=generator())
    return normal[0] * torch.exp2(normal[1].mul(25).clamp(-120, 120))


def same_bits(left, right):
    return torch.equal(left.contiguous().view(torch.int16), right.contiguous().view(torch.int16))


def test_what_bfloat16_holds_stays_as_it_is():
    numbers = finite_bfloat16()
    assert same_bits(round_stochastically(numbers.float(), generator()), numbers)
    high, correction = split_correction(numbers.float())
    assert same_bits(high, numbers)
    assert not correction.any()


@pytest.mark.parametrize("value", SPECIAL)
def test_zeros_and_numbers_that_are_not_finite_stay(value):
    value = torch.tensor([value])
    for rounded in (
        round_stochastically(value, generator()).float(),
        join_correction(*split_correction(value)),
    ):
        torch.testing.assert_close(rounded, value, rtol=0, atol=0, equal_nan=True)
        assert value.isnan() or rounded.signbit() == value.signbit()


@pytest.mark.parametrize("value", [1.0 + 2**-9, -1.3e-20, 0.99999, -(1.0 + 2**-14), 7.7e30])
def test_rounding_at_random_takes_a_neighbour_and_is_right_on_average(value):
    num_draws = 2**16
    rounded = round_stochastically(torch.full((num_draws,), value), generator()).double()
    exact = torch.tensor(value).double()
    # bfloat16 has 8 significant bits: neighbours are at most 2⁻⁷ of the value apart.
    gap = abs(value) * 2**-7
    assert ((rounded - exact).abs() < gap).all()
    assert len(rounded.unique()) == 2
    # A standard deviation of half a gap at most. Five of them.
    assert abs(rounded.mean() - exact) <= 5 * 0.5 * gap / math.sqrt(num_draws)


def test_a_split_value_comes_back_to_16_bits():
    values = spread_numbers()
    back = join_correction(*split_correction(values))
    # 24 bits of the 32 hold 16 significant ones: half a unit in the last is 2⁻¹⁶ at most.
    assert ((back - values).abs() <= values.abs() * 2**-16).all()


def test_splitting_a_joined_value_again_changes_nothing():
    high, correction = split_correction(spread_numbers())
    again = split_correction(join_correction(high, correction))
    assert same_bits(again[0], high)
    assert torch.equal(again[1], correction)


def test_the_weight_is_the_nearest_to_what_the_two_together_are():
    back = join_correction(*split_correction(spread_numbers()))
    high, _ = split_correction(back)
    nearest = back.to(torch.bfloat16)
    distance = (high.double() - back.double()).abs()
    assert torch.equal(distance, (nearest.double() - back.double()).abs())


@pytest.mark.parametrize("correction", [-128, -1, 1, 127])
def test_a_weight_from_outside_is_off_by_half_a_unit_in_its_last_place_at_most(correction):
    """Every bfloat16 number beside a correction that belongs to another."""
    numbers = finite_bfloat16()
    joined = join_correction(numbers, torch.full(numbers.shape, correction, dtype=torch.int8))
    bits = numbers.view(torch.int16)
    magnitude = (bits & 0x7FFF).to(torch.int32)
    # The distance to the next number away from zero; towards zero it is that or half of it.
    unit = ((magnitude + 1) << 16).view(torch.float32).double() - numbers.double().abs()
    is_last = magnitude == 0x7F7F  # the next is infinity
    off = (joined.double() - numbers.double()).abs()
    assert (off <= 0.5 * unit)[~is_last].all()
    assert joined.isfinite().all()
    assert (joined.double() * numbers.double() >= 0).all()


def test_rounding_to_16_bits_has_no_drift():
    """Ties go to even: over all last bits the errors cancel."""
    last = torch.arange(2**16, dtype=torch.int32)
    values = (last | 0x3F800000).view(torch.float32)
    error = join_correction(*split_correction(values)).double() - values.double()
    assert error.sum() == 0
