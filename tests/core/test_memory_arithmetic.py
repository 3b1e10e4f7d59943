"""Memory arithmetic: by hand, and equal to the bytes that the optimizer then holds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adarankgrad import AdaRankGrad
from adarankgrad.core.memory import (
    STATE_DTYPES,
    adam_state_bytes,
    projected_gradient_bytes,
    projected_state_bytes,
    quantized_adam_state_bytes,
    stored_bytes,
)
from adarankgrad.core.projection import SIDES, layout_of

from .matrices import few_examples


def test_a_tall_matrix_by_hand():
    """Rank 4: 844 = 10·4 + 2·4·100 + 4 on the short side, 484 = 100·4 + 2·4·10 + 4 on the long."""
    shape = torch.Size((100, 10))
    assert projected_state_bytes(layout_of(shape, "short"), 4) == 844 * 4
    assert projected_state_bytes(layout_of(shape, "long"), 4) == 484 * 4
    assert projected_state_bytes(layout_of(shape, "short"), 4, bytes_per_element=8) == 844 * 8
    assert projected_state_bytes(layout_of(shape, "short"), 4, num_moments=1) == 444 * 4
    assert projected_state_bytes(layout_of(shape, "short"), 0) == 0
    assert adam_state_bytes(1000) == 8000
    assert adam_state_bytes(1000, bytes_per_element=2) == 4000


def test_compact_forms_by_hand():
    """Rank 4 of 100 x 10: a moment's rows of 100 columns have a scale of 4 bytes each."""
    layout = layout_of(torch.Size((100, 10)))
    assert projected_state_bytes(layout, 4, state_dtype="bfloat16") == 4 * (10 * 4 + 2 * 200 + 4)
    assert projected_state_bytes(layout, 4, state_dtype="int8") == 4 * (10 * 4 + 2 * 104 + 4)
    in_eight_bits = {"state_dtype": "int8", "basis_dtype": "int8"}
    assert projected_state_bytes(layout, 4, **in_eight_bits) == 4 * (14 + 2 * 104 + 4)
    assert projected_state_bytes(layout, 0, **in_eight_bits) == 0
    assert adam_state_bytes(1000, state_dtype="bfloat16") == 4000
    assert adam_state_bytes(1000, state_dtype="int8") == 2 * (1000 + 4 * 4)
    assert adam_state_bytes(1024, state_dtype="int8") == 2 * (1024 + 4 * 4)


def test_a_stack_holds_the_state_of_each_of_its_matrices():
    stacked = layout_of(torch.Size((5, 8, 6)), is_stacked=True)
    alone = layout_of(torch.Size((8, 6)))
    assert projected_state_bytes(stacked, 3) == 5 * projected_state_bytes(alone, 3)


def test_the_long_side_never_holds_more_than_the_short_one():
    for shape in [(100, 10), (10, 100), (7, 7)]:
        short, long = (layout_of(torch.Size(shape), side) for side in ("short", "long"))
        assert projected_state_bytes(long, 3) <= projected_state_bytes(short, 3)


@few_examples
@given(
    shape=st.sampled_from([(9, 4), (4, 9), (5, 5), (6, 2, 3, 3), (3, 6, 4)]),
    side=st.sampled_from(SIDES),
    is_stacked=st.booleans(),
    rank=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    forms=st.fixed_dictionaries(
        {name: st.sampled_from(STATE_DTYPES) for name in ("state_dtype", "basis_dtype")}
    ),
)
def test_it_equals_the_bytes_that_the_optimizer_holds(shape, side, is_stacked, rank, dtype, forms):
    weight = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
    ranks = {"max_rank": rank, "min_rank": rank, "energy": 1.0}
    optimizer = AdaRankGrad([weight], side=side, stacked=is_stacked, **ranks, **forms)
    weight.grad = torch.randn(shape).to(dtype)
    optimizer.step()
    layout = layout_of(weight.shape, side, is_stacked=is_stacked)
    width = 8 if dtype is torch.float64 else 4
    rank = min(rank, layout.num_rows, layout.num_cols)
    expected = projected_state_bytes(layout, rank, width, **forms)
    held = [value for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor)]
    # Storages, not views: a slice of a larger tensor would hold all of it.
    assert sum(value.untyped_storage().nbytes() for value in held) == expected
    assert optimizer.report().projected_state_bytes == expected


@pytest.mark.parametrize("basis", ["randomized", "exact"])
def test_a_rank_below_the_ceiling_releases_the_memory_of_the_ceiling(basis):
    """A gradient of rank 1, searched with 16 columns: (16 + 2·20 + 1)·4 bytes stay."""
    weight = torch.nn.Parameter(torch.zeros(16, 20))
    optimizer = AdaRankGrad([weight], basis=basis, max_rank=1.0, min_rank=1, energy=0.9)
    weight.grad = torch.outer(torch.randn(16), torch.randn(20))
    optimizer.step()
    held = [value for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor)]
    assert sum(value.untyped_storage().nbytes() for value in held) == (16 + 2 * 20 + 1) * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adam_bytes_equal_what_torch_holds(dtype):
    weight = torch.nn.Parameter(torch.zeros(7, 5, dtype=dtype))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    state = optimizer.state[weight]
    held = sum(state[key].untyped_storage().nbytes() for key in ("exp_avg", "exp_avg_sq"))
    assert held == adam_state_bytes(35, weight.element_size())


def test_eight_bits_are_a_byte_an_element_and_a_scale_for_each_block_of_a_row():
    """Three rows of 300: 300 bytes and two scales each."""
    assert stored_bytes(3, 300, "int8") == 3 * (300 + 2 * 4)
    assert stored_bytes(3, 300, "bfloat16") == 1800
    assert stored_bytes(3, 300) == 3600
    assert stored_bytes(3, 300, bytes_per_element=8) == 7200
    with pytest.raises(ValueError, match="float32, bfloat16, int8, got 'int4'"):
        stored_bytes(3, 300, "int4")


def test_small_state_by_hand():
    """Rank 4 of 100x10: basis (10, 4), moments (4, 100), and ``seen``, which stays float32."""
    layout = layout_of(torch.Size((100, 10)))
    small = projected_state_bytes(layout, 4, state_dtype="int8", basis_dtype="bfloat16")
    assert small == 10 * 4 * 2 + 2 * 4 * (100 + 4) + 4 * 4


def test_bitsandbytes_keeps_small_weights_in_float32():
    assert quantized_adam_state_bytes(4095) == 8 * 4095
    assert quantized_adam_state_bytes(4096) == 2 * (4096 + 4 * 16)


def test_a_gradient_in_measurements_by_hand():
    """Rank 4 of 100x10, 8 probes: 12·100 measured and 8·10 probes; 5 columns are 5·(10 + 100)."""
    layout = layout_of(torch.Size((100, 10)))
    assert projected_gradient_bytes(layout, 4) == (1200 + 80) * 4
    assert projected_gradient_bytes(layout, 4, num_columns=5) == (1200 + 80 + 550) * 4
    assert projected_gradient_bytes(layout, 4, owns_basis=True) == (1200 + 80 + 40) * 4
