"""The sign-keeping power: exact at simple numbers, finite at zero, not underflowing in half."""

import pytest
import torch

from adarankgrad.core.signed_power import signed_power, signed_power_slope, signed_root


def test_power_root_and_slope_of_simple_numbers():
    base = torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0])
    assert signed_power(base, 3.0).tolist() == [-8.0, -0.125, 0.0, 0.125, 8.0]
    assert signed_power(base, 1.0).tolist() == base.tolist()
    assert signed_power_slope(base, 3.0).tolist() == [12.0, 0.75, 0.0, 0.75, 12.0]
    assert signed_power_slope(base, 1.0).tolist() == [1.0] * 5
    root = signed_root(signed_power(base, 2.0), 2.0)
    # Powers of two and their roots are exact, but pow may round in the last bit.
    assert torch.allclose(root, base, rtol=2**-22, atol=0.0)


@pytest.mark.parametrize("exponent", [1.0, 1.25, 1.5, 2.0, 3.0])
def test_the_slope_is_finite_at_zero(exponent):
    slope = signed_power_slope(torch.zeros(3), exponent)
    assert slope.tolist() == [1.0 if exponent == 1 else 0.0] * 3


def test_half_precision_is_computed_in_float32():
    base = torch.tensor([1e-3], dtype=torch.float16)
    power = signed_power(base, 4.0)
    assert power.dtype is torch.float32
    # float16 has nothing between 0 and 6e-8. Relative: four times float32's half unit, and pow's.
    assert power.item() == pytest.approx(base.double().item() ** 4, rel=6 * 2**-24)
