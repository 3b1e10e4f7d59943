"""Several optimizers behind one, each with its own weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class PairedOptimizer(Optimizer):
    """Steps several optimizers as one, with the parameter groups and the state of all.

    Schedulers, clipping, zeroing and checkpoints see one optimizer. The parts keep their own
    states; this class holds references only.

    Args:
        parts: Optimizers over different parameters.

    Raises:
        ValueError: A parameter is in two of them, or there are none.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self.parts = list(parts)
        super().__init__([weight for part in self.parts for weight in _parameters(part)], {})
        self._link()

    @torch.no_grad()
    def step(self, closure: Callable[[], float | Tensor] | None = None) -> Any:
        """Evaluate the closure if there is one, then step every part."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        self._link()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return ``{"parts": [...]}``, each part's own state."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give each part its state back.

        Raises:
            ValueError: The state is of another number of parts.
        """
        states = state_dict.get("parts", [])
        if len(states) != len(self.parts):
            raise ValueError(
                f"the state holds {len(states)} optimizers, this one has {len(self.parts)}"
            )
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)
        self._link()

    def _link(self) -> None:
        # Parts replace their group dicts on loading, and add states while stepping.
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        self.state.clear()
        for part in self.parts:
            self.state.update(part.state)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]
