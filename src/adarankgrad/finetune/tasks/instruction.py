"""Answers to what is asked; only answers are learnt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from adarankgrad.finetune.columns import Columns, find_answer, find_chat, no_columns
from adarankgrad.finetune.table import Row, Table
from adarankgrad.finetune.tasks.chat import (
    check_messages,
    messages_of,
    prompt_of,
    tokens_and_labels,
)
from adarankgrad.finetune.tasks.final_number import final_number, is_marked
from adarankgrad.finetune.tasks.interface import (
    IGNORED,
    Encoded,
    Example,
    Feature,
    Outcome,
    batches,
    on_device,
    pad,
    text_of,
)
from adarankgrad.finetune.tasks.language import LanguageTask, language_metrics
from adarankgrad.train.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DEFAULT_GENERATED = 50


class Instruction(LanguageTask):
    """Prompts with completions, or whole chats."""

    model_class = "AutoModelForCausalLM"
    adapter_type = "CAUSAL_LM"
    reads = (
        "prompt_column",
        "completion_column",
        "messages_column",
        "generate_examples",
        "max_new_tokens",
    )

    def columns(self, table: Table) -> Columns:
        """Find prompt and completion, or messages."""
        config = self.config
        wants_pair = config.prompt_column is not None or config.completion_column is not None
        if wants_pair and config.messages_column is not None:
            raise UserError(
                "--messages-column is of whole chats: leave it out, or --prompt-column and "
                "--completion-column."
            )
        chat = None if wants_pair else find_chat(table, config.messages_column)
        found = chat or find_answer(table, config.prompt_column, config.completion_column)
        if found is None:
            raise no_columns(table, "prompt")
        return found

    def example(self, row: Row, columns: Columns, where: str) -> Example:
        """Return the conversation."""
        if "messages" in columns:
            return {"messages": check_messages(row.get(columns["messages"]), where)}
        return {
            "prompt": text_of(row, columns["prompt"], where),
            "completion": text_of(row, columns["completion"], where),
        }

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase, columns: Columns) -> None:
        """See that chats can be written, and that answers can end."""
        if "messages" in columns and tokenizer.chat_template is None:
            raise UserError(
                f"the tokenizer of {self.config.model} has no chat template, which the column "
                f"{columns['messages']!r} needs: take an instruct model, or give columns of prompt "
                "and completion."
            )
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer of {self.config.model} has no end token (eos) to end answers with."
            )

    def check_answers(
        self, validation: Sequence[Example], tokenizer: PreTrainedTokenizerBase, limit: int | None
    ) -> None:
        """See that the prompts to answer leave room for ``max_new_tokens``."""
        asked = validation[: self._num_generated(validation)]
        if limit is None or not asked:
            return
        longest = max(len(prompt_of(_messages(example), tokenizer)) for example in asked)
        new_tokens = self.config.max_new_tokens
        if longest + new_tokens > limit:
            room = limit - longest
            lower = f"lower --max-new-tokens to {room}, or " if room > 0 else ""
            raise UserError(
                f"a validation prompt of {longest} tokens and an answer of {new_tokens} are more "
                f"than the {limit} that {self.config.model} can read: {lower}give "
                "--generate-examples 0."
            )

    def encode(
        self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> Encoded:
        """Tokenize; long conversations lose their end, and perhaps their answer."""
        features: list[Feature] = []
        num_cut = 0
        for example in examples:
            tokens, labels = tokens_and_labels(_messages(example), tokenizer)
            num_cut += len(tokens) > max_length
            tokens, labels = tokens[:max_length], labels[:max_length]
            mask = [1] * len(tokens)
            features.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
        num_empty = sum(not _has_answer(feature) for feature in features)
        encoded = Encoded(features, num_cut, num_empty)
        if not encoded.num_learnt:
            raise UserError(
                f"no answer begins within {max_length} tokens: raise --max-length, or shorten the "
                "prompts."
            )
        return encoded

    def training_data(
        self, features: Sequence[Feature], num_samples: int, tokenizer: PreTrainedTokenizerBase
    ) -> Dataset[Any]:
        """Return the features that have something to learn."""
        return super().training_data(
            [feature for feature in features if _has_answer(feature)], num_samples, tokenizer
        )

    def evaluate(
        self,
        model: Any,
        features: Sequence[Feature],
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
    ) -> Outcome:
        """Evaluate loss per token of the answers."""
        scores = self.scores(model, features, tokenizer)
        metrics = language_metrics(scores)
        predictions = [
            {**example, **score.as_prediction()}
            for example, score in zip(examples, scores, strict=True)
        ]
        return Outcome(metrics, predictions)

    def complete(
        self,
        outcome: Outcome,
        model: Any,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
    ) -> Outcome:
        """Add answers, generated greedily, and the share of them that match.

        Where no reference has a final number, nothing can match and no share is given.
        """
        asked = list(examples[: self._num_generated(examples)])
        if not asked:
            return outcome
        answers = self._generate(model, asked, tokenizer)
        judged = [_judge(*pair) for pair in zip(asked, answers, strict=True)]
        whole = [
            prediction | judgement
            for prediction, judgement in zip(outcome.predictions, judged, strict=False)
        ]
        matches = [each["exact_match"] for each in judged if "exact_match" in each]
        metrics = {"exact_match": sum(matches) / len(matches)} if matches else {}
        metrics |= {"generated_examples": len(judged)}
        return Outcome(outcome.metrics | metrics, [*whole, *outcome.predictions[len(whole) :]])

    def _num_generated(self, examples: Sequence[Example]) -> int:
        if self.config.generate_examples is not None:
            return self.config.generate_examples
        all_marked = all(is_marked(_messages(example)[-1]["content"]) for example in examples)
        return _DEFAULT_GENERATED if all_marked else 0

    def _generate(
        self, model: Any, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
    ) -> list[str]:
        """Return answers, each token the likeliest."""
        prompts: list[Feature] = []
        for example in examples:
            tokens = prompt_of(_messages(example), tokenizer)
            prompts.append({"input_ids": tokens, "attention_mask": [1] * len(tokens)})
        answers: dict[int, str] = {}
        model.eval()
        with torch.inference_mode():
            for positions, chosen in batches(prompts, self.config.batch_size):
                batch = on_device(pad(chosen, tokenizer.pad_token_id or 0, side="left"), model)
                output = model.generate(
                    **batch,
                    max_new_tokens=self.config.max_new_tokens,
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                )
                generated = output[:, batch["input_ids"].shape[1] :]
                texts = tokenizer.batch_decode(generated, skip_special_tokens=True)
                answers |= dict(zip(positions, texts, strict=True))
        return [answers[position] for position in range(len(prompts))]


def _has_answer(feature: Feature) -> bool:
    return bool(set(feature["labels"][1:]) - {IGNORED})


def _judge(example: Example, answer: str) -> dict[str, Any]:
    """Return an answer and, where the reference has a final number, whether it has the same."""
    wanted = final_number(_messages(example)[-1]["content"])
    if wanted is None:
        return {"prediction": answer}
    return {"prediction": answer, "exact_match": final_number(answer) == wanted}


def _messages(example: Example) -> list[dict[str, str]]:
    if "messages" in example:
        found: list[dict[str, str]] = example["messages"]
        last = max(i for i, part in enumerate(found) if part["role"] == "assistant")
        return found[: last + 1]
    return messages_of(example["prompt"], example["completion"])
