"""The settings of a fine-tuning run: `RunConfig`'s, and those of task, data and method.

Nothing here imports torch: ``adarankgrad --help`` stays fast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from adarankgrad.train.errors import UserError, unknown_name
from adarankgrad.train.run_config import RunConfig, check_positive, setting

TASKS = (
    "classification",
    "pair-classification",
    "regression",
    "causal-lm",
    "instruction",
    "masked-lm",
)
METHODS = ("full", "lora", "prilora", "sora", "sara")
OF_SOME_TASKS = (
    "text_column",
    "pair_column",
    "label_column",
    "prompt_column",
    "completion_column",
    "messages_column",
    "split_characters",
    "generate_examples",
    "max_new_tokens",
)
"""Settings that not every task reads; each task says which it does."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    """Everything that decides the result of a fine-tuning run.

    The help text of each field is in its metadata and printed by ``adarankgrad finetune --help``.
    Fields that default to None are chosen from the others when training starts.

    Example:
        >>> config = FinetuneConfig(
        ...     task="classification", model="minilm", data="train.tsv", output="runs/a", epochs=3
        ... )
        >>> config.method
        'full'
    """

    command: ClassVar[str] = "finetune"
    length_flag: ClassVar[str] = "--max-length"
    # A step has few tokens here, beside which orthogonalising costs several times the model.
    implied_arguments: ClassVar[dict[str, dict[str, Any]]] = {
        "adarankgrad": {"residual": "normalized"}
    }

    task: str = setting(f"One of {', '.join(TASKS)}. Pairs of regression are found by columns.")
    model: str = setting("Folder of a pretrained model, or its name on the hub (owner/name).")
    data: str = setting(
        "Examples to train on: files (.csv, .tsv, .json, .jsonl, .parquet, .txt), globs, several "
        "with commas between, or a dataset's name on the hub (owner/name[:config][@split])."
    )
    validation: str | None = setting(
        "Examples to validate on, likewise. Default: a tenth of the data, drawn at random, the "
        "same for every seed.",
        None,
    )
    text_column: str | None = setting("Column of the text. Default: found by name.", None)
    pair_column: str | None = setting("Column of the second text of a pair.", None)
    label_column: str | None = setting("Column of the label, or of the number.", None)
    prompt_column: str | None = setting("Column of what is asked, for instruction.", None)
    completion_column: str | None = setting("Column of the answer, for instruction.", None)
    messages_column: str | None = setting(
        "Column of a chat (a list of role and content), for instruction.", None
    )
    max_length: int | None = setting(
        "Tokens per example; longer ones are cut, and counted. Default: what the model allows, at "
        "most 512.",
        None,
        kind="int",
    )
    split_characters: bool = setting(
        "Put a space between letters: for tokenizers of residues, one token a letter.",
        False,
        kind="bool",
    )
    group_by_length: bool = setting(
        "Draw batches of examples about as long as each other, so that little is padding.",
        False,
        kind="bool",
    )
    train_examples: int | None = setting(
        "Training examples to use, drawn at random, the same for every seed. Default: all.",
        None,
        kind="int",
    )
    eval_examples: int | None = setting(
        "Validation examples to use, drawn likewise. Default: all.", None, kind="int"
    )
    generate_examples: int | None = setting(
        "Validation examples to generate answers for at the end, for instruction. Default: 50 "
        "where every answer has a final number after ####, else 0.",
        None,
        kind="int",
    )
    max_new_tokens: int = setting("Tokens of a generated answer, at most.", 256, kind="int")
    method: str = setting(
        "full (every weight, with any optimizer), lora, prilora, sora or sara.", "full"
    )
    adapter: dict[str, Any] = setting(
        "Settings of the adapter as name=value,...: rank=8,alpha=16 for lora.",
        {},
        kind="dict",
        example="rank=8,alpha=16",
    )
    metric: str | None = setting(
        "What the best checkpoint is chosen by: loss, or a metric of the task. Default: per task.",
        None,
    )
    optimizer: str = setting(
        "As for train: adarankgrad, galore, fira, adamw, ..., or the dotted path of a class. "
        "Default: adarankgrad for --method full, adamw for adapters.",
        "",
    )
    # None until `epochs` is turned into steps, before anything else reads it.
    steps: int | None = setting(  # type: ignore[assignment]
        "Optimizer steps; or give --epochs.", None, kind="int"
    )
    epochs: float | None = setting(
        "Passes over the examples or, of causal-lm, blocks; instead of --steps.", None, kind="float"
    )
    trust_remote_code: bool = setting(
        "Run code that comes with the model. Off: such models are refused.", False, kind="bool"
    )

    def check_own(self) -> None:
        """Check the settings of task, data and method, each by itself and together."""
        if self.task not in TASKS:
            raise unknown_name("task", self.task, list(TASKS))
        if self.method not in METHODS:
            raise unknown_name("method", self.method, list(METHODS))
        for name in ("epochs", "train_examples", "eval_examples", "max_new_tokens"):
            check_positive(name, getattr(self, name))
        if self.max_length is not None and self.max_length < 2:
            raise UserError(f"max_length = {self.max_length} must be at least 2 tokens.")
        if self.generate_examples is not None and self.generate_examples < 0:
            raise UserError(f"generate_examples = {self.generate_examples} must not be negative.")
        self._check_method()

    def _check_method(self) -> None:
        if self.method == "full":
            if self.adapter:
                raise UserError("--adapter is for lora, prilora, sora and sara: name a --method.")
            return
        if self.plain_lr is not None:
            raise UserError("--plain-lr is for --method full: leave it out.")
