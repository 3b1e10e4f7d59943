"""The next token of plain texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from adarankgrad.finetune.columns import Columns
from adarankgrad.finetune.tasks.interface import Encoded, Example, Feature, Outcome
from adarankgrad.finetune.tasks.language import TextTask, language_metrics, next_token_labels
from adarankgrad.train.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NUM_SHOWN = 16
"""Tokens of a block that tell a reader which it is."""


class CausalLM(TextTask):
    """Texts joined by the end token and cut into blocks of the same length."""

    model_class = "AutoModelForCausalLM"
    adapter_type = "CAUSAL_LM"

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase, columns: Columns) -> None:
        """See that there is an end token."""
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer of {self.config.model} has no end token (eos) to join texts with."
            )

    def encode(
        self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> Encoded:
        """Tokenize; nothing is cut off, a last short block is kept."""
        stream: list[int] = []
        for text in self.texts(examples):
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            stream += [*ids, tokenizer.eos_token_id]
        blocks = (stream[i : i + max_length] for i in range(0, len(stream), max_length))
        features: list[Feature] = [
            {
                "input_ids": block,
                "attention_mask": [1] * len(block),
                "labels": next_token_labels(block),
            }
            for block in blocks
            if len(block) > 1
        ]
        return Encoded(features, 0)

    def evaluate(
        self,
        model: Any,
        features: Sequence[Feature],
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
    ) -> Outcome:
        """Evaluate loss per token and perplexity, and the loss of each block."""
        scores = self.scores(model, features, tokenizer)
        predictions = [
            {
                "block": number,
                "begins": tokenizer.decode(feature["input_ids"][:_NUM_SHOWN]),
                **score.as_prediction(),
            }
            for number, (feature, score) in enumerate(zip(features, scores, strict=True))
        ]
        return Outcome(language_metrics(scores), predictions)
