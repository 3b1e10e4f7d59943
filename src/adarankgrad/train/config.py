"""The settings of a training run from text: `RunConfig`'s, and those of its data.

Nothing here imports torch: ``adarankgrad --help`` stays fast.
"""

from __future__ import annotations

from dataclasses import Field, dataclass
from typing import Any, ClassVar

from adarankgrad.train.errors import UserError
from adarankgrad.train.run_config import RunConfig, check_positive, setting


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """Everything that decides the result of a training run.

    The help text of each field is in its metadata and printed by ``adarankgrad train --help``.
    Fields that default to None are chosen from the others when training starts (learning rate from
    the optimizer, vocabulary from the model, warm-up from the steps) or left to the optimizer.

    Example:
        >>> config = TrainConfig(data="corpus/", output="runs/first", steps=200)
        >>> config.optimizer
        'adarankgrad'
    """

    command: ClassVar[str] = "train"
    length_flag: ClassVar[str] = "--seq-len"

    data: str = setting(
        "Text to train on: a file, folder, glob, or a dataset's name on the hub (owner/name). "
        "Text, .jsonl, .json and .parquet."
    )
    validation: str | None = setting(
        "Text to validate on. Default: the last 5 % of the data.", None
    )
    text_column: str = setting("Column that holds the text in .jsonl, .json, .parquet.", "text")
    model: str = setting(
        "A LLaMA size (small-llama, 9m, 20m, 35m, 60m, 71m, 130m, 250m, 350m, 1b, 3b, 7b), "
        "a config.json, or the folder of a model to continue.",
        "small-llama",
    )
    tokenizer: str | None = setting(
        "Folder of a tokenizer to use. Default: the model's, else a byte-level BPE trained on "
        "the data.",
        None,
    )
    vocab_size: int | None = setting(
        "Vocabulary in tokens. Default: the model's (small-llama: 4096).", None, kind="int"
    )
    seq_len: int = setting("Tokens per sequence.", 256, kind="int")

    def check_own(self) -> None:
        """Check the ranges of the settings of text."""
        check_positive("vocab_size", self.vocab_size)
        if self.seq_len < 2:
            raise UserError(
                f"seq_len = {self.seq_len} must be at least 2: one token predicts the next."
            )


FIELDS: dict[str, Field[Any]] = TrainConfig.settings()
"""Every setting by name, with help text and kind in its metadata."""

TABLES = TrainConfig.tables()
"""Settings that are names with values of their own."""
