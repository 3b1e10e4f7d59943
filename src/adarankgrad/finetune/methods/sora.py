"""SoRA: its phases bring their schedule, and its gates decide what is left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from adarankgrad.finetune.methods.adapted import AdaptedByPeft


class SoRA(AdaptedByPeft):
    """LoRA with gates is trained, with the head if that is new."""

    def lr_factor(self) -> Callable[[float], float] | None:
        """Return the schedule of the phases, if there are any."""
        if self.settings.num_phases == 0:
            return None
        factor: Callable[[float], float] = self.adapter.lr_factor(
            self.settings, num_steps=self.config.steps
        )
        return factor

    def summary(self, model: Any) -> dict[str, Any]:
        """Count what the gates have left of A and B."""
        return {"surviving_parameters": self.adapter.num_surviving_parameters(model)}
