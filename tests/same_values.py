"""Comparison of whatever a checkpoint holds."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_flatten_with_path


def assert_same_values(first: Any, second: Any) -> None:
    """Compare nested containers of tensors and plain values, bit for bit; tables in any order."""
    leaves, structure = tree_flatten_with_path(_in_order(first))
    others, other_structure = tree_flatten_with_path(_in_order(second))
    assert structure == other_structure
    for (path, leaf), (_, other) in zip(leaves, others, strict=True):
        assert type(leaf) is type(other), path
        if isinstance(leaf, torch.Tensor):
            assert leaf.dtype == other.dtype, path
            assert torch.equal(leaf, other), path
        else:
            assert leaf == other, path


def _in_order(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _in_order(value[key]) for key in sorted(value, key=str)}
    if isinstance(value, list | tuple):
        return [_in_order(item) for item in value]
    return value
