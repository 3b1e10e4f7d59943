"""What torch allocates, seen operation by operation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class Allocations(TorchDispatchMode):
    """Notes the elements of every new tensor that an operation returns."""

    def __init__(self, known):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            is_new = isinstance(tensor, Tensor) and (
                tensor.untyped_storage().data_ptr() not in self.known
            )
            if is_new:
                elements = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.largest = max(self.largest, elements)
        return result


class LiveMemory(TorchDispatchMode):
    """Knows the bytes of every tensor made under it that something still refers to."""

    def __init__(self):
        super().__init__()
        self.storages = WeakIdKeyDictionary()

    def num_bytes(self):
        return sum(storage.nbytes() for storage in self.storages)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                self.storages[tensor.untyped_storage()] = None
        return result
