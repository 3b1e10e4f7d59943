"""State takes the bytes that `core.memory` computes, and a step allocates nothing large."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from adarankgrad.core.memory import adam_state_bytes, projected_state_bytes
from adarankgrad.core.projection import layout_of
from adarankgrad.optim.report import bytes_of
from allocations import Allocations, LiveMemory

from .problems import MATRICES, gradient, make_params, skip_at_fixed_rank, train

NUM_STEPS = 7


def held_bytes(optimizer, param, but_for=()):
    """Bytes of memory that the state of a parameter keeps alive, views of more included."""
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for key, value in optimizer.state[param].items()
        if isinstance(value, Tensor) and key not in ("step", "energies", *but_for)
    }
    return sum(storages.values())


def sketch_bytes(optimizer, param):
    """Of a sketch that waits for the next step."""
    sketch = optimizer.state[param].get("sketch")
    return 0 if sketch is None else sketch.numel() * sketch.element_size()


def expected_bytes(optimizer, layout, rank, bytes_per_element=4):
    """What `core.memory` says, and Fira's one number a matrix: the norm of its last residual."""
    has_norm = optimizer.defaults["residual"].startswith("fira")
    norm_bytes = layout.num_matrices * bytes_per_element if has_norm else 0
    num_moments = 1 if optimizer.defaults["update"] == "orthogonalized" else 2
    held = projected_state_bytes(
        layout,
        rank,
        bytes_per_element,
        num_moments=num_moments,
        state_dtype=optimizer.defaults["state_dtype"],
        basis_dtype=optimizer.defaults["basis_dtype"],
    )
    return held + norm_bytes


def correction_bytes(optimizer, param):
    """One byte a weight where bfloat16 weights have eight more bits."""
    is_corrected = optimizer.defaults["weight_rounding"] == "corrected"
    return param.numel() if is_corrected and param.dtype is torch.bfloat16 else 0


def plain_bytes(optimizer, param):
    """Two moments: in the weight's dtype, in float32 beside rounded weights, or as was asked."""
    is_rounded = optimizer.defaults["weight_rounding"] != "nearest"
    is_wide = is_rounded and param.dtype is torch.bfloat16
    width = 4 if is_wide else param.element_size()
    return adam_state_bytes(param.numel(), width, state_dtype=optimizer.defaults["state_dtype"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_measured_state_bytes_equal_the_arithmetic_after_every_step(case, dtype):
    params = make_params(dtype)
    optimizer = case.build(params)
    side = optimizer.defaults["side"]
    state_element_size = torch.promote_types(dtype, torch.float32).itemsize
    for step in range(NUM_STEPS):
        train(optimizer, params, [step])
        report = optimizer.report()
        for layer in report.layers:
            param = dict(params)[layer.name]
            layout = layout_of(param.shape, side)
            expected = expected_bytes(optimizer, layout, layer.rank, state_element_size)
            expected += sketch_bytes(optimizer, param)
            without = held_bytes(optimizer, param, but_for=["correction"])
            assert without == expected == layer.state_bytes
            assert held_bytes(optimizer, param) == expected + correction_bytes(optimizer, param)
        bias = params[-1][1]
        expected = plain_bytes(optimizer, bias)
        assert held_bytes(optimizer, bias, but_for=["correction"]) == expected
        assert report.plain_state_bytes == expected
        held = sum(held_bytes(optimizer, param) for _, param in params)
        assert held == report.state_bytes


def test_bytes_of_a_stack_equal_the_arithmetic(case):
    experts = Parameter(gradient("start", (3, 12, 10), 0).clone())
    optimizer = case.build([{"params": [("experts", experts)], "stacked": True}])
    layout = layout_of(experts.shape, optimizer.defaults["side"], is_stacked=True)
    for step in range(NUM_STEPS):
        experts.grad = gradient("experts", (3, 12, 10), step).clone()
        optimizer.step()
        (layer,) = optimizer.report().layers
        expected = expected_bytes(optimizer, layout, layer.rank)
        assert held_bytes(optimizer, experts) == expected + sketch_bytes(optimizer, experts)


def test_bytes_fall_in_proportion_when_ranks_fall(case):
    params = make_params()[:3]
    optimizer = case.build(params)
    skip_at_fixed_rank(optimizer)

    def bytes_and_rank_after(rank):
        for _ in range(4):  # past the next refresh
            for _, param in params:  # singular values 1, as many as the rank
                param.grad = torch.eye(*param.shape)
                param.grad[rank:] = 0
            optimizer.step()
        report = optimizer.report()
        assert len({layer.rank for layer in report.layers}) == 1
        waiting = sum(sketch_bytes(optimizer, param) for _, param in params)
        return report.projected_state_bytes - waiting, report.layers[0].rank

    large, large_rank = bytes_and_rank_after(rank=5)
    small, small_rank = bytes_and_rank_after(rank=1)
    assert small_rank == 1 < large_rank
    norms = sum(
        expected_bytes(optimizer, layout_of(param.shape, "short"), 0) for _, param in params
    )
    assert (small - norms) * large_rank == large - norms
    held = sum(held_bytes(optimizer, param) - sketch_bytes(optimizer, param) for _, param in params)
    assert held == small


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_process_holds_fewer_bytes_after_a_refresh_to_a_lower_rank(case, dtype):
    """Counted where memory is allocated, by whatever still holds it."""
    with LiveMemory() as live:
        params = make_params(dtype)[:3]
        optimizer = case.build(params, refresh_energy=None, refresh_relative_norm=None)
        skip_at_fixed_rank(optimizer)
        held = {}
        for rank in (5, 1):
            for _ in range(6):
                for _, param in params:  # singular values 1, as many as the rank
                    param.grad = torch.eye(*param.shape, dtype=dtype)
                    param.grad[rank:] = 0
                optimizer.step()
            waiting = sum(sketch_bytes(optimizer, param) for _, param in params)
            spectra = sum(bytes_of(optimizer.state[param].get("energies")) for _, param in params)
            reported = optimizer.report().state_bytes - waiting
            held[rank] = (live.num_bytes() - waiting - spectra, reported)
    fall_of_process, fall_of_report = (held[5][index] - held[1][index] for index in range(2))
    assert fall_of_process == fall_of_report > 0


def test_state_is_smaller_than_that_of_adamw(case):
    params = make_params()
    optimizer = case.build(params, max_rank=2)
    train(optimizer, params, range(4))
    report = optimizer.report()
    adamw = torch.optim.AdamW([param for _, param in params])
    train(adamw, params, range(1))
    matrices = [param for name, param in params if name in MATRICES]
    adamw_bytes = sum(held_bytes(adamw, param) for param in matrices)
    assert report.adamw_projected_state_bytes == adamw_bytes
    assert report.projected_state_bytes < adamw_bytes / 2


def largest_allocation_allowed(optimizer, weight):
    """Less than the weight, or as much where what lies outside the basis is used too."""
    return weight.numel() - 1 if optimizer.defaults["residual"] == "none" else weight.numel()


@pytest.mark.parametrize("shape", [(48, 40), (40, 48), (3, 40, 48)], ids=str)
def test_a_step_without_refresh_allocates_nothing_as_large_as_the_weight(case, shape):
    # A refresh at every step would be one that looks at the gradient, which is not what is asked.
    calm = {"refresh_max_gap": 100, "refresh_energy": None, "refresh_relative_norm": None}
    weight = Parameter(gradient("start", shape, 0).clone())
    is_stacked = len(shape) > 2
    optimizer = case.build(
        [{"params": [("weight", weight)], "stacked": is_stacked}], **calm, weight_decay=0.1
    )
    weight.grad = gradient("weight", shape, 0).clone()
    for _ in range(case.first_update + 1):
        optimizer.step()
    num_refreshes = optimizer.report().layers[0].num_refreshes
    weight.grad.copy_(gradient("weight", shape, 1))
    with Allocations(known=[weight, weight.grad]) as allocations:
        optimizer.step()
    assert optimizer.report().layers[0].num_refreshes == num_refreshes
    assert 0 < allocations.largest <= largest_allocation_allowed(optimizer, weight)


def test_a_refresh_of_a_float32_weight_makes_no_copy_of_the_gradient(case):
    weight = Parameter(gradient("start", (96, 80), 0).clone())
    optimizer = case.build([("weight", weight)], max_rank=8, oversampling=4)
    if optimizer.defaults["basis"] == "exact":
        pytest.skip("a full singular value decomposition needs full factors")
    weight.grad = gradient("weight", (96, 80), 0).clone()
    for _ in range(2):
        with Allocations(known=[weight, weight.grad]) as allocations:
            optimizer.step()
        assert 0 < allocations.largest <= largest_allocation_allowed(optimizer, weight)
