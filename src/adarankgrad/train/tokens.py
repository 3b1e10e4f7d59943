"""Token streams: encoded once, kept in the run folder, served as blocks of equal length.

Documents are joined by the tokenizer's end token and cut into blocks of ``seq_len`` tokens, with
no padding. The order of blocks is a pure function of (seed, position), so that a resumed run
continues where it stopped without replaying anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from adarankgrad.train.data import Source
from adarankgrad.train.errors import UserError
from adarankgrad.train.files import check_undamaged, staged_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# An encoding takes a hundred times the memory of its text, and freed memory stays in the process.
_CHARACTERS_AT_ONCE = 1 << 18
# Batches that share their examples by length: enough for little padding, few enough for chance.
_BATCHES_SORTED = 50


class TokenStreams(NamedTuple):
    """Training and validation tokens, one dimension each, uint16 or int32."""

    train: np.ndarray
    validation: np.ndarray


def encode(source: Source, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Encode a source into one stream, the end token after every document.

    Returns:
        (num_tokens,), uint16 where the vocabulary allows it, else int32.
    """
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.int32
    parts: list[np.ndarray] = []
    texts: list[str] = []
    ends: list[bool] = []

    def flush() -> None:
        if not texts:
            return
        encoded = tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        for ids, ends_document in zip(encoded, ends, strict=True):
            end = [tokenizer.eos_token_id] if ends_document else []
            parts.append(np.asarray([*ids, *end], dtype=dtype))
        texts.clear()
        ends.clear()

    num_characters = 0
    for piece in source.pieces():
        texts.append(piece.text)
        ends.append(piece.ends_document)
        num_characters += len(piece.text)
        if num_characters >= _CHARACTERS_AT_ONCE:
            flush()
            num_characters = 0
    flush()
    return np.concatenate(parts) if parts else np.empty(0, dtype=dtype)


def require_enough(streams: TokenStreams, seq_len: int, batch_size: int) -> None:
    """See that there is at least one batch to train on and one block to validate on.

    Raises:
        UserError: Saying how many tokens there are and how many are needed.
    """
    needed = seq_len * batch_size
    if len(streams.train) < needed:
        raise UserError(
            f"the training data has {len(streams.train)} tokens, too few for one batch of "
            f"{batch_size} x {seq_len} = {needed}: give more data, or lower --batch-size or "
            "--seq-len."
        )
    if len(streams.validation) < seq_len:
        raise UserError(
            f"the validation data has {len(streams.validation)} tokens, too few for one sequence "
            f"of {seq_len}: give more data, lower --seq-len, or name --validation."
        )


def save_tokens(folder: Path, streams: TokenStreams, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write both streams and the tokenizer into a folder that appears only when complete."""
    with staged_folder(folder) as staging:
        np.save(staging / "train.npy", streams.train)
        np.save(staging / "validation.npy", streams.validation)
        tokenizer.save_pretrained(staging / "tokenizer")


def load_tokens(folder: Path) -> TokenStreams:
    """Map the streams of a run folder into memory.

    Raises:
        UserError: They are missing or damaged.
    """
    check_undamaged(folder, "tokens")
    return TokenStreams(
        train=np.load(folder / "train.npy", mmap_mode="r"),
        validation=np.load(folder / "validation.npy", mmap_mode="r"),
    )


class Blocks(Dataset[dict[str, Tensor]]):
    """A stream cut into blocks of ``seq_len`` tokens, in order.

    Attributes:
        num_blocks: Whole blocks in the stream; a rest is left out.
    """

    def __init__(self, stream: np.ndarray, seq_len: int) -> None:
        self.stream = stream
        self.seq_len = seq_len
        self.num_blocks = len(stream) // seq_len

    def __len__(self) -> int:
        return self.num_blocks

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self.seq_len
        block = self.stream[start : start + self.seq_len].astype(np.int64)
        ids = torch.from_numpy(block)
        return {"input_ids": ids, "labels": ids}


class Shuffled(Dataset[dict[str, Tensor]]):
    """As many examples as a run consumes: every pass over the data in its own random order.

    Args:
        examples: The data, with a length.
        num_samples: Examples that the run consumes, passes over the data included.
        seed: With the number of the pass, decides the order.
        lengths: Of the examples; given them, a batch holds examples of about one length.
        batch_size: How many make a batch.
    """

    def __init__(
        self,
        examples: Any,
        num_samples: int,
        seed: int,
        *,
        lengths: Sequence[int] | None = None,
        batch_size: int = 1,
    ) -> None:
        self.examples = examples
        self.num_samples = num_samples
        self.seed = seed
        self._lengths = None if lengths is None else torch.tensor(lengths)
        self._batch_size = batch_size
        self._pass = -1
        self._order: Tensor = torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number, position = divmod(index, len(self.examples))
        if number != self._pass:
            self._order = self._order_of(number)
            self._pass = number
        example: dict[str, Tensor] = self.examples[int(self._order[position])]
        return example

    def _order_of(self, number: int) -> Tensor:
        """Return a random order of one pass, of whole batches where lengths are known."""
        generator = torch.Generator().manual_seed((self.seed << 20) + number)
        order = torch.randperm(len(self.examples), generator=generator)
        if self._lengths is None:
            return order
        batches: list[Tensor] = []
        for window in torch.split(order, _BATCHES_SORTED * self._batch_size):
            by_length = window[self._lengths[window].argsort(stable=True)]
            batches += torch.split(by_length, self._batch_size)
        shuffled = torch.randperm(len(batches), generator=generator).tolist()
        # A pass may end on a batch that is not full: it stays the last, so that none is torn.
        shuffled.sort(key=lambda index: len(batches[index]) < self._batch_size)
        return torch.cat([batches[index] for index in shuffled])
