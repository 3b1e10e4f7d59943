"""A counter of the bytes that tensors hold, at every moment, on any device, fake ones included."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within this context, counts each storage that operators make, from its birth to its death.

    What a kernel allocates and frees inside one operator is not seen.

    Args:
        known: tensors whose storages are not counted, such as weights.

    Attributes:
        live: bytes of the counted storages that are alive now.
        peak: the most that were alive at once.

    Example:
        >>> with LiveBytes() as counter:
        ...     doubled = 2 * torch.ones(256)
        >>> counter.live, counter.peak
        (1024, 2048)
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._sizes = {_address(tensor): 0 for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count what it made."""
        result = self.run(func, args, kwargs or {})
        leaves = [result] if isinstance(result, Tensor) else result
        for leaf in leaves if isinstance(leaves, list | tuple) else ():
            if isinstance(leaf, Tensor) and _address(leaf) not in self._sizes:
                self._add(leaf)
        return result

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator."""
        return func(*args, **kwargs)

    def change(self, num_bytes: int) -> None:
        """Count a storage that is born, or with a minus one that has died."""
        self.live += num_bytes
        self.peak = max(self.peak, self.live)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = _address(tensor)
        self._sizes[address] = storage.nbytes()
        weakref.finalize(storage, self._remove, address)
        self.change(storage.nbytes())

    def _remove(self, address: int) -> None:
        self.change(-self._sizes.pop(address))


def _address(tensor: Tensor) -> int:
    """Identify a storage while it lives; a fake one has no memory address."""
    return int(tensor.untyped_storage()._cdata)
