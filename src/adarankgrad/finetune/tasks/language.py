"""What the language models' tasks share: the loss of tokens, and how it is judged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from adarankgrad.finetune.columns import Columns, find_text
from adarankgrad.finetune.table import Row, Table
from adarankgrad.finetune.tasks.interface import (
    IGNORED,
    Example,
    Feature,
    Task,
    batches,
    on_device,
    pad,
    text_of,
)
from adarankgrad.finetune.texts import split_characters
from adarankgrad.train.recorder import perplexity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenScores(NamedTuple):
    """Sums over the labelled tokens of a batch.

    Attributes:
        loss: (), in nats, float32.
        num_correct: (), int64: where the label is the likeliest token.
        num_tokens: (), int64.
    """

    loss: Tensor
    num_correct: Tensor
    num_tokens: Tensor


class LanguageTask(Task):
    """A task whose model predicts tokens; labels are tokens, or `IGNORED`.

    Attributes:
        predicts_next: A label is predicted from the tokens before it; else from its own place.
    """

    metrics: ClassVar[tuple[str, ...]] = ("loss",)
    predicts_next: ClassVar[bool] = True

    def compute_loss(
        self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Return the loss of a micro-batch's tokens over the number of all of the step's."""
        scores = self.scores(outputs.logits, labels)
        num_tokens = scores.num_tokens if num_items_in_batch is None else num_items_in_batch
        return scores.loss / num_tokens

    def scores(self, logits: Tensor, labels: Tensor) -> TokenScores:
        """Score logits (batch, length, vocabulary) by labels (batch, length)."""
        if self.predicts_next:
            logits, labels = logits[:, :-1], labels[:, 1:]
        logits, labels = logits.flatten(0, 1).float(), labels.flatten()
        loss = functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        is_labelled = labels != IGNORED
        is_correct = (logits.detach().argmax(dim=-1) == labels) & is_labelled
        return TokenScores(loss, is_correct.sum(), is_labelled.sum())

    def totals(
        self, model: Any, features: Sequence[Feature], tokenizer: PreTrainedTokenizerBase
    ) -> tuple[float, float]:
        """Return loss per token, and the share of tokens predicted, over all features."""
        loss, num_correct, num_tokens = 0.0, 0, 0
        model.eval()
        with torch.inference_mode():
            for _, chosen in batches(features, self.config.batch_size):
                batch = on_device(pad(chosen, tokenizer.pad_token_id or 0), model)
                labels = batch.pop("labels")
                scores = self.scores(model(**batch).logits, labels)
                loss += scores.loss.item()
                num_correct += int(scores.num_correct)
                num_tokens += int(scores.num_tokens)
        return (loss / num_tokens, num_correct / num_tokens) if num_tokens else (math.nan, 0.0)

    def language_metrics(
        self, model: Any, features: Sequence[Feature], tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, float]:
        """Return loss per token and perplexity."""
        loss, _ = self.totals(model, features, tokenizer)
        return {"loss": loss, "perplexity": perplexity(loss)}


class TextTask(LanguageTask):
    """A language model's task on plain texts."""

    def columns(self, table: Table) -> Columns:
        """Find the text."""
        return find_text(table, self.config.text_column)

    def example(self, row: Row, columns: Columns, where: str) -> Example:
        """Return the text."""
        return {"text": text_of(row, columns["text"], where)}

    def texts(self, examples: Sequence[Example]) -> list[str]:
        """Return the texts as they are tokenized."""
        texts = [example["text"] for example in examples]
        return [split_characters(t) for t in texts] if self.config.split_characters else texts


def next_token_labels(tokens: list[int]) -> list[int]:
    """Return the labels of a text: its tokens, but for the first, which nothing predicts."""
    return [IGNORED, *tokens[1:]]
