"""Eight bits a value: error bounds, zeros, rounding that is right on average, any scale."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adarankgrad.core.quantize import BLOCK, SIGNED, UNSIGNED, dequantize, num_blocks, quantize

from .matrices import few_examples

CODES = pytest.mark.parametrize("code", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])
GENERATORS = [lambda: None, lambda: torch.Generator().manual_seed(3)]
ROUNDINGS = pytest.mark.parametrize("rounding", GENERATORS, ids=["nearest", "random"])


def values_for(code, shape, seed=0, scale=1.0):
    """Normal numbers, squared without a sign, a tenth of them zero."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    values[torch.rand(shape, generator=generator) < 0.1] = 0.0
    return scale * (values if code.is_signed else values.square())


def largest_of_block(values):
    """The largest absolute value of the block that each value is in, float64."""
    num_cols = values.shape[-1]
    blocks = torch.nn.functional.pad(values.double().abs(), (0, -num_cols % BLOCK))
    blocks = blocks.unflatten(-1, (-1, BLOCK))
    return blocks.amax(-1, keepdim=True).expand_as(blocks).flatten(-2)[..., :num_cols]


def gap_at(share, code):
    """From the code below a share of the largest value to the one above, at most.

    A code q stands for (q / levels)^p, and (q + 1)^p − q^p ≤ p·(q + 1)^(p − 1), where the share's q
    is at most its p-th root times levels.
    """
    power = 2**code.num_roots
    return power * (share ** (1 / power) + 1 / code.levels) ** (power - 1) / code.levels


@few_examples
@given(
    shape=st.sampled_from([(7,), (256,), (257,), (5, 600), (3, 4, 300), (2, 1, 1)]),
    code=st.sampled_from([SIGNED, UNSIGNED]),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
    rounding=st.sampled_from(GENERATORS),
    seed=st.integers(0, 99),
)
def test_a_value_comes_back_within_one_gap_between_codes(shape, code, scale, rounding, seed):
    values = values_for(code, shape, seed, scale)
    back = dequantize(quantize(values, code, rounding()), code)
    assert back.shape == values.shape
    largest = largest_of_block(values)
    gap = largest * gap_at((values.double().abs() / largest).nan_to_num(), code)
    # Half a gap to the nearest code, one at random; 1e-5 for a dozen float32 roundings of the
    # share, each of which counts p times. What is raised to the smallest code moves by one gap.
    is_raised = (values > 0) & (back.double() <= 1.01 * largest / code.levels**4)
    factor = torch.where(is_raised, 1.0, 0.5 if rounding() is None else 1.0)
    error = (back.double() - values.double()).abs()
    assert (error <= gap * factor + 1e-5 * values.double().abs()).all()
    assert (back.sign() * values.sign() >= 0).all()


@CODES
@ROUNDINGS
def test_zeros_stay_zero_and_squares_that_are_not_zero_stay_positive(code, rounding):
    values = values_for(code, (4, 500))
    values[0, ::2] = 1e-20 if code.is_signed else 1e-38
    values[1] = 0.0
    back = dequantize(quantize(values, code, rounding()), code)
    assert (back[values == 0] == 0).all()
    if code is UNSIGNED:
        assert (back[values > 0] > 0).all()


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30, 3e38])
def test_a_square_stays_positive_at_any_scale_of_its_block(scale):
    values = torch.tensor([scale, scale * 1e-6, 1e-44, 0.0])
    back = dequantize(quantize(values, UNSIGNED), UNSIGNED)
    assert (back[:3] > 0).all()
    assert back[3] == 0
    assert back[0] == max(scale, torch.finfo(torch.float32).tiny)


@CODES
def test_the_largest_value_of_a_block_is_exact(code):
    values = values_for(code, (3, 1000))
    back = dequantize(quantize(values, code), code)
    for start in range(0, 1000, BLOCK):
        at = values[:, start : start + BLOCK].abs().argmax(-1, keepdim=True) + start
        assert torch.equal(back.gather(-1, at), values.gather(-1, at))


def test_codes_by_hand():
    """Shares (64/127)² and (1/127)², and (51/255)⁴ = 0.0016, at a largest value of 2."""
    signed = quantize(torch.tensor([2.0, 2 * (64 / 127) ** 2, -2 / 127**2, 0.0]), SIGNED)
    assert signed.codes.tolist() == [127, 64, -1, 0]
    assert signed.scale.tolist() == [2.0]
    assert quantize(torch.tensor([2.0, 0.0032, 1e-30]), UNSIGNED).codes.tolist() == [255, 51, 1]


@CODES
@pytest.mark.parametrize("share", [0.73, 0.2, 0.011, 3e-4])
def test_rounding_at_random_is_right_on_average(code, share):
    values = torch.full((200, BLOCK), share)
    values[:, 0] = 1.0  # the largest of each block
    back = dequantize(quantize(values, code, torch.Generator().manual_seed(0)), code)
    drawn = back[:, 1:].double()
    # One of two values a gap apart: a standard deviation of half a gap at most. Five of them.
    bound = 5 * 0.5 * gap_at(share, code) / math.sqrt(drawn.numel())
    assert drawn.mean().item() == pytest.approx(share, abs=bound)
    assert len(drawn.unique()) == 2


@CODES
@ROUNDINGS
@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0), (2, 0, 4), (1, 1)], ids=str)
def test_empty_and_single_values(code, rounding, shape):
    values = values_for(code, shape)
    quantized = quantize(values, code, rounding())
    assert quantized.codes.shape == shape
    assert quantized.scale.shape == (*shape[:-1], num_blocks(shape[-1]))
    assert torch.equal(dequantize(quantized, code), values)


@CODES
def test_a_stack_is_its_matrices_side_by_side(code):
    values = values_for(code, (3, 4, 300))
    whole = quantize(values, code)
    for index in range(3):
        alone = quantize(values[index], code)
        assert torch.equal(whole.codes[index], alone.codes)
        assert torch.equal(whole.scale[index], alone.scale)


@CODES
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_block_with_a_broken_value_has_no_finite_value_afterwards(code, broken):
    values = values_for(code, (2 * BLOCK,)) + 1.0
    values[5] = broken
    back = dequantize(quantize(values, code), code)
    assert not back[:BLOCK].isfinite().any()
    assert back[BLOCK:].isfinite().all()


@CODES
def test_codes_and_scales_are_contiguous_whatever_the_strides(code):
    values = values_for(code, (300, 4)).mT
    quantized = quantize(values, code)
    assert all(part.is_contiguous() for part in quantized)
    assert torch.equal(quantized.codes, quantize(values.contiguous(), code).codes)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_codes_hold_one_byte_each_without_the_padding_of_a_block(num_rows):
    codes = quantize(torch.randn(num_rows, 300), SIGNED).codes
    assert codes.untyped_storage().nbytes() == num_rows * 300
