"""What the language models' tasks share: the loss of tokens, and how it is judged."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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


class Score(NamedTuple):
    """How well the labelled tokens of one feature are predicted.

    Attributes:
        loss: Sum over them, in nats.
        num_tokens: How many there are.
        num_correct: Where the label is the likeliest token.
        predicted: The likeliest tokens, in the order of the labelled ones.
    """

    loss: float
    num_tokens: int
    num_correct: int
    predicted: list[int]

    def as_prediction(self) -> dict[str, Any]:
        """Return loss per token and number of tokens, as predictions have them."""
        loss = self.loss / self.num_tokens if self.num_tokens else None
        return {"loss": loss, "tokens": self.num_tokens}


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
        logits, labels = self.aligned(outputs.logits, labels)
        num_tokens = num_items_in_batch
        if num_tokens is None:
            num_tokens = (labels != IGNORED).sum()
        return token_losses(logits, labels).sum() / num_tokens

    def aligned(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Bring logits (batch, length, vocabulary) to the places of the labels (batch, length)."""
        return (logits[:, :-1], labels[:, 1:]) if self.predicts_next else (logits, labels)

    def scores(
        self, model: Any, features: Sequence[Feature], tokenizer: PreTrainedTokenizerBase
    ) -> list[Score]:
        """Score a model on features, in their order."""
        found: dict[int, Score] = {}
        model.eval()
        with torch.inference_mode():
            for positions, chosen in batches(features, self.config.batch_size):
                batch = on_device(pad(chosen, tokenizer.pad_token_id or 0), model)
                labels = batch.pop("labels")
                logits, labels = self.aligned(model(**batch).logits, labels)
                found |= dict(zip(positions, score_batch(logits, labels), strict=True))
        return [found[position] for position in range(len(features))]


class TextTask(LanguageTask):
    """A language model's task on plain texts."""

    reads = ("text_column", "split_characters")

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


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of each label (batch, length) in nats, float32; 0 where it is ignored."""
    losses = functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view_as(labels)


def score_batch(logits: Tensor, labels: Tensor) -> Iterator[Score]:
    """Score logits (batch, length, vocabulary) by labels (batch, length) at the same places."""
    losses = token_losses(logits, labels).sum(dim=1)
    likeliest = logits.argmax(dim=-1)
    for loss, tokens, wanted in zip(losses.tolist(), likeliest.cpu(), labels.cpu(), strict=True):
        is_labelled = wanted != IGNORED
        predicted, wanted = tokens[is_labelled], wanted[is_labelled]
        num_correct = int((predicted == wanted).sum())
        yield Score(loss, len(wanted), num_correct, predicted.tolist())


def language_metrics(scores: Sequence[Score]) -> dict[str, float]:
    """Return loss per token and perplexity."""
    num_tokens = sum(score.num_tokens for score in scores)
    loss = sum(score.loss for score in scores) / num_tokens if num_tokens else math.nan
    return {"loss": loss, "perplexity": perplexity(loss)}
