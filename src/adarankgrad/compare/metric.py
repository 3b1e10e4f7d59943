"""The number that decides between the runs of a comparison: its name, direction and unit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adarankgrad.train.score import LOSS, is_higher_better, score_of

_WORDS = {"f1": "F1", "matthews": "Matthews' correlation"}
_WORDS |= {"spearman": "Spearman's correlation", "pearson": "Pearson's correlation"}


@dataclass(frozen=True)
class Metric:
    """A metric of validation.

    Attributes:
        name: As in summary.json: ``loss``, or a metric of a task such as ``accuracy``.
        unit: What it is in; empty for shares and correlations.
    """

    name: str
    unit: str = ""

    @property
    def is_loss(self) -> bool:
        """Whether it is the loss itself."""
        return self.name == LOSS

    @property
    def is_higher_better(self) -> bool:
        """Whether the highest is the best, as of accuracy; else the lowest is."""
        return is_higher_better(self.name)

    @property
    def best_word(self) -> str:
        """``Highest`` or ``Lowest``: what the best is called."""
        return "Highest" if self.is_higher_better else "Lowest"

    @property
    def title(self) -> str:
        """Its name above a column, such as ``Validation loss``."""
        return f"Validation {self.word}"

    @property
    def word(self) -> str:
        """Its name in a sentence."""
        return _WORDS.get(self.name, self.name)

    @property
    def axis(self) -> str:
        """Its name and unit beside an axis."""
        return f"validation {self.word}" + f" ({self.unit})" * bool(self.unit)

    def score(self, metrics: Mapping[str, float]) -> list[float]:
        """Return what the metrics of runs are compared by; higher is better."""
        return score_of(metrics, self.name)

    def at(self, row: Mapping[str, Any]) -> float:
        """Read it from an evaluation of metrics.jsonl."""
        return float(row["val_loss" if self.is_loss else self.name])


NATS_PER_TOKEN = Metric(LOSS, "nats per token")


def metrics_of(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a finished run by name; one without a task has its loss alone."""
    return dict(summary.get("metrics") or {LOSS: summary["val_loss"]})
