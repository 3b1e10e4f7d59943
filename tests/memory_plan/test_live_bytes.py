"""The counters of memory, by hand: the one that traces, and the benchmark's of the allocator."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from adarankgrad.memory_plan.live_bytes import LiveBytes
from adarankgrad.memory_plan.trace import fake_tensors

KIB = 256
"""Elements of a KiB in float32."""


def chain() -> torch.Tensor:
    """1 KiB, 2 KiB beside it, the first freed, 4 KiB: 3, then 6 KiB at once, and 4 at the end."""
    first = torch.ones(KIB)
    second = torch.cat([first, first])
    del first
    return torch.cat([second, second])


def test_it_counts_what_is_alive_and_what_was_at_once():
    with LiveBytes() as counter:
        kept = chain()
        assert counter.live == 4096
    assert counter.peak == 6 * 1024
    del kept
    assert counter.live == 0


def test_views_known_tensors_and_changes_in_place_take_nothing():
    weight = torch.ones(KIB)
    with LiveBytes([weight]) as counter:
        view = weight.view(16, 16).mT[1:]
        weight.add_(1.0)
    assert counter.live == counter.peak == 0
    assert view.shape == (15, 16)


def test_fake_tensors_count_as_real_ones_do():
    with fake_tensors(), LiveBytes() as counter:
        kept = chain()
    assert kept.shape == (4 * KIB,)
    assert (counter.live, counter.peak) == (4096, 6 * 1024)


def test_a_step_of_a_linear_layer_by_hand():
    """Input 4x8, weight 16x8: the output 256 bytes, its gradient too, and the weight's 512."""
    layer = torch.nn.Linear(8, 16, bias=False)
    inputs = torch.ones(4, 8)
    with LiveBytes([layer.weight, inputs]) as counter:
        output = layer(inputs)
        assert counter.live == 4 * 16 * 4
        output.backward(torch.ones_like(output))
        assert counter.live == 4 * 16 * 4 + 16 * 8 * 4
    assert counter.peak == 2 * 4 * 16 * 4 + 16 * 8 * 4


def test_the_benchmarks_counter_sees_the_same_peak():
    path = Path(__file__).parents[2] / "benchmarks" / "allocations.py"
    spec = importlib.util.spec_from_file_location("allocations", path)
    allocations = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(allocations)
    assert allocations.peak_bytes(chain, torch.device("cpu")) == 6 * 1024
