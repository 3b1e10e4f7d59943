"""How a model grows: layers become copies of others, and so may their optimizer state."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@torch.no_grad()
def copy_layers(
    layers: Sequence[nn.Module],
    sources: Sequence[int],
    optimizers: Sequence[Optimizer],
    optimizer_state: str,
) -> None:
    """Make layer j a copy of layer ``sources[j]``, weights and buffers, in place.

    Args:
        layers: of a model, of equal structure.
        sources: for each of the first layers, a number no larger than its own.
        optimizers: whose state of replaced layers is changed as well.
        optimizer_state: see `DepthConfig`.

    Memory: a copy of the replaced layers' state, where that is copied.
    """
    # From the top: what a layer is copied from has not been replaced yet.
    for target, source in reversed([*enumerate(sources)]):
        if source == target:
            continue
        for old, new in _pairs(layers[target], layers[source]):
            old.copy_(new)
            for optimizer in optimizers:
                _change_state(optimizer, old, new, optimizer_state)


def check_state_can_be_copied(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose state may not grow by copying.

    Raises:
        ValueError: it keeps all of its state within a budget.
    """
    if any(group.get("memory_budget") is not None for group in optimizer.param_groups):
        raise ValueError(
            "optimizer_state='copied' would multiply state that memory_budget holds together; use "
            "optimizer_state='fresh'"
        )


def _pairs(target: nn.Module, source: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(target.parameters(), source.parameters(), strict=True)
    yield from zip(target.buffers(), source.buffers(), strict=True)


def _change_state(optimizer: Optimizer, old: Tensor, new: Tensor, optimizer_state: str) -> None:
    if optimizer_state == "kept":
        return
    optimizer.state.pop(old, None)
    if optimizer_state == "copied" and new in optimizer.state:
        optimizer.state[old] = copy.deepcopy(optimizer.state[new])
