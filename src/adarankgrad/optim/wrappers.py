"""Models of which a process holds but one copy or shard, whose gradients are not final here."""

from __future__ import annotations

import torch
from torch import nn

# By name, since importing them is slow.
_WRAPPERS = {
    "DistributedDataParallel",
    "FullyShardedDataParallel",
    "FSDPModule",
    "DeepSpeedEngine",
}


def check_is_unwrapped(model: nn.Module) -> None:
    """Refuse a model whose gradients other processes have a part in.

    Raises:
        ValueError: naming the wrapper and what to do.
    """
    for name, module in model.named_modules():
        found = _WRAPPERS.intersection(base.__name__ for base in type(module).__mro__)
        if found:
            raise ValueError(f"{name or 'the model'} is in {found.pop()}: {_REASON}")
    for name, param in model.named_parameters():
        if hasattr(param, "full_tensor"):
            raise ValueError(f"{name} is a DTensor: {_REASON}")
    if _num_processes() > 1:
        raise ValueError(f"this is one of {_num_processes()} processes: {_REASON}")


_REASON = (
    "accumulate_in_backward projects gradients before they are averaged over processes, so the "
    "copies of the model would drift apart. Train in one process with more micro-batches, or "
    "without accumulate_in_backward"
)


def _num_processes() -> int:
    distributed = torch.distributed
    is_group = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if is_group else 1
