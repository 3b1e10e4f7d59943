"""The norm of every sample's gradient, read in an ordinary backward pass ("ghost norms").

A layer's gradient is a sum of products of its inputs and the gradients of its outputs, sample by
sample; the norm of each sample's part follows from these without the parts of all layers ever being
held. For a linear layer on a sequence with inputs A and output gradients B, ‖AᵀB‖² = ⟨AAᵀ, BBᵀ⟩
(Goodfellow 2015, arXiv 1510.01799; for sequences Li et al. 2021, arXiv 2110.05679).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.utils import parametrize

from ...core.gradient_noise import (
    GradientNoise,
    noise_of_shares,
    squared_norm,
    squared_norm_of_grads,
)
from .workers import add_over_workers

_USE_OTHERS = "take statistics of micro-batches or per sample"


class SampleNorms:
    """Adds up the squared norms of samples' gradients over the backward passes of a step.

    A context around the forward and backward passes of a step. It needs a model whose layers with
    weights have samples along the first axis of their one input and of their output, each used
    once in a forward pass; that holds for LLaMA. Nothing is changed.

    Args:
        model: all of whose trained weights to watch.
        group: process group of the workers; None: the default one, if there is any.

    Raises:
        ValueError: a weight is used by two layers, or is parametrised.

    Memory: inputs of the watched layers, most of which autograd keeps anyway; for linear layers
    and embeddings (b, T, T), or one sample's gradient of the layer where T² is more; for other
    layers their gradients for all samples of a micro-batch. Time: about that of weight gradients
    once more.
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.layers = {
            name or "the model": module
            for name, module in model.named_modules()
            if any(param.requires_grad for param in module.parameters(recurse=False))
        }
        self.params = [
            param
            for layer in self.layers.values()
            for param in layer.parameters(recurse=False)
            if param.requires_grad
        ]
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._total: Tensor | None = None
        self._num_samples: Counter[str] = Counter()
        self._is_reading = False
        self._refused = ""
        _refuse_shared(self.layers)

    def __enter__(self) -> SampleNorms:
        """Start to read, from zero."""
        self._total, self._refused = None, ""
        self._num_samples.clear()
        self._handles = [
            layer.register_forward_hook(partial(self._watch, name), with_kwargs=True)
            for name, layer in self.layers.items()
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the model alone from now on."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def noise(
        self, num_micro_batches: int, num_samples: int, squared_mean: float | None = None
    ) -> GradientNoise:
        """Return mean and spread of the samples that were read; synchronises the device.

        Call it after the last backward pass and before gradients are clipped or unscaled.

        Args:
            num_micro_batches: forward passes of the step, of this worker.
            num_samples: in the batch, at least 2, over all workers.
            squared_mean: ‖ḡ‖²; None: read from ``.grad``.

        Raises:
            ValueError: a layer was not used once for every sample, or has not samples along the
                first axis of one input and one output; or workers took different numbers of
                micro-batches.
        """
        if self._refused:
            raise ValueError(f"{self._refused}: {_USE_OTHERS}")
        if squared_mean is None:
            squared_mean = squared_norm_of_grads(self.params)
        total = 0.0 if self._total is None else float(self._total)
        total, num_workers = add_over_workers(
            total, num_micro_batches, self.params[0].device, self.group
        )
        for name, count in self._num_samples.items():
            if count * num_workers != num_samples:
                raise ValueError(
                    f"{name} saw {count} of {num_samples // num_workers} samples: it is used "
                    f"several times in a forward pass, or not for every sample: {_USE_OTHERS}"
                )
        return noise_of_shares(total, squared_mean, num_samples, num_samples)

    def _watch(
        self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any
    ) -> None:
        if self._is_reading or not torch.is_grad_enabled():
            return
        inputs = [*args, *kwargs.values()]
        if not (len(inputs) == 1 and isinstance(inputs[0], Tensor) and isinstance(output, Tensor)):
            self._refused = f"{name} has not one tensor as input and as output"
            return
        read = partial(self._read, name, layer, inputs[0].detach())
        output.register_hook(read)  # type: ignore[no-untyped-call]

    def _read(self, name: str, layer: nn.Module, inputs: Tensor, grad: Tensor) -> None:
        self._num_samples[name] += inputs.shape[0]
        if inputs.shape[0] != grad.shape[0]:
            self._refused = f"{name} does not keep samples along the first axis"
            return
        self._is_reading = True
        try:
            with torch.no_grad():
                squared = _rule(layer)(layer, inputs, grad.detach())
        finally:
            self._is_reading = False
        self._total = squared if self._total is None else self._total + squared


def _rule(layer: nn.Module) -> Callable[[Any, Tensor, Tensor], Tensor]:
    if type(layer) is nn.Linear:
        return _linear
    if type(layer) is nn.Embedding and layer.max_norm is None and not layer.scale_grad_by_freq:
        return _embedding
    return _any_layer


def _linear(layer: nn.Linear, inputs: Tensor, grad: Tensor) -> Tensor:
    """Return Σ‖g_i‖² of a linear layer, from (b, ..., d_in) and (b, ..., d_out)."""
    rows, grads = (_sequences(each) for each in (inputs, grad))
    total = grads.new_zeros((), dtype=torch.float64)
    if layer.weight.requires_grad:
        is_gram_smaller = rows.shape[1] ** 2 <= rows.shape[2] * grads.shape[2]
        total = total + (_gram if is_gram_smaller else _outer)(rows, grads)
    if layer.bias is not None and layer.bias.requires_grad:
        total = total + squared_norm([grads.sum(dim=1)])
    return total


def _gram(rows: Tensor, grads: Tensor) -> Tensor:
    return ((rows @ rows.mT) * (grads @ grads.mT)).sum(dtype=torch.float64)


def _outer(rows: Tensor, grads: Tensor) -> Tensor:
    return torch.stack([squared_norm([a.mT @ b]) for a, b in zip(rows, grads, strict=True)]).sum()


def _embedding(layer: nn.Embedding, inputs: Tensor, grad: Tensor) -> Tensor:
    """Return Σ‖g_i‖² of a table of rows, from indices (b, ...) and (b, ..., d)."""
    grads, indices = _sequences(grad), inputs.reshape(inputs.shape[0], -1)
    if layer.padding_idx is not None:
        grads = grads * (indices != layer.padding_idx).unsqueeze(-1)
    is_same_row = indices.unsqueeze(1) == indices.unsqueeze(2)
    return ((grads @ grads.mT) * is_same_row).sum(dtype=torch.float64)


def _any_layer(layer: nn.Module, inputs: Tensor, grad: Tensor) -> Tensor:
    """Return Σ‖g_i‖² of any layer that works on samples one by one."""
    weights = {
        name: param.detach()
        for name, param in layer.named_parameters(recurse=False)
        if param.requires_grad
    }

    def squared(sample: Tensor, sample_grad: Tensor) -> Tensor:
        def outputs_of(watched: dict[str, Tensor]) -> Any:
            return functional_call(layer, watched, (sample.unsqueeze(0),))

        pull_back: Any = vjp(outputs_of, weights)[1]
        (grads,) = pull_back(sample_grad.unsqueeze(0))
        return squared_norm(list(grads.values()))

    total: Tensor = vmap(squared)(inputs, grad).sum()
    return total


def _sequences(values: Tensor) -> Tensor:
    """View (b, ..., d) as (b, T, d), in float32 or wider."""
    wide = torch.promote_types(values.dtype, torch.float32)
    return values.reshape(values.shape[0], -1, values.shape[-1]).to(wide)


def _refuse_shared(layers: dict[str, nn.Module]) -> None:
    users: dict[int, str] = {}
    for name, layer in layers.items():
        if isinstance(layer, parametrize.ParametrizationList):
            raise ValueError(f"{name} holds a parametrised weight: {_USE_OTHERS}")
        for param in layer.parameters(recurse=False):
            if users.setdefault(id(param), name) != name:
                raise ValueError(
                    f"{users[id(param)]} and {name} share a weight, whose gradients would have to "
                    f"be added sample by sample: {_USE_OTHERS}"
                )
