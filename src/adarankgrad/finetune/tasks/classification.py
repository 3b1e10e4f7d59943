"""Classes of a text, or of a pair of texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor

from adarankgrad.finetune.columns import Columns
from adarankgrad.finetune.table import Table
from adarankgrad.finetune.tasks.interface import Example
from adarankgrad.finetune.tasks.sequence import SequenceTask
from adarankgrad.train.errors import UserError


class Classification(SequenceTask):
    """One class of several, for one text.

    Attributes:
        classes: Names by number, known after `prepare`: whole numbers in their order, else texts
            in theirs.
    """

    metrics = ("accuracy", "f1", "matthews", "loss")
    loss_unit = "nats per example"

    classes: list[str]

    def text_columns(self, table: Table) -> Columns:
        """Find the text."""
        return self.single_column(table)

    def label(self, value: Any, column: str, where: str) -> str:
        """Return the name of a class."""
        if value is None or str(value).strip() == "":
            raise UserError(f"{where}: column {column!r} has no label.")
        if isinstance(value, list | dict):
            raise UserError(f"{where}: column {column!r} holds a {type(value).__name__}, no label.")
        name = str(value).strip()
        number = _as_number(name)
        if number is None:
            return name
        if number != int(number):
            raise UserError(
                f"{where}: column {column!r} holds {name}, a number between classes: use --task "
                "regression, or name another column with --label-column."
            )
        return str(int(number))

    def prepare(self, train: Sequence[Example], validation: Sequence[Example]) -> None:
        """Number the classes, and see that both parts have all of them."""
        counts = Counter(example["label"] for example in train)
        found = Counter(example["label"] for example in validation)
        if len(counts) < 2:
            raise UserError(
                f"every training example has the label {next(iter(counts))!r}: there is nothing "
                f"to tell apart: {self.or_raise('train_examples')}check --data and --label-column."
            )
        if len(counts) == len(train) > 2:
            raise UserError(
                f"every one of {len(train)} training examples has a label of its own, such as "
                f"{next(iter(counts))!r}: {self.or_raise('train_examples')}name the column of "
                "classes with --label-column."
            )
        self.classes = _in_order(counts)
        for name in found:
            if name not in counts:
                raise UserError(
                    f"validation has the label {name!r}, and training has only "
                    f"{', '.join(self.classes[:10])}: {self.or_raise('train_examples')}check both "
                    "files."
                )
        for name in self.classes:
            if name not in found:
                raise UserError(
                    f"validation has no example of class {name!r} ({counts[name]} in training): "
                    f"{self.or_raise('eval_examples')}give other validation data, or more of it."
                )

    def stratum(self, example: Example) -> Hashable:
        """Return the class: a random part has its share of each."""
        return str(example["label"])

    def model_settings(self) -> dict[str, Any]:
        """Return the number of classes and their names."""
        return {
            "num_labels": len(self.classes),
            "id2label": dict(enumerate(self.classes)),
            "label2id": {name: number for number, name in enumerate(self.classes)},
            "problem_type": "single_label_classification",
        }

    def target(self, example: Example) -> int:
        """Return the number of the class."""
        return self.classes.index(example["label"])

    def score(self, logits: Tensor, examples: Sequence[Example]) -> dict[str, float]:
        """Return accuracy, F1 (of class 1 of two, else the mean over classes) and Matthews."""
        import torch
        from torchmetrics.functional import classification as scores

        predicted = logits.argmax(dim=1)
        targets = torch.tensor([self.target(example) for example in examples])
        if len(self.classes) == 2:
            f1 = scores.binary_f1_score(predicted, targets)
        else:
            f1 = scores.multiclass_f1_score(predicted, targets, len(self.classes))
        # Undefined where one side is a single class; 0 then, as scikit-learn has it.
        is_defined = min(len(set(side.tolist())) for side in (predicted, targets)) > 1
        matthews = scores.multiclass_matthews_corrcoef(predicted, targets, len(self.classes))
        return {
            "accuracy": (predicted == targets).double().mean().item(),
            "f1": f1.item(),
            "matthews": matthews.item() if is_defined else 0.0,
        }

    def predictions(self, logits: Tensor) -> list[dict[str, Any]]:
        """Return the likeliest class and its probability."""
        best = logits.softmax(dim=1).max(dim=1)
        return [
            {"prediction": self.classes[number], "probability": probability}
            for number, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]


class PairClassification(Classification):
    """One class of several, for two texts."""

    reads = (*Classification.reads, "pair_column")

    def text_columns(self, table: Table) -> Columns:
        """Find both texts."""
        return self.needed_pair(table)


def _as_number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    # Words such as "nan" and "infinity" are names.
    return number if abs(number) < 2**53 and "_" not in text else None


def _in_order(names: Counter[str]) -> list[str]:
    numbers = [_as_number(name) for name in names]
    if None in numbers:
        return sorted(names)
    return sorted(names, key=int)
