"""Weights that are ahead of where they belong, each with a copy that brings it back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class WeightsAhead:
    """Moves weights, and brings them back bit for bit.

    Subtracting what was added would not be exact, so each is copied.

    Attributes:
        changed: weights that something else changed while they were ahead.
    """

    def __init__(self) -> None:
        self.changed: list[Tensor] = []
        self._saved: dict[Tensor, _Saved] = {}

    @torch.no_grad()
    def move(self, param: Tensor, direction: Tensor, step: float) -> None:
        """Move a weight, in place, to ``param - step * direction``."""
        # Kept before the weight moves, so that whatever comes it is brought back.
        self._saved[param] = _Saved(param.clone(), param._version + 1)
        param.add_(direction, alpha=-step)

    @torch.no_grad()
    def bring_back(self, param: Tensor) -> None:
        """Bring a weight back, in place; one that is not ahead stays."""
        saved = self._saved.pop(param, None)
        if saved is None:
            return
        if param._version != saved.version_ahead:
            self.changed.append(param)
        param.copy_(saved.values)

    def bring_all_back(self) -> None:
        """Bring every weight back, in place."""
        for param in tuple(self._saved):
            self.bring_back(param)


class _Saved(NamedTuple):
    """A weight's real values, and autograd's count of its changes once it is ahead."""

    values: Tensor
    version_ahead: int
