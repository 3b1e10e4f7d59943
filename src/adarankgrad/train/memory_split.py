"""How the memory of a run divides into weights, gradients, optimizer state and the rest."""

from __future__ import annotations

from dataclasses import dataclass, replace

from adarankgrad.train.record import RunRecord


@dataclass(frozen=True)
class MemorySplit:
    """The parts of a run's memory, in bytes.

    Attributes:
        method: The optimizer's name, for its colour.
        weights: The model's parameters, with their corrections.
        gradients: Their gradients, or what is held of them, between backward pass and step.
        projected_state: Optimizer state of the weights that low-rank methods project.
        plain_state: Optimizer state of all other weights.
        adamw_projected: What AdamW would hold for the projected weights.
        peak: The largest amount of memory measured during training.
    """

    method: str
    weights: float
    gradients: float
    projected_state: float
    plain_state: float
    adamw_projected: float
    peak: float

    @classmethod
    def of(cls, run: RunRecord, *, is_divided: bool = True) -> MemorySplit:
        """Read the split from a run's summary; a missing number counts as zero.

        Args:
            run: The run.
            is_divided: Tell the state of weights that low-rank methods project from the rest.
        """
        number = {key: run.summary.get(key) or 0 for key in _KEYS}
        if not is_divided:
            number |= {"projected_state_bytes": 0, "adamw_projected_state_bytes": 0}
        return cls(
            method=run.method,
            weights=number["weight_bytes"],
            gradients=number["gradient_bytes"],
            projected_state=number["projected_state_bytes"],
            plain_state=max(0, number["state_bytes"] - number["projected_state_bytes"]),
            adamw_projected=number["adamw_projected_state_bytes"],
            peak=number["peak_bytes"],
        )

    @property
    def held(self) -> float:
        """Weights, gradients and optimizer state together."""
        return self.weights + self.gradients + self.projected_state + self.plain_state

    @property
    def rest(self) -> float:
        """What the peak holds beyond that: activations, workspace, on CPU the whole process."""
        return max(0.0, self.peak - self.held)

    def with_adamw_state(self) -> MemorySplit:
        """Return the same run with AdamW's state for the projected weights."""
        return replace(self, method="AdamW", projected_state=self.adamw_projected)

    def parts(self, *, with_rest: bool) -> list[tuple[str, float]]:
        """Return names and sizes, in the order in which bars stack them."""
        if self.adamw_projected:
            states = [
                ("state of projected weights", self.projected_state),
                ("state of plain weights", self.plain_state),
            ]
        else:
            states = [("optimizer state", self.plain_state)]
        parts = [("weights", self.weights), ("gradients", self.gradients), *states]
        return [*parts, ("rest of the peak", self.rest)] if with_rest else parts


_KEYS = (
    "weight_bytes",
    "gradient_bytes",
    "projected_state_bytes",
    "state_bytes",
    "adamw_projected_state_bytes",
    "peak_bytes",
)
