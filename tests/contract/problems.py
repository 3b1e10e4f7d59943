"""Parameters, gradients whose rank changes from step to step, and what is compared afterwards."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

NamedParams = list[tuple[str, Parameter]]

SHAPES = {"tall": (24, 16), "wide": (12, 20), "square": (16, 16), "bias": (16,)}
MATRICES = tuple(name for name, shape in SHAPES.items() if len(shape) > 1)
# Rank of the gradients of a step; the first is the highest, so that monotone ranks fall as well.
RANK_PATTERN = (6, 2, 4, 1, 5, 3, 2)


def random_tensor(shape: Iterable[int], *key: Any) -> Tensor:
    """Standard normal numbers that depend on the key alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    return torch.randn(tuple(shape), generator=generator)


def make_params(
    dtype: torch.dtype = torch.float32, shapes: dict[str, tuple[int, ...]] = SHAPES
) -> NamedParams:
    """The same named parameters at every call."""
    return [
        (name, Parameter(random_tensor(shape, "weight", name).to(dtype)))
        for name, shape in shapes.items()
    ]


@functools.cache
def gradient(name: str, shape: tuple[int, ...], step: int, salt: str = "") -> Tensor:
    """A float32 gradient; that of a matrix is of a rank that changes from step to step."""
    if len(shape) < 2:
        return random_tensor(shape, "gradient", name, step, salt)
    rank = RANK_PATTERN[(step + len(salt)) % len(RANK_PATTERN)]
    rows, cols = shape[-2:]
    left = random_tensor((*shape[:-2], rows, rank), "left", name, step, salt)
    right = random_tensor((*shape[:-2], rank, cols), "right", name, step, salt)
    noise = random_tensor(shape, "noise", name, step, salt)
    return left @ right + 0.01 * noise


def set_gradients(params: NamedParams, step: int, salt: str = "") -> None:
    for name, param in params:
        param.grad = gradient(name, tuple(param.shape), step, salt).to(param.dtype, copy=True)


def train(optimizer: Optimizer, params: NamedParams, steps: Iterable[int], salt: str = "") -> None:
    """Take the given steps of a training that is the same whenever it is repeated."""
    for step in steps:
        set_gradients(params, step, salt)
        optimizer.step()


def weights_of(params: NamedParams) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in params}


def ranks_of(optimizer: Any) -> list[int]:
    return [layer.rank for layer in optimizer.report().layers]


def assert_same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name


def state_snapshot(optimizer: Optimizer) -> dict[str, Any]:
    """State by parameter position, with tensors copied."""
    return {
        f"{position}/{key}": value.clone() if isinstance(value, Tensor) else value
        for position, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def assert_same_state(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        if isinstance(value, Tensor):
            assert value.dtype == right[name].dtype, name
            assert torch.equal(value, right[name]), name
        else:
            assert type(value) is type(right[name]), name
            assert value == right[name], name


def skip_at_fixed_rank(optimizer):
    """For tests of how ranks change."""
    if optimizer.defaults["energy"] == 1.0:
        pytest.skip("a method of fixed rank")


def skip_where_weights_depend_on_others(optimizer):
    """For tests of weights that are trained apart."""
    if optimizer.defaults["stagger"]:
        pytest.skip("a weight's turn to be refreshed depends on its place among the others")
    if optimizer.defaults["memory_budget"] is not None:
        pytest.skip("a weight's rank depends on what the others leave it")


def skip_where_rounded_at_random(optimizer, dtype=torch.float32):
    """For tests of equality with what is rounded otherwise, or in other places."""
    if optimizer.defaults["state_dtype"] != "float32":
        pytest.skip("moments are rounded at random")
    if optimizer.defaults["weight_rounding"] != "nearest" and dtype is torch.bfloat16:
        pytest.skip("weights are not rounded to the nearest")
