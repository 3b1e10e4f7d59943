"""A number for a text, or for a pair of texts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from adarankgrad.finetune.columns import Columns
from adarankgrad.finetune.table import Table
from adarankgrad.finetune.tasks.interface import Example
from adarankgrad.finetune.tasks.sequence import SequenceTask
from adarankgrad.train.errors import UserError

_MOST_CLASSES = 5
"""So many different whole numbers or fewer may be classes."""


class Regression(SequenceTask):
    """A number, learnt by mean squared error.

    Texts are a pair where two columns are named, or two are known and none is named.
    """

    reads = (*SequenceTask.reads, "pair_column")
    metrics = ("spearman", "pearson", "loss")
    loss_unit = "squared error"

    def text_columns(self, table: Table) -> Columns:
        """Find one text or two."""
        is_single = self.config.text_column is not None and self.config.pair_column is None
        found = None if is_single else self.pair_columns(table)
        return self.single_column(table) if found is None else found

    def label(self, value: Any, column: str, where: str) -> float:
        """Return the number."""
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if isinstance(value, bool) or not math.isfinite(number):
            raise UserError(
                f"{where}: column {column!r} holds {value!r}, not a number: use --task "
                "classification, or name another column with --label-column."
            )
        return number

    def prepare(self, train: Sequence[Example], validation: Sequence[Example]) -> None:
        """See that there is something to learn."""
        for name, examples, limit in (
            ("training", train, "train_examples"),
            ("validation", validation, "eval_examples"),
        ):
            if len({example["label"] for example in examples}) < 2:
                raise UserError(
                    f"every {name} example has the number {examples[0]['label']:g}: a correlation "
                    f"needs several: {self.or_raise(limit)}check the data and --label-column."
                )

    def doubts(self, train: Sequence[Example], columns: Columns) -> list[str]:
        """Doubt numbers that are whole and few, as those of classes are."""
        numbers = sorted({float(example["label"]) for example in train})
        if len(numbers) > _MOST_CLASSES or not all(number.is_integer() for number in numbers):
            return []
        task = "pair-classification" if "pair" in columns else "classification"
        listed = ", ".join(f"{number:.0f}" for number in numbers)
        return [
            f"column {columns['label']!r} holds only the whole numbers {listed}: if they are "
            f"classes, use --task {task}"
        ]

    def model_settings(self) -> dict[str, Any]:
        """Return one output, a number."""
        return {"num_labels": 1, "problem_type": "regression"}

    def start_head(
        self, model: nn.Module, new_weights: Sequence[str], train: Sequence[Example]
    ) -> None:
        """Let a new head predict about the mean of the training labels, where it has a bias.

        From 0, as the seed makes it, the first steps would be spent on the way to the mean.
        """
        mean = statistics.fmean(self.target(example) for example in train)
        for name, weight in model.named_parameters():
            if name in new_weights and name.endswith("bias") and weight.numel() == 1:
                nn.init.constant_(weight, mean)

    def target(self, example: Example) -> float:
        """Return the number."""
        return float(example["label"])

    def score(self, logits: Tensor, examples: Sequence[Example]) -> dict[str, float]:
        """Return Spearman's and Pearson's correlation; 0 where all predictions are the same."""
        import torch
        from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef

        predicted = logits[:, 0].double()
        targets = torch.tensor([self.target(example) for example in examples], dtype=torch.float64)
        if bool((predicted == predicted[0]).all()):
            return {"spearman": 0.0, "pearson": 0.0}
        return {
            "spearman": spearman_corrcoef(predicted, targets).item(),
            "pearson": pearson_corrcoef(predicted, targets).item(),
        }

    def predictions(self, logits: Tensor) -> list[dict[str, Any]]:
        """Return the predicted number."""
        return [{"prediction": value} for value in logits[:, 0].tolist()]
