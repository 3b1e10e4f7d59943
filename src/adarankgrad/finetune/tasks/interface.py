"""The shape that every task has: from rows to examples, features, batches and metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from adarankgrad.finetune.columns import Columns
from adarankgrad.finetune.table import Row, Table
from adarankgrad.train.errors import UserError, unknown_name
from adarankgrad.train.tokens import Shuffled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from adarankgrad.finetune.config import FinetuneConfig

Example = dict[str, Any]
"""What is learnt from, as plain values: texts and a label."""
Feature = dict[str, Any]
"""What a model reads: lists of numbers under the names of its arguments, and ``labels``."""

IGNORED = -100
"""Label of tokens that are not learnt."""
_PADDING = {"attention_mask": 0, "token_type_ids": 0, "labels": IGNORED}


class Encoded(NamedTuple):
    """What examples became.

    Attributes:
        features: What a model reads.
        num_cut: Examples that had to be cut.
        num_empty: Features in which nothing is left to learn; training leaves them out.
    """

    features: list[Feature]
    num_cut: int
    num_empty: int = 0

    @property
    def num_learnt(self) -> int:
        """Features that training takes in one pass."""
        return len(self.features) - self.num_empty


@dataclass(frozen=True)
class Outcome:
    """What an evaluation found.

    Attributes:
        metrics: ``loss`` and others.
        predictions: One plain dict an example, in their order; of plain texts, one a block.
    """

    metrics: dict[str, float]
    predictions: list[dict[str, Any]] = field(default_factory=list)


class Task(ABC):
    """One kind of task, with the settings of a run.

    Attributes:
        config: The settings.
        model_class: The class of transformers that loads a model for it.
        adapter_type: What peft calls it; None where peft has no name.
        reads: Which of `OF_SOME_TASKS` it reads.
        metrics: Names that the best checkpoint may be chosen by, the default first.
        loss_unit: What the loss is in.
        has_new_head: A pretrained model may lack the head, which then starts at random.
        compute_loss: From outputs, labels and the number of labels of a step to the loss; None
            for the model's own, the mean over examples.
    """

    model_class: ClassVar[str]
    adapter_type: ClassVar[str | None] = None
    reads: ClassVar[tuple[str, ...]]
    metrics: ClassVar[tuple[str, ...]]
    loss_unit: ClassVar[str] = "nats per token"
    has_new_head: ClassVar[bool] = False
    compute_loss: Callable[..., Tensor] | None = None

    def __init__(self, config: FinetuneConfig) -> None:
        self.config = config
        if config.metric is not None and config.metric not in self.metrics:
            raise unknown_name(f"metric of {config.task}", config.metric, list(self.metrics))

    @property
    def best_metric(self) -> str:
        """The metric that the best checkpoint is chosen by."""
        return self.config.metric or self.metrics[0]

    @abstractmethod
    def columns(self, table: Table) -> Columns:
        """Find the columns; a `UserError` says which are missing."""

    @abstractmethod
    def example(self, row: Row, columns: Columns, where: str) -> Example:
        """Return the example of a row; a `UserError` names the row."""

    def prepare(  # noqa: B027 - texts fit as they are
        self, train: Sequence[Example], validation: Sequence[Example]
    ) -> None:
        """See that the examples fit the task and each other, and note what the model needs."""

    def doubts(self, train: Sequence[Example], columns: Columns) -> list[str]:
        """Return lines about examples that can be learnt, and may not be what was meant."""
        return []

    def stratum(self, example: Example) -> Hashable:
        """Return what a random part of the examples must have its share of."""
        return None

    def model_settings(self) -> dict[str, Any]:
        """Return settings of the model's configuration that the examples decide."""
        return {}

    def start_head(  # noqa: B027 - most tasks leave it as the seed made it
        self, model: nn.Module, new_weights: Sequence[str], train: Sequence[Example]
    ) -> None:
        """Set new weights of a head to what the training examples say, where that helps."""

    def check_tokenizer(  # noqa: B027 - most tasks take any
        self, tokenizer: PreTrainedTokenizerBase, columns: Columns
    ) -> None:
        """See that a tokenizer can do what the task needs."""

    def check_answers(  # noqa: B027 - most tasks generate none
        self, validation: Sequence[Example], tokenizer: PreTrainedTokenizerBase, limit: int | None
    ) -> None:
        """See that what is generated at the end fits into the tokens that the model can read."""

    @abstractmethod
    def encode(
        self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> Encoded:
        """Turn examples into features of at most ``max_length`` tokens."""

    def largest_token(self, features: Sequence[Feature], tokenizer: PreTrainedTokenizerBase) -> int:
        """Return the largest number of a token that a model reads in features and padding."""
        tokens: list[list[int]] = [feature["input_ids"] for feature in features]
        return max(chain([int(tokenizer.pad_token_id)], *tokens))

    def training_data(
        self, features: Sequence[Feature], num_samples: int, tokenizer: PreTrainedTokenizerBase
    ) -> Dataset[Any]:
        """Return the features in the order in which a run takes them."""
        lengths = [len(feature["input_ids"]) for feature in features]
        return Shuffled(
            features,
            num_samples,
            self.config.seed,
            lengths=lengths if self.config.group_by_length else None,
            batch_size=self.config.batch_size,
        )

    @abstractmethod
    def evaluate(
        self,
        model: Any,
        features: Sequence[Feature],
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
    ) -> Outcome:
        """Evaluate a model on all features."""

    def complete(
        self,
        outcome: Outcome,
        model: Any,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
    ) -> Outcome:
        """Add to the best model's outcome what takes too long to be done at every evaluation."""
        return outcome


def text_of(row: Row, column: str, where: str) -> str:
    """Return the text of a row.

    Raises:
        UserError: There is none.
    """
    text = row.get(column)
    if not isinstance(text, str):
        kind = "nothing" if text is None else type(text).__name__
        raise UserError(f"{where}: column {column!r} holds {kind}, not text.")
    if not text.strip():
        raise UserError(f"{where}: column {column!r} is empty: remove the row, or fill it in.")
    return text


def encode_each(examples: Sequence[Any], tokenize: Callable[..., Any], max_length: int) -> Encoded:
    """Tokenize examples one by one, again with truncation where they are too long.

    Args:
        examples: What ``tokenize`` takes.
        tokenize: From an example, and options of truncation, to a feature.
        max_length: In tokens.
    """
    features: list[Feature] = []
    num_cut = 0
    for example in examples:
        feature = dict(tokenize(example))
        if len(feature["input_ids"]) > max_length:
            feature = dict(tokenize(example, truncation=True, max_length=max_length))
            num_cut += 1
        features.append(feature)
    return Encoded(features, num_cut)


def pad(features: Sequence[Feature], pad_token_id: int, *, side: str = "right") -> dict[str, Any]:
    """Stack features to tensors (num_features, longest); labels that are numbers stay so."""
    longest = max(len(feature["input_ids"]) for feature in features)
    batch: dict[str, Any] = {}
    for name in features[0]:
        values = [feature[name] for feature in features]
        if isinstance(values[0], list):
            filler = _PADDING.get(name, pad_token_id)
            values = [_padded(value, longest, filler, side) for value in values]
        batch[name] = torch.tensor(values)
    return batch


def _padded(value: list[int], length: int, filler: int, side: str) -> list[int]:
    padding = [filler] * (length - len(value))
    return padding + value if side == "left" else value + padding


def batches(
    features: Sequence[Feature], batch_size: int
) -> Iterator[tuple[list[int], list[Feature]]]:
    """Yield positions and features of each batch, the longest first, so that little is padding."""
    order = sorted(range(len(features)), key=lambda i: -len(features[i]["input_ids"]))
    for start in range(0, len(order), batch_size):
        positions = order[start : start + batch_size]
        yield positions, [features[i] for i in positions]


def on_device(batch: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Move a batch to where a model is."""
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}
