"""What torch's parametrize leaves to do before a parametrization is taken off."""

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
