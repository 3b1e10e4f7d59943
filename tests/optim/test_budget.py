"""A memory budget is held at every step, follows the gradients, and is refused where it is none."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from adarankgrad import AdaRankGrad, describe
from adarankgrad.core.memory import projected_state_bytes
from adarankgrad.core.projection import layout_of
from adarankgrad.optim.options import parse_budget

SHAPES = [(24, 16), (16, 24), (20, 20)]
ADAMW_BYTES = sum(8 * rows * cols for rows, cols in SHAPES)
OPTIONS = {"min_rank": 1, "max_rank": 1.0, "energy": 1.0, "refresh_max_gap": 3}


def low_rank_gradient(shape, rank, generator):
    left = torch.randn(shape[0], rank, generator=generator)
    return left @ torch.randn(rank, shape[1], generator=generator)


def train(optimizer, weights, ranks_of_gradients, num_steps, seed=0):
    """Yield after every step; the gradients' ranks are given per weight."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_steps):
        for weight, rank in zip(weights, ranks_of_gradients, strict=True):
            weight.grad = low_rank_gradient(weight.shape, rank, generator)
        optimizer.step()
        yield optimizer.report()


@pytest.mark.parametrize("budget", [0.1, 0.2, 0.5, 1.0, 2000, "3KiB"])
@pytest.mark.parametrize("stagger", [False, True])
def test_the_budget_is_never_exceeded_while_ranks_rise_and_fall(budget, stagger):
    weights = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = AdaRankGrad(weights, **OPTIONS, memory_budget=budget, stagger=stagger)
    parsed = parse_budget(budget)
    allowed = parsed * ADAMW_BYTES if isinstance(parsed, float) else parsed
    for ranks in ([16, 1, 1], [1, 16, 1], [1, 1, 20], [8, 8, 8]):
        for report in train(optimizer, weights, ranks, 7):
            assert 0 < report.projected_state_bytes <= allowed


def test_the_budget_is_not_exceeded_by_weights_whose_first_gradients_come_late():
    """The first holds more than its share when the others, at one step, find their first bases."""
    weights = [nn.Parameter(torch.randn(24, 24)) for _ in range(6)]
    budget = 6 * 8 * 24 * 24 // 4
    optimizer = AdaRankGrad(weights, **OPTIONS, memory_budget=budget)
    generator = torch.Generator().manual_seed(0)
    for step in range(9):
        for weight in weights[1:] if step >= 4 else []:
            weight.grad = torch.randn(24, 24, generator=generator)
        # All energy, so a high rank, but little of it beyond the first direction: a small share.
        strong = low_rank_gradient((24, 24), 1, generator) if step >= 3 else 0.0
        weights[0].grad = strong + 0.01 * torch.randn(24, 24, generator=generator)
        optimizer.step()
        assert optimizer.report().projected_state_bytes <= budget
    assert all(layer.rank >= 1 for layer in optimizer.report().layers)


@pytest.mark.parametrize("basis", ["randomized", "sketched"])
def test_weights_that_are_added_wait_until_the_others_leave_them_something(basis):
    weights = [nn.Parameter(torch.randn(20, 20)) for _ in range(3)]
    # Twelve directions of 61 numbers: all for the first weight, then at least three for each.
    budget = 12 * 61 * 4
    optimizer = AdaRankGrad(
        weights[:1], **{**OPTIONS, "min_rank": 3}, basis=basis, memory_budget=budget
    )
    list(train(optimizer, weights[:1], [20], 5))
    assert optimizer.report().layers[0].rank == 12
    optimizer.add_param_group({"params": weights[1:]})
    waited = False
    for report in train(optimizer, weights, [20] * 3, 9, seed=1):
        ranks = [layer.rank for layer in report.layers]
        assert sum(ranks) * 61 * 4 <= budget
        waited |= min(ranks) == 0
    assert waited
    assert min(ranks) >= 3


def test_the_sketch_between_two_steps_is_held_beside_the_budget():
    weights = [nn.Parameter(torch.randn(20, 20)) for _ in range(3)]
    optimizer = AdaRankGrad(weights, **OPTIONS, basis="sketched", memory_budget=0.3)
    for report in train(optimizer, weights, [20] * 3, 8):
        sketches = sum(4 * optimizer.state[weight]["sketch"].numel() for weight in weights)
        assert report.projected_state_bytes - sketches <= 0.3 * 3 * 8 * 400


def test_ranks_move_to_the_weights_whose_gradients_need_them():
    weights = [nn.Parameter(torch.randn(20, 20)) for _ in range(2)]
    optimizer = AdaRankGrad(weights, **OPTIONS, memory_budget=0.6)
    for ranks in ([12, 2], [2, 12]):
        *_, report = train(optimizer, weights, ranks, 10)
        needy, modest = (report.layers[i].rank for i in (ranks.index(12), ranks.index(2)))
        assert modest == 2
        assert needy == 12


def test_most_of_a_tight_budget_is_used():
    """All but one direction of the largest matrix, which is what a refresh may have to wait for."""
    weights = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = AdaRankGrad(weights, **OPTIONS, memory_budget=0.3)
    *_, report = train(optimizer, weights, [16, 16, 20], 12)
    largest = max(projected_state_bytes(layout_of(torch.Size(shape)), 1) for shape in SHAPES)
    assert 0.3 * ADAMW_BYTES - report.projected_state_bytes < largest


def test_a_resumed_run_divides_as_the_uninterrupted_one():
    """By plain values in the state, which a file of weights only can hold."""
    weights = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = AdaRankGrad(weights, **OPTIONS, memory_budget=0.2)
    list(train(optimizer, weights, [5, 9, 3], 8))
    copies = copy.deepcopy(weights)
    resumed = AdaRankGrad(copies, **OPTIONS, memory_budget=0.2)
    resumed.load_state_dict(optimizer.state_dict())
    for run, params in ((optimizer, weights), (resumed, copies)):
        list(train(run, params, [2, 2, 12], 8, seed=1))
    assert all(torch.equal(left, right) for left, right in zip(weights, copies, strict=True))


@pytest.mark.parametrize("budget", [0, -5, 0.0, 1.5, "512", "1 parsec", "-1MiB", True, [1]])
def test_what_is_no_budget_is_refused(budget):
    with pytest.raises(ValueError, match="memory_budget must be bytes"):
        AdaRankGrad([nn.Parameter(torch.ones(4, 4))], memory_budget=budget)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("512MiB", 512 * 2**20), ("1.5GiB", 3 * 2**29), ("20 kB", None), ("3 KB", 3000), ("7B", 7)],
)
def test_sizes_are_read_with_their_units(text, expected):
    if expected is None:
        with pytest.raises(ValueError, match="memory_budget"):
            parse_budget(text)
    else:
        assert parse_budget(text) == expected


def test_a_budget_too_small_for_the_minimum_ranks_is_refused_at_once():
    weights = [nn.Parameter(torch.ones(shape)) for shape in SHAPES]
    with pytest.raises(ValueError, match="budget of 1000 bytes .*minimum ranks, which take 3"):
        AdaRankGrad(weights, min_rank=4, memory_budget=1000)
    with pytest.raises(ValueError, match="minimum ranks"):
        AdaRankGrad([{"params": weights}], min_rank=4, memory_budget=1000)


def test_a_group_that_the_budget_does_not_hold_is_not_added():
    weights = [nn.Parameter(torch.ones(20, 20)) for _ in range(2)]
    optimizer = AdaRankGrad(weights[:1], min_rank=4, memory_budget=1000)
    with pytest.raises(ValueError, match="minimum ranks"):
        optimizer.add_param_group({"params": weights[1:]})
    assert len(optimizer.param_groups) == 1


def test_a_budget_of_one_group_alone_is_refused():
    groups = [{"params": [nn.Parameter(torch.ones(4, 4))], "memory_budget": 0.5}]
    groups.append({"params": [nn.Parameter(torch.ones(4, 4))]})
    with pytest.raises(ValueError, match="memory_budget is of the whole optimizer"):
        AdaRankGrad(groups)


def test_a_budget_without_anything_to_project_changes_nothing():
    weight = nn.Parameter(torch.ones(8, 8))
    optimizer = AdaRankGrad([weight], project=False, memory_budget=0.5)
    weight.grad = torch.ones(8, 8)
    optimizer.step()
    assert optimizer.report().projected_state_bytes == 0


def test_the_description_names_the_budget():
    weight = nn.Parameter(torch.ones(8, 8))
    assert "memory budget, 1KiB" in describe(AdaRankGrad([weight], memory_budget="1KiB"))
    assert "budget" not in describe(AdaRankGrad([weight]))


def test_nothing_is_bound_when_the_budget_is_checked():
    weight = nn.Parameter(torch.ones(8, 8))
    assert not AdaRankGrad([weight], memory_budget=0.5).state


@pytest.mark.parametrize("bases", [("none", "none"), ("none", "randomized")], ids=str)
def test_weights_without_a_basis_take_nothing_of_the_budget(bases):
    weights = [nn.Parameter(torch.randn(24, 16)) for _ in bases]
    groups = [{"params": [w], "basis": basis} for w, basis in zip(weights, bases, strict=True)]
    optimizer = AdaRankGrad(groups, **OPTIONS, memory_budget=2000)
    for report in train(optimizer, weights, [3, 3], 2):
        assert report.layers[0].state_bytes == 0
        assert report.projected_state_bytes == report.layers[-1].state_bytes <= 2000
