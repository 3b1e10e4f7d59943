"""Hidden tokens of plain texts, such as residues of proteins."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from adarankgrad.core.generators import generator_for
from adarankgrad.finetune.columns import Columns
from adarankgrad.finetune.tasks.interface import (
    IGNORED,
    Encoded,
    Example,
    Feature,
    Outcome,
    encode_each,
)
from adarankgrad.finetune.tasks.language import Score, TextTask, language_metrics
from adarankgrad.train.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MASKED_SHARE = 0.15
_HIDDEN_SHARE, _KEPT_SHARE = 0.8, 0.1
"""Of the masked: behind the mask token, and left as they are; the rest become random tokens."""
_EVALUATION_SEED = 0


class MaskedLM(TextTask):
    """Each text by itself; 15 % of its tokens are to be found, as BERT was trained."""

    model_class = "AutoModelForMaskedLM"
    metrics = ("loss", "accuracy")
    predicts_next = False

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase, columns: Columns) -> None:
        """See that there is a mask token."""
        if tokenizer.mask_token_id is None:
            raise UserError(
                f"the tokenizer of {self.config.model} has no mask token: use --task causal-lm."
            )

    def encode(
        self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> Encoded:
        """Tokenize; which tokens are hidden is decided anew whenever a text is taken."""
        tokenize: Any = tokenizer
        return encode_each(self.texts(examples), partial(tokenize, verbose=False), max_length)

    def largest_token(self, features: Sequence[Feature], tokenizer: PreTrainedTokenizerBase) -> int:
        """Return the largest of the tokenizer: any may stand for a hidden one."""
        return max(super().largest_token(features, tokenizer), len(tokenizer) - 1)

    def training_data(
        self, features: Sequence[Feature], num_samples: int, tokenizer: PreTrainedTokenizerBase
    ) -> Dataset[Any]:
        """Return the features with tokens hidden."""
        ordered = super().training_data(features, num_samples, tokenizer)
        return _Masked(ordered, num_samples, tokenizer, self.config.seed)

    def evaluate(
        self,
        model: Any,
        features: Sequence[Feature],
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
    ) -> Outcome:
        """Evaluate loss, perplexity and accuracy on tokens hidden the same way every time."""
        masked = _Masked(features, len(features), tokenizer, _EVALUATION_SEED)
        hidden = [masked[position] for position in range(len(masked))]
        scores = self.scores(model, hidden, tokenizer)
        num_correct = sum(score.num_correct for score in scores)
        accuracy = num_correct / max(sum(score.num_tokens for score in scores), 1)
        predictions = [
            {**example, **_found(feature, score, tokenizer)}
            for example, feature, score in zip(examples, hidden, scores, strict=True)
        ]
        return Outcome({**language_metrics(scores), "accuracy": accuracy}, predictions)


def _found(feature: Feature, score: Score, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return which tokens were hidden, at which places, and what stood there by the model."""
    labels = feature["labels"]
    places = [place for place, label in enumerate(labels) if label != IGNORED]
    return {
        "places": places,
        "hidden": tokenizer.convert_ids_to_tokens([labels[place] for place in places]),
        "predicted": tokenizer.convert_ids_to_tokens(score.predicted),
        **score.as_prediction(),
    }


class _Masked(Dataset[Feature]):
    """Features with tokens hidden, as a pure function of (seed, position)."""

    def __init__(
        self, features: Any, length: int, tokenizer: PreTrainedTokenizerBase, seed: int
    ) -> None:
        self.features = features
        self.length = length
        self.tokenizer = tokenizer
        self.seed = seed
        self._special = torch.tensor(tokenizer.all_special_ids)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Feature:
        feature = self.features[index]
        tokens = torch.tensor(feature["input_ids"])
        generator = generator_for(torch.device("cpu"), self.seed, "masked tokens", index)
        choice, fate = torch.rand(2, len(tokens), generator=generator)
        random = torch.randint(len(self.tokenizer), tokens.shape, generator=generator)
        is_ordinary = ~torch.isin(tokens, self._special)
        # At least one token, so that the loss of a short text is defined.
        chosen = choice.masked_fill(~is_ordinary, 2.0)
        is_masked = is_ordinary & ((choice < _MASKED_SHARE) | (chosen == chosen.min()))
        labels = tokens.masked_fill(~is_masked, IGNORED)
        hidden = torch.where(is_masked & (fate >= _HIDDEN_SHARE + _KEPT_SHARE), random, tokens)
        hidden = hidden.masked_fill(
            is_masked & (fate < _HIDDEN_SHARE), int(self.tokenizer.mask_token_id)
        )
        return {**feature, "input_ids": hidden.tolist(), "labels": labels.tolist()}
