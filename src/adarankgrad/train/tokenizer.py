"""The tokenizer: a byte-level BPE trained on the data, or one loaded from a folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adarankgrad.train.errors import UserError
from adarankgrad.train.presets import first_line, model_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from adarankgrad.train.config import TrainConfig

END_TOKEN = "<|endoftext|>"
SMALLEST_VOCABULARY = 257
"""256 bytes and the end token."""


def given_tokenizer(config: TrainConfig) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer that the settings name, or None where one is to be trained.

    A model continued from its weights needs its own tokenizer: another one would give its tokens
    another meaning.

    Raises:
        UserError: The folder holds no tokenizer, or the tokenizer has no end token.
    """
    if config.tokenizer is not None:
        return load_tokenizer(Path(config.tokenizer))
    folder = model_folder(config.model)
    if folder is None or not (folder / "config.json").exists():
        return None
    if not (folder / "tokenizer_config.json").exists() and not (folder / "tokenizer.json").exists():
        raise UserError(f"{folder} holds no tokenizer: name one with --tokenizer.")
    return load_tokenizer(folder)


def check_can_train(vocab_size: int) -> None:
    """See that a vocabulary has room for every byte.

    Raises:
        UserError: It has not.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"vocab_size = {vocab_size} is too small for a byte-level tokenizer: give at least "
            f"{SMALLEST_VOCABULARY}."
        )


def check_knows(model: str, vocab_size: int, largest_token: int) -> None:
    """See that a model knows every token that its tokenizer makes.

    Args:
        model: Its name, for the message.
        vocab_size: Tokens that it knows.
        largest_token: Number of a token.

    Raises:
        UserError: It does not.
    """
    if largest_token >= vocab_size:
        raise UserError(
            f"the tokenizer of {model} makes token {largest_token}, but the model knows "
            f"{vocab_size}: they do not belong together."
        )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer that can join documents, without network and without remote code."""
    tokenizer = read_tokenizer(folder)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer in {folder} has no end token (eos) to join documents with.")
    return tokenizer


def read_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load any tokenizer from a folder, without network.

    Args:
        folder: With the tokenizer's files.
        trust_remote_code: Whether to run code that the folder holds.

    Raises:
        UserError: There is no folder, or no tokenizer in it.
    """
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise UserError(f"the tokenizer folder {folder} does not exist.")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # transformers raises many kinds for a bad folder
        raise UserError(f"{folder} holds no usable tokenizer: {first_line(error)}") from error
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int, seq_len: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE; it encodes any text, and `END_TOKEN` ends a document.

    Args:
        texts: Training text, in pieces.
        vocab_size: Most tokens; little text fills fewer.
        seq_len: The longest input that the tokenizer should announce, in tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast_tokenizer: Any = PreTrainedTokenizerFast
    wrapped: PreTrainedTokenizerBase = fast_tokenizer(
        tokenizer_object=tokenizer,
        bos_token=END_TOKEN,
        eos_token=END_TOKEN,
        pad_token=END_TOKEN,
        model_max_length=seq_len,
        clean_up_tokenization_spaces=False,
    )
    return wrapped
