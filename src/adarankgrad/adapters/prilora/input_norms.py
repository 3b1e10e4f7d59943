"""Running means of the L2 norm of each input feature of layers, over the tokens of a whole step.

A step's norm of a feature takes in all micro-batches and all processes, so that it does not depend
on how a batch is divided. Sums are float32 (float64 for wider inputs).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class InputNorms:
    """Norms of the inputs of some layers.

    Args:
        model: that the layers are in; its argument ``attention_mask`` of shape (batch, tokens)
            takes padding out of inputs of shape (batch, tokens, features) or (batch * tokens,
            features).
        layers: by name, with the number of their input features.
        decay: β of the running mean x̄ ← β x̄ + (1 − β) ‖X‖, from zero. The mean's common factor
            1 − βᵗ does not change an order within a layer, so it is not taken out.

    Memory: two vectors of a layer's input features a layer. `update` sends one of them, for all
    layers together, in a single all-reduce.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, tuple[Any, Any]], *, decay: float
    ) -> None:
        self.decay = decay
        self.means: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._mask: Tensor | None = None
        self._handles = [
            model.register_forward_pre_hook(self._remember_mask, with_kwargs=True, prepend=True)
        ]
        for name, (layer, num_features) in layers.items():
            self.means[name] = torch.zeros(num_features)
            self._sums[name] = torch.zeros(num_features)
            self._handles.append(layer.register_forward_pre_hook(self._watcher(name)))

    def update(self) -> None:
        """Move the running means by what was seen since the last call.

        Call on all processes at the same step. A layer that saw nothing, or a norm that is not
        finite, keeps its mean.
        """
        self._sum_over_processes()
        for name, sums in self._sums.items():
            mean = self.means[name].to(sums.device, sums.dtype)
            moved = torch.lerp(sums.sqrt(), mean, self.decay)
            is_usable = sums.any() & sums.isfinite().all()
            self.means[name] = torch.where(is_usable, moved, mean)
            sums.zero_()

    def remove(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()

    def _remember_mask(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        mask = kwargs.get("attention_mask")
        if mask is None and args:
            names = list(inspect.signature(module.forward).parameters)
            mask = dict(zip(names, args, strict=False)).get("attention_mask")
        is_usable = isinstance(mask, Tensor) and mask.dim() == 2
        self._mask = mask.bool() if is_usable else None  # type: ignore[union-attr]

    def _watcher(self, name: str) -> Any:
        def watch(module: nn.Module, args: tuple[Any, ...]) -> None:
            # Activation checkpointing runs the layer once more, inside the backward pass, and what
            # differentiates single samples by torch.func runs it on inputs seen before.
            is_repeated = (
                torch._C._current_graph_task_id() != -1
                or torch._C._are_functorch_transforms_active()
            )
            if module.training and not is_repeated:
                self._add(name, args[0].detach())

        return watch

    def _add(self, name: str, inputs: Tensor) -> None:
        rows = inputs.reshape(-1, inputs.shape[-1])
        mask = self._mask
        if mask is not None and inputs.shape[:-1] in (mask.shape, (mask.numel(),)):
            is_padding = ~mask.to(inputs.device).reshape(-1, 1)
            rows = rows.masked_fill(is_padding, 0.0)
        dtype = torch.promote_types(rows.dtype, torch.float32)
        norms = torch.linalg.vector_norm(rows, dim=0, dtype=dtype)
        self._sums[name] = self._sums[name].to(norms.device, norms.dtype).add_(norms.square())

    def _sum_over_processes(self) -> None:
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return
        sums = list(self._sums.values())
        device = next((each.device for each in sums if each.device.type != "cpu"), sums[0].device)
        together = torch.cat([each.to(device, torch.float32) for each in sums])
        dist.all_reduce(together)
        totals = torch.split(together, [len(each) for each in sums])
        for each, total in zip(sums, totals, strict=True):
            each.copy_(total)
