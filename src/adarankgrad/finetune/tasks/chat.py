"""Conversations as segments of text: what is read, and what is learnt.

Each segment is tokenized by itself, so that the prompt has the tokens that it will have when an
answer is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from adarankgrad.finetune.tasks.interface import IGNORED
from adarankgrad.train.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]


class Segment(NamedTuple):
    """A part of a conversation."""

    text: str
    is_answer: bool


def messages_of(prompt: str, completion: str) -> list[Message]:
    """Return a conversation of one question and its answer."""
    return [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": completion},
    ]


def check_messages(messages: Any, where: str) -> list[Message]:
    """Return a conversation whose parts are there.

    Raises:
        UserError: It is no list of role and content, or nobody answers.
    """
    is_list = isinstance(messages, list) and all(isinstance(part, dict) for part in messages)
    if not is_list or not all(
        isinstance(part.get("role"), str) and isinstance(part.get("content"), str)
        for part in messages
    ):
        raise UserError(f"{where}: messages are a list of objects with role and content.")
    if not any(part["role"] == "assistant" for part in messages):
        raise UserError(f"{where}: nobody answers: no message has the role 'assistant'.")
    return [{"role": part["role"], "content": part["content"]} for part in messages]


def segments_of(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """Divide a conversation, as the tokenizer's chat template writes it.

    Without a template, a question and its answer are written as ``question``, a new line,
    ``answer`` and the end token.

    Raises:
        UserError: The template writes earlier turns in another way once later ones are there.
    """
    if tokenizer.chat_template is None:
        question, answer = messages[0]["content"], messages[-1]["content"]
        return [Segment(f"{question}\n", False), Segment(f"{answer}{tokenizer.eos_token}", True)]
    segments: list[Segment] = []
    done = ""
    for end, message in enumerate(messages, start=1):
        if message["role"] != "assistant":
            continue
        for text, is_answer in (
            (_written(messages[: end - 1], tokenizer, asks=True), False),
            (_written(messages[:end], tokenizer), True),
        ):
            if not text.startswith(done):
                raise UserError(
                    "the chat template of the tokenizer writes earlier turns anew when later ones "
                    "come, so that answers cannot be told apart: give prompt and completion."
                )
            segments.append(Segment(text[len(done) :], is_answer))
            done = text
    return segments


def prompt_of(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens after which the last answer is asked for."""
    return _tokens(segments_of(messages, tokenizer)[:-1], tokenizer)[0]


def tokens_and_labels(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Return the tokens of a conversation, and labels that leave out all but the answers."""
    return _tokens(segments_of(messages, tokenizer), tokenizer)


def _tokens(
    segments: list[Segment], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    tokens = [] if tokenizer.chat_template else _start_tokens(tokenizer)
    labels = [IGNORED] * len(tokens)
    for segment in segments:
        ids = tokenizer(segment.text, add_special_tokens=False, verbose=False)["input_ids"]
        labels += ids if segment.is_answer and tokens else [IGNORED] * len(ids)
        tokens += ids
    return tokens, labels


def _start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what the tokenizer puts before every text; chat templates write it themselves."""
    added = tokenizer("", verbose=False)["input_ids"]
    return [token for token in added if token != tokenizer.eos_token_id]


def _written(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, *, asks: bool = False
) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
        )
    except Exception as error:  # templates raise what they like
        raise UserError(f"the chat template refuses a conversation: {error}") from error
