"""`torch.distributed.checkpoint` for optimizers whose state changes its shapes from step to step.

DCP loads into tensors that are there already. Those of an optimizer that never stepped come from a
step with zero gradients (`torch.distributed.checkpoint.state_dict`), at rank 0; the saved ones have
the ranks that training had reached.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

_MARK = "basis"  # which the state of every projected weight has, and no other optimizer's

Path = tuple[Any, ...]


class SubspaceLoadPlanner(DefaultLoadPlanner):
    """Gives the optimizer's state the keys, shapes and dtypes that the checkpoint has.

    Everything else (the model, plain weights, other optimizers) loads as by torch's default
    planner, and a weight of another shape stays an error. For training in one process; state nested
    as ``get_state_dict`` returns it, or flattened.

    Memory: the saved state once more, until ``set_state_dict`` has copied it.

    Example:
        >>> import torch.distributed.checkpoint as dcp
        >>> from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
        >>> weights, state = get_state_dict(model, optimizer)  # doctest: +SKIP
        >>> loaded = {"model": weights, "optimizer": state}  # doctest: +SKIP
        >>> dcp.load(loaded, checkpoint_id=folder, planner=SubspaceLoadPlanner())  # doctest: +SKIP
        >>> set_state_dict(
        ...     model,
        ...     optimizer,
        ...     model_state_dict=loaded["model"],
        ...     optim_state_dict=loaded["optimizer"],
        ... )  # doctest: +SKIP
    """

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Prepare ``state_dict`` in place, then plan as torch does."""
        if metadata is not None and metadata.planner_data is not None:
            _take_saved_keys_and_shapes(state_dict, metadata)
        super().set_up_planner(state_dict, metadata, is_coordinator)


def _take_saved_keys_and_shapes(state_dict: dict[str, Any], metadata: Metadata) -> None:
    saved: dict[Path, dict[str, Any]] = defaultdict(dict)
    for name, path in metadata.planner_data.items():
        saved[tuple(path[:-1])][path[-1]] = metadata.state_dict_metadata[name]
    for container, entries in saved.items():
        prefixes = [
            key.removesuffix(_MARK)
            for key, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata) and _is_mark(key)
        ]
        holder = _find(state_dict, container)
        if holder is None:
            continue
        for prefix in prefixes:
            _fill(holder, prefix, entries)
        if "" in prefixes:  # state by weight: of those that got no gradient, nothing was saved
            weights = _find(state_dict, container[:-1]) or {}
            for name in [name for name in weights if (*container[:-1], name) not in saved]:
                del weights[name]


def _is_mark(key: Any) -> bool:
    return isinstance(key, str) and (key == _MARK or key.endswith(f".{_MARK}"))


def _fill(holder: dict[str, Any], prefix: str, entries: dict[str, Any]) -> None:
    """Replace one weight's state by empty tensors of the saved shapes, and zeros to be replaced."""
    mark = holder.get(f"{prefix}{_MARK}")
    device = mark.device if isinstance(mark, torch.Tensor) else torch.device("cpu")
    for key in [key for key in holder if key.startswith(prefix)]:
        del holder[key]
    for key, entry in entries.items():
        if key.startswith(prefix):
            holder[key] = (
                torch.empty(entry.size, dtype=entry.properties.dtype, device=device)
                if isinstance(entry, TensorStorageMetadata)
                else 0
            )


def _find(state_dict: dict[str, Any], path: Path) -> dict[str, Any] | None:
    for key in path:
        if not isinstance(state_dict, dict) or key not in state_dict:
            return None
        state_dict = state_dict[key]
    return state_dict if isinstance(state_dict, dict) else None
