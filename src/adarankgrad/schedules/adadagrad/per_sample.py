"""Exact statistics of every sample's gradient, by `torch.func`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...core.gradient_noise import (
    SampleSums,
    inner_product,
    pool,
    squared_norm,
    sums_of_samples,
)

Sample = Mapping[str, Tensor]
SampleLoss = Callable[[Callable[..., Any], Sample], Tensor]

_BatchNorm = nn.modules.batchnorm._BatchNorm


def per_sample_sums(
    model: nn.Module,
    loss: SampleLoss,
    batch: Sample,
    mean_grads: Mapping[str, Tensor],
    *,
    num_samples: int,
    chunk_size: int = 1,
) -> SampleSums:
    """Return sums over the samples of a batch, or of a part of it, by a gradient for each.

    g_i is b times the gradient of sample i's share in the batch's loss, so that its mean is ḡ also
    where samples weigh differently, as sequences of different lengths do under a mean over tokens.
    Sums of parts are added by `core.gradient_noise.pool`.

    Nothing is changed: not the weights, their ``.grad``, buffers, or the state of random number
    generators. Dropout draws masks of its own here.

    Args:
        model: in the mode it is trained in.
        loss: takes a function to call as the model, and one sample, a batch of size 1; returns the
            sample's share in the batch's loss, no axes.
        batch: tensors whose first axis counts samples.
        mean_grads: ḡ by parameter name, of the weights to watch.
        num_samples: b of the whole batch.
        chunk_size: samples at once, at least 1. More than one are computed by ``vmap``, for which
            a model must not decide anything by the values of a tensor, as those of transformers do
            by an attention mask.

    Raises:
        ValueError: batch normalisation in training mode, under which a sample's gradient is not its
            own; or `torch.func` cannot run the model, with this ``chunk_size`` or at all.

    Memory: ``chunk_size`` gradients, and the activations of as many samples. Time: a forward and a
    backward pass over the batch.

    Example:
        >>> import torch
        >>> layer, inputs = torch.nn.Linear(4, 1), torch.randn(8, 4)
        >>> layer(inputs).square().mean().backward()
        >>> sums = per_sample_sums(
        ...     layer,
        ...     lambda call, sample: call(sample["inputs"]).square().sum() / 8,
        ...     {"inputs": inputs},
        ...     {name: param.grad for name, param in layer.named_parameters()},
        ...     num_samples=8,
        ... )
    """
    _refuse_batch_norms(model)
    weights = {name: model.get_parameter(name).detach() for name in mean_grads}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    means = [mean_grads[name] for name in weights]

    def share(watched: dict[str, Tensor], sample: Sample) -> Tensor:
        def call(*args: Any, **kwargs: Any) -> Any:
            return functional_call(model, (watched, buffers), args, kwargs)

        return loss(call, sample)

    def numbers(sample: Sample) -> tuple[Tensor, Tensor]:
        grads = list(grad(share)(weights, sample).values())
        return squared_norm(grads), inner_product(grads, means)

    total = SampleSums(0, 0.0, 0.0, 0.0)
    devices = {weight.device for weight in weights.values() if weight.device.type == "cuda"}
    # The fused attention kernels have no rule for vmap.
    with torch.random.fork_rng(devices=devices), sdpa_kernel(SDPBackend.MATH):
        for chunk in _chunks(batch, chunk_size):
            squared, inner = _of_chunk(numbers, chunk)
            total = pool(total, sums_of_samples(squared * num_samples**2, inner * num_samples))
    return total


def _of_chunk(
    numbers: Callable[[Sample], tuple[Tensor, Tensor]], chunk: Sample
) -> tuple[Tensor, Tensor]:
    """Return two numbers of each sample, (b,) each."""
    is_one = all(len(value) == 1 for value in chunk.values())

    def of_one(sample: Sample) -> tuple[Tensor, Tensor]:
        return numbers({name: value.unsqueeze(0) for name, value in sample.items()})

    try:
        if is_one:
            squared, inner = numbers(chunk)
            return squared.reshape(1), inner.reshape(1)
        return vmap(of_one, randomness="different")(dict(chunk))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        advice = (
            ": take statistics of micro-batches"
            if is_one
            else " for several samples at once: use chunk_size=1"
        )
        raise ValueError(f"torch.func cannot run the model{advice}") from error


def _chunks(batch: Sample, chunk_size: int) -> list[dict[str, Tensor]]:
    parts = {name: torch.split(value, chunk_size) for name, value in batch.items()}
    return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]


def _refuse_batch_norms(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.training:
            raise ValueError(
                f"{name or 'the model'} normalises over the batch, so no sample has a gradient "
                "of its own: use group or layer normalisation, put it into evaluation mode, or "
                "take statistics of micro-batches"
            )
