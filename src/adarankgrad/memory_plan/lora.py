"""Low-rank adapters (LoRA, arXiv 2106.09685) on a model that is only traced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adarankgrad.optim import param_groups


def add_adapters(model: nn.Module, rank: int, dtype: torch.dtype) -> None:
    """Freeze a model and put an adapter beside each linear layer of its blocks.

    They compute what peft's do: ``x @ down @ up`` is added to the layer's result.

    Args:
        model: Its linear layers, but the head, get adapters.
        rank: Columns of ``down``.
        dtype: Of the adapters.
    """
    adapted = [layer for layer in _linear_layers(model)]
    model.requires_grad_(False)
    for layer in adapted:
        num_in, num_out = _sizes(layer)
        layer.adapter_down = nn.Parameter(torch.empty(num_in, rank, dtype=dtype))
        layer.adapter_up = nn.Parameter(torch.empty(rank, num_out, dtype=dtype))
        layer.register_forward_hook(_add_adapted)


def _linear_layers(model: nn.Module) -> list[nn.Module]:
    projected = {
        name for group in param_groups(model) if group["project"] for name, _ in group["params"]
    }
    return [
        module
        for module_name, module in model.named_modules()
        if f"{module_name}.weight" in projected and _is_linear(module)
    ]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """Inputs and outputs; GPT-2's Conv1D keeps its weight the other way round."""
    weight: Any = layer.weight
    first, second = weight.shape
    return (second, first) if isinstance(layer, nn.Linear) else (first, second)


def _add_adapted(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    narrow = inputs[0].to(layer.adapter_down.dtype) @ layer.adapter_down
    added: Tensor = narrow @ layer.adapter_up
    return output + added.to(output.dtype)
