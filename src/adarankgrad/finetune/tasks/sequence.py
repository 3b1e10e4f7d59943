"""What classification and regression share: one or two texts in, numbers of the whole out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from adarankgrad.finetune.columns import PAIR_NAMES, Columns, find_label, find_pair, find_text
from adarankgrad.finetune.table import Row, Table
from adarankgrad.finetune.tasks.interface import (
    Encoded,
    Example,
    Feature,
    Outcome,
    Task,
    batches,
    encode_each,
    on_device,
    pad,
    text_of,
)
from adarankgrad.finetune.texts import split_characters
from adarankgrad.train.errors import UserError
from adarankgrad.train.run_config import flag_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SequenceTask(Task):
    """A task whose model reads one or two texts and returns logits (num_examples, num_labels)."""

    model_class = "AutoModelForSequenceClassification"
    adapter_type = "SEQ_CLS"
    reads: ClassVar[tuple[str, ...]] = ("text_column", "label_column", "split_characters")
    has_new_head = True

    def pair_columns(self, table: Table) -> Columns | None:
        """Find the columns of a pair, where the task may read pairs."""
        return find_pair(table, self.config.text_column, self.config.pair_column)

    def needed_pair(self, table: Table) -> Columns:
        """Find the columns of a pair.

        Raises:
            UserError: There are none.
        """
        found = self.pair_columns(table)
        if found is None:
            known = ", ".join(" and ".join(names) for names in PAIR_NAMES[:3])
            raise UserError(
                f"{table.name} has no two columns known to hold a pair (such as {known}): name "
                f"two of {', '.join(table.columns)} with --text-column and --pair-column."
            )
        return found

    def single_column(self, table: Table) -> Columns:
        """Find the column of a text that stands alone."""
        return find_text(table, self.config.text_column)

    @abstractmethod
    def text_columns(self, table: Table) -> Columns:
        """Find the columns of the one or two texts."""

    def columns(self, table: Table) -> Columns:
        """Find text, perhaps a second one, and label."""
        return {**self.text_columns(table), **find_label(table, self.config.label_column)}

    def example(self, row: Row, columns: Columns, where: str) -> Example:
        """Return texts and label."""
        roles = [role for role in ("text", "pair") if role in columns]
        texts: Example = {role: text_of(row, columns[role], where) for role in roles}
        return {**texts, "label": self.label(row.get(columns["label"]), columns["label"], where)}

    @abstractmethod
    def label(self, value: Any, column: str, where: str) -> Any:
        """Return the label as a plain value; a `UserError` names the row."""

    def or_raise(self, name: str) -> str:
        """Return the advice to raise a number of examples, to go before another, if it is set."""
        return "" if getattr(self.config, name) is None else f"raise {flag_of(name)}, or "

    @abstractmethod
    def target(self, example: Example) -> int | float:
        """Return what the model is to learn."""

    def encode(
        self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> Encoded:
        """Tokenize; of a pair, the longer text is cut first."""
        encoded = encode_each(examples, partial(self._tokenize, tokenizer=tokenizer), max_length)
        for feature, example in zip(encoded.features, examples, strict=True):
            feature["labels"] = self.target(example)
        return encoded

    def _tokenize(
        self, example: Example, tokenizer: PreTrainedTokenizerBase, **options: Any
    ) -> Feature:
        texts = [example[role] for role in ("text", "pair") if role in example]
        if self.config.split_characters:
            texts = [split_characters(text) for text in texts]
        return dict(tokenizer(*texts, verbose=False, **options))

    def logits(
        self, model: Any, features: Sequence[Feature], tokenizer: PreTrainedTokenizerBase
    ) -> tuple[Tensor, float]:
        """Return logits (num_examples, num_labels) on the CPU, float32, and the mean loss."""
        found: dict[int, Tensor] = {}
        loss_sum = 0.0
        model.eval()
        with torch.inference_mode():
            for positions, chosen in batches(features, self.config.batch_size):
                output = model(**on_device(pad(chosen, tokenizer.pad_token_id or 0), model))
                loss_sum += output.loss.item() * len(chosen)
                found |= dict(zip(positions, output.logits.float().cpu(), strict=True))
        stacked = torch.stack([found[position] for position in range(len(features))])
        return stacked, loss_sum / len(features)

    def evaluate(
        self,
        model: Any,
        features: Sequence[Feature],
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
    ) -> Outcome:
        """Evaluate loss and metrics."""
        logits, loss = self.logits(model, features, tokenizer)
        predictions = [
            {**example, **prediction}
            for example, prediction in zip(examples, self.predictions(logits), strict=True)
        ]
        return Outcome({"loss": loss, **self.score(logits, examples)}, predictions)

    @abstractmethod
    def score(self, logits: Tensor, examples: Sequence[Example]) -> dict[str, float]:
        """Return the metrics but for the loss."""

    @abstractmethod
    def predictions(self, logits: Tensor) -> list[dict[str, Any]]:
        """Return one plain prediction an example."""
