"""Floating-point operations of training, by formula.

A weight of a matrix takes two operations a token in the forward pass, two for the gradient by its
input and, where it is trained, two for its own: 6 in all, or 4. Attention adds 12 · length · width
for each layer and token, of which causal masks save nothing, as in PaLM's formula (arXiv
2204.02311). Embeddings are looked up; norms, activations, gradient checkpointing and the optimizer
are left out.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from adarankgrad.core.layers import is_transposed_linear
from adarankgrad.schedules.depth import ProgressiveDepth, find_layers
from adarankgrad.schedules.depth.layers import text_config


class TrainingFlops:
    """Counts the operations of forward and backward passes.

    Args:
        model: Whose sizes decide.
        depth: How many of its layers run; None for all.
    """

    def __init__(self, model: nn.Module, depth: ProgressiveDepth | None = None) -> None:
        self._depth = depth
        self._is_known = _is_covered(model)
        layer_list = None if depth is None else depth.config.layer_list
        try:
            layers = list(find_layers(model, layer_list).modules)
        except ValueError:  # all of them run as one
            layers = []
        in_layers = {id(module) for layer in layers for module in layer.modules()}
        self._num_layers = len(layers)
        self._of_layers = sum(_of_token(module) for layer in layers for module in layer.modules())
        self._of_others = sum(
            _of_token(module) for module in model.modules() if id(module) not in in_layers
        )
        config = text_config(model)
        self._attention = 12 * _attention_width(config)
        self._num_attention_layers = len(layers) or getattr(config, "num_hidden_layers", 0)

    def of(self, num_tokens: int, length: int) -> int | None:
        """Return the operations for so many tokens in rows of a length, at the present depth.

        None where the model has weights that the formula does not cover: convolutions, stacked
        experts, and matrices outside linear layers.
        """
        if not self._is_known:
            return None
        if self._depth is None:
            layers, num_attention_layers = self._of_layers, self._num_attention_layers
        else:
            num_attention_layers = self._depth.depth
            layers = self._of_layers * num_attention_layers // self._num_layers
        attention = num_attention_layers * self._attention * length
        return num_tokens * (self._of_others + layers + attention)


def _of_token(module: nn.Module) -> int:
    """Operations a token in a linear layer; 0 for other modules."""
    if isinstance(module, nn.Linear):
        num_weights = module.in_features * module.out_features
    elif is_transposed_linear(module):
        num_weights = int(module.nx) * int(module.nf)  # type: ignore[arg-type]
    else:
        return 0
    is_trained = any(param.requires_grad for param in module.parameters())
    return (6 if is_trained else 4) * num_weights


def _is_covered(model: nn.Module) -> bool:
    covered = {
        id(param)
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Embedding) or is_transposed_linear(module)
        for param in module.parameters()
    }
    return all(param.dim() < 2 or id(param) in covered for param in model.parameters())


def _attention_width(config: Any) -> int:
    heads, head_dim = (getattr(config, name, None) for name in ("num_attention_heads", "head_dim"))
    if heads and head_dim:
        return int(heads * head_dim)
    return int(getattr(config, "hidden_size", None) or 0)
