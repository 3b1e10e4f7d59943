"""Layers whose class torch's parametrize replaces."""

from __future__ import annotations

from torch import nn


def unshare_class(module: nn.Module) -> None:
    """Give a parametrized module a class that no copy of it shares.

    Taking a parametrization off deletes the tensor's property from the class that parametrize made,
    which deep copies of the module have in common.
    """
    shared = type(module)
    members = {
        name: member
        for name, member in vars(shared).items()
        if name not in ("__dict__", "__weakref__")
    }
    module.__class__ = type(shared.__name__, shared.__bases__, members)


def is_transposed_linear(module: nn.Module) -> bool:
    """Tell whether a module is transformers' Conv1D, a linear layer with transposed weight."""
    return "Conv1D" in {kind.__name__ for kind in type(module).__mro__}
