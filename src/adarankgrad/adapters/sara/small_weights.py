"""A parametrization that trains some entries of a tensor as one vector.

The tensor itself is frozen and holds the present weights: the forward pass writes the vector into
it, in place, and hands it on without a copy. The backward pass gathers the tensor's gradient at the
trained entries, so that the full one lives only inside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize

from ...core.layers import unshare_class
from .checksum import checksum

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
"""Modules that read few rows of their weight at a time."""

_MAX_INT32 = 2**31 - 1


class _Write(torch.autograd.Function):
    """base, with values at some entries; the gradient goes to the values."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, values: Tensor, indices: Tensor, trained: Tensor) -> Tensor:
        write_(base, values, indices, trained)
        ctx.save_for_backward(indices, trained)
        ctx.dtype = values.dtype
        return base.view_as(base)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None]:
        indices, trained = ctx.saved_tensors
        gathered = grad.take(indices.long()).to(ctx.dtype)
        return None, gathered.masked_fill_(~trained, 0.0), None, None


def write_(base: Tensor, values: Tensor, indices: Tensor, trained: Tensor) -> None:
    """Write the trained values into ``base``, in place.

    Through ``data``, so that autograd does not count it as a change: between two steps the values
    written are those already there, and tensors saved by earlier forward passes stay valid.
    """
    places = indices.long()
    held = base.data.take(places)
    put_entries_(base.data, places, torch.where(trained, values.detach().to(base.dtype), held))


def put_entries_(tensor: Tensor, places: Tensor, values: Tensor) -> None:
    """Write entries at flat positions in the tensor's logical order, in place.

    Args:
        tensor: any shape and memory format.
        places: (k,) int64, each at most once.
        values: (k,), of the tensor's dtype.
    """
    if tensor.is_contiguous():
        tensor.view(-1).index_copy_(0, places, values)
    else:
        # Refused under `torch.use_deterministic_algorithms`, although no position comes twice.
        tensor.put_(places, values)


class SmallWeights(nn.Module):
    """The entries of one tensor that are trained.

    Shapes never change, so that optimizers, data-parallel wrappers and checkpoints stay valid when
    fewer entries are trained.

    Attributes:
        values: (k,), the trained parameter; float32 under half-precision weights.
        indices: (k,), flat positions in the tensor's logical order; int32 where they fit.
        trained: (k,) bool; entries that are False stay at what the tensor holds.
        threshold: that magnitudes were compared with.
        base_checksum: of the entries before training.
    """

    indices: Tensor
    trained: Tensor

    def __init__(self, base: Tensor, is_selected: Tensor, threshold: float) -> None:
        super().__init__()
        places = is_selected.flatten().nonzero().squeeze(1)
        start = base.detach().take(places)
        self.threshold = threshold
        self.base_checksum = checksum(start)
        self.values = nn.Parameter(start.to(torch.promote_types(base.dtype, torch.float32)))
        fits = base.numel() <= _MAX_INT32
        self.register_buffer("indices", places.to(torch.int32) if fits else places)
        self.register_buffer("trained", torch.ones_like(places, dtype=torch.bool))

    def forward(self, base: Tensor) -> Tensor:
        """Return ``base`` itself, which holds the present values afterwards."""
        return _Write.apply(base, self.values, self.indices, self.trained)  # type: ignore[no-any-return, no-untyped-call]


class Site(NamedTuple):
    """A trained tensor: its name in the base model, where it lives, and what is trained in it."""

    name: str
    module: nn.Module
    tensor_name: str
    base: Tensor
    small: SmallWeights


def all_sites(model: nn.Module) -> Iterator[Site]:
    """Yield the tensors that are trained in part, a tied one once for each of its places."""
    for module_name, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        parametrizations: Any = module.parametrizations
        for tensor_name, stages in parametrizations.items():
            if isinstance(stages[0], SmallWeights):
                name = f"{module_name}.{tensor_name}" if module_name else tensor_name
                yield Site(name, module, tensor_name, stages.original, stages[0])


def sites(model: nn.Module) -> list[Site]:
    """Return the tensors that are trained in part, each once.

    Raises:
        ValueError: if there is none.
    """
    unique = {id(site.small): site for site in reversed(list(all_sites(model)))}
    if not unique:
        raise ValueError("nothing in the model is trained by SaRA; call sara.apply first")
    return list(reversed(unique.values()))


@torch.no_grad()
def present_values(site: Site) -> Tensor:
    """Return the selected entries as they are now, trained or not: (k,) in the values' dtype."""
    held = site.base.take(site.small.indices.long()).to(site.small.values.dtype)
    return torch.where(site.small.trained, site.small.values, held)


def write_back(site: Site) -> None:
    """Bring the tensor up to date with its values."""
    write_(site.base, site.small.values, site.small.indices, site.small.trained)


def remove(site: Site) -> None:
    """Make the tensor, brought up to date, a plain parameter of its module again."""
    write_back(site)
    unshare_class(site.module)
    parametrize.remove_parametrizations(site.module, site.tensor_name, leave_parametrized=False)
