"""The peak of a training step: what exists together, phase by phase, and how much that is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from adarankgrad.memory_plan.costs import Costs, Stage
from adarankgrad.memory_plan.trace import IntArray, Trace

LARGEST_BATCH = 2**20


@dataclass(frozen=True)
class Prediction:
    """Bytes of a training step.

    The peak is not the sum of the parts: activations are gone when the optimizer steps, and
    gradients grow while activations shrink.

    Attributes:
        weights: Weights and buffers, frozen ones included.
        gradients: Between backward pass and step; where they are projected in the backward pass,
            with the largest dense one.
        state: Optimizer state.
        activations: The most that forward and backward pass hold besides weights and the gradients
            that are final.
        workspace: Temporaries of the optimizer's step.
        peak: The most that is held at once.
        peak_phase: ``backward`` (or forward), or ``step``.
    """

    weights: int
    gradients: int
    state: int
    activations: int
    workspace: int
    peak: int
    peak_phase: str

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON takes them."""
        return asdict(self)


@dataclass(frozen=True)
class Training:
    """A traced model with a method to train it.

    Attributes:
        weight_bytes: Weights and buffers.
        trace: Of the model.
        costs: Of the method.
        gradient_accumulation: Backward passes of a step.
    """

    weight_bytes: int
    trace: Trace
    costs: Costs
    gradient_accumulation: int = 1

    def predict(self, batch_size: int) -> Prediction:
        """Predict one step with micro-batches of this many sequences."""
        backward = max(self._backward_peak(stage, batch_size) for stage in self.costs.stages)
        step = max(self._step_peak(stage) for stage in self.costs.stages)
        projected = self.costs.backward_workspace
        dense = max((g.num_bytes for g in self.trace.gradients if g.name in projected), default=0)
        largest = max(self._final_gradients(stage) for stage in self.costs.stages)
        return Prediction(
            weights=self.weight_bytes,
            gradients=largest + dense,
            state=max(max(stage.state, stage.state_in_step) for stage in self.costs.stages),
            activations=int(self.trace.live(batch_size).max()),
            workspace=self.costs.step_workspace,
            peak=max(backward, step),
            peak_phase="backward" if backward >= step else "step",
        )

    def largest_batch(self, memory: int) -> int:
        """The largest micro-batch that fits into this many bytes, 0 if none does."""
        low, high = 0, LARGEST_BATCH
        while low < high:
            middle = (low + high + 1) // 2
            if self.predict(middle).peak <= memory:
                low = middle
            else:
                high = middle - 1
        return low

    def _backward_peak(self, stage: Stage, batch_size: int) -> int:
        live = self.trace.live(batch_size)
        moments = np.array([gradient.moment for gradient in self.trace.gradients], dtype=int)
        held = self._held(stage)
        beside = np.array(
            [self.costs.backward_workspace.get(g.name, 0) for g in self.trace.gradients]
        )
        kept = np.zeros(len(live) + 1, dtype=np.int64)
        if self.gradient_accumulation > 1:
            kept += held.sum()
        else:
            np.add.at(kept, moments + 1, held)
            kept = kept.cumsum()
        # At its moment a gradient is dense, and where it is projected that is there as well.
        is_projected = np.array([g.name in stage.held for g in self.trace.gradients])
        becoming_final = live[moments] + kept[moments] + beside + held * is_projected
        highest = max((live + kept[:-1]).max(), becoming_final.max())
        return int(self.weight_bytes + stage.state + highest)

    def _step_peak(self, stage: Stage) -> int:
        gradients = self._final_gradients(stage)
        return self.weight_bytes + stage.state_in_step + gradients + self.costs.step_workspace

    def _final_gradients(self, stage: Stage) -> int:
        return int(self._held(stage).sum())

    def _held(self, stage: Stage) -> IntArray:
        sizes = [stage.held.get(g.name, g.num_bytes) for g in self.trace.gradients]
        return np.array(sizes, dtype=np.int64)
