"""A plan: every method's prediction, what fits, and which switch saves most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from adarankgrad.memory_plan.methods import Method, methods_of
from adarankgrad.memory_plan.predict import Prediction, Training
from adarankgrad.memory_plan.request import LORA, QUANTIZED_ADAMW, PlanRequest

CHECKPOINTING = "activation_checkpointing"
_NAMES = {"adamw": "AdamW", QUANTIZED_ADAMW: "8-bit AdamW", LORA: "LoRA r=16"}


@dataclass(frozen=True)
class Row:
    """One method with its switches.

    Attributes:
        method: Its name.
        switches: What is turned on.
        prediction: For the requested batch.
        largest_batch: Sequences of the largest micro-batch that fits, None without a limit.
    """

    method: str
    switches: tuple[str, ...]
    prediction: Prediction
    largest_batch: int | None

    def as_dict(self, memory: int | None) -> dict[str, Any]:
        """Return the row as JSON takes it."""
        fits = None if memory is None else self.prediction.peak <= memory
        return {
            "method": self.method,
            "switches": list(self.switches),
            **{f"{name}_bytes": value for name, value in _sizes(self.prediction).items()},
            "peak_phase": self.prediction.peak_phase,
            "fits": fits,
            "largest_batch": self.largest_batch,
        }


@dataclass(frozen=True)
class Plan:
    """What `make_plan` found.

    Attributes:
        request: What was asked.
        num_weights: Trainable and frozen, without adapters.
        rows: One for each method and set of switches.
    """

    request: PlanRequest
    num_weights: int
    rows: tuple[Row, ...]

    @property
    def selected(self) -> Row:
        """The requested optimizer without any switch."""
        name = _NAMES.get(self.request.config.optimizer, self.request.config.optimizer)
        return next(row for row in self.rows if row.method == name and not row.switches)

    def savings(self) -> dict[str, int]:
        """Bytes that each switch alone takes off the selected method's peak, largest first."""
        saved = {
            row.switches[0]: self.selected.prediction.peak - row.prediction.peak
            for row in self.rows
            if row.method == self.selected.method and len(row.switches) == 1
        }
        return dict(sorted(saved.items(), key=lambda item: -item[1]))

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as JSON takes it."""
        config = self.request.config
        return {
            "model": config.model,
            "num_weights": self.num_weights,
            "batch_size": config.batch_size,
            "seq_len": config.seq_len,
            "gradient_accumulation": config.gradient_accumulation,
            "precision": config.precision,
            "device": self.request.device,
            "gpu_bytes": self.request.memory,
            "optimizer": config.optimizer,
            "rank": "memory_budget" if _has_budget(config.optimizer_args) else "ceiling",
            "savings_bytes": self.savings(),
            "rows": [row.as_dict(self.request.memory) for row in self.rows],
        }


def make_plan(request: PlanRequest) -> Plan:
    """Predict the memory of each method.

    Raises:
        UserError: The model or an optimizer's argument is refused.
    """
    methods = methods_of(request)
    rows = [row for method in methods for row in _rows(method, request)]
    model = methods[0].traced.model
    return Plan(request, sum(weight.numel() for weight in model.parameters()), tuple(rows))


def _rows(method: Method, request: PlanRequest) -> list[Row]:
    config = request.config
    rows = []
    for trace, more in zip(method.traced.traces, ((), (CHECKPOINTING,)), strict=True):
        if trace is None:
            continue
        training = Training(
            method.traced.weight_bytes, trace, method.costs, config.gradient_accumulation
        )
        largest = None if request.memory is None else training.largest_batch(request.memory)
        prediction = training.predict(config.batch_size)
        rows.append(Row(method.name, (*method.switches, *more), prediction, largest))
    return rows


def _sizes(prediction: Prediction) -> dict[str, Any]:
    return {name: value for name, value in prediction.as_dict().items() if name != "peak_phase"}


def _has_budget(arguments: dict[str, Any]) -> bool:
    return arguments.get("memory_budget") is not None
