"""The tasks and methods of `finetune_small.py`, and the learning rates to try first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

RANK = 8
_PLAIN_LR = 2e-4
"""Of weights that no method projects, under every low-rank optimizer."""


@dataclass(frozen=True)
class Task:
    """What is learnt from which data.

    Attributes:
        settings: Of `FinetuneConfig`; the model is a folder of ``--models``, the data one of
            ``--data``.
        metric: What rates and methods are judged by; a loss is better where it is lower.
        num_seeds: How many seeds every method is run with.
        methods: Which ones; None for all.
    """

    settings: dict[str, Any]
    metric: str
    num_seeds: int = 3
    methods: tuple[str, ...] | None = None

    @property
    def sign(self) -> int:
        """1 where more is better, else -1."""
        return -1 if self.metric == "loss" else 1


@dataclass(frozen=True)
class Method:
    """One way to fine-tune, with the rates to try first, in equal ratios."""

    settings: dict[str, Any]
    lrs: tuple[float, ...]


SHARED = {"batch_size": 16, "precision": "mixed-bfloat16", "log_every": 20}
TASKS = {
    "SST-2": Task(
        {
            "task": "classification",
            "model": "minilm",
            "data": "glue/SST-2/train.tsv",
            "validation": "glue/SST-2/dev.tsv",
            "train_examples": 1600,
            "max_length": 64,
            "steps": 100,
        },
        "accuracy",
    ),
    "MRPC": Task(
        {
            "task": "pair-classification",
            "model": "minilm",
            "data": "glue/MRPC/train.tsv",
            "validation": "glue/MRPC/dev.tsv",
            "max_length": 96,
            "batch_size": 8,
            "steps": 250,
        },
        "accuracy",
        num_seeds=5,
    ),
    "STS-B": Task(
        {
            "task": "regression",
            "model": "minilm",
            "data": "glue/STS-B/train.tsv",
            "validation": "glue/STS-B/dev.tsv",
            "train_examples": 1600,
            "eval_examples": 750,
            "max_length": 64,
            "steps": 100,
        },
        "spearman",
    ),
    "antibody": Task(
        {
            "task": "classification",
            "model": "antiberty",
            "data": "antibody.csv",
            "train_examples": 1200,
            "eval_examples": 600,
            "batch_size": 8,
            "steps": 150,
        },
        "matthews",
    ),
    "GSM8K": Task(
        {
            "task": "instruction",
            "model": "smollm2",
            "data": "gsm8k/train.jsonl",
            "validation": "gsm8k/test.jsonl",
            "train_examples": 240,
            "eval_examples": 60,
            "generate_examples": 0,
            "max_length": 256,
            "batch_size": 4,
            "steps": 60,
        },
        "loss",
        methods=("AdamW", "AdaRankGrad", "LoRA"),
    ),
}
METHODS = {
    "AdamW": Method({"optimizer": "adamw"}, (5e-5, 1.5e-4, 4.5e-4)),
    "AdaRankGrad": Method(
        {
            "optimizer": "adarankgrad",
            "optimizer_args": {"memory_budget": 0.03, "residual": "normalized"},
            "plain_lr": _PLAIN_LR,
        },
        (1e-4, 3e-4, 9e-4),
    ),
    "GaLore": Method(
        {"optimizer": "galore", "optimizer_args": {"rank": RANK}, "plain_lr": _PLAIN_LR},
        (6e-4, 1.8e-3, 5.4e-3),
    ),
    "Fira": Method(
        {"optimizer": "fira", "optimizer_args": {"rank": RANK}, "plain_lr": _PLAIN_LR},
        (6e-4, 1.8e-3, 5.4e-3),
    ),
    "LoRA": Method({"method": "lora", "adapter": {"rank": RANK}}, (1e-3, 3e-3, 9e-3)),
    "PRILoRA": Method(
        {"method": "prilora", "adapter": {"first_rank": 4, "last_rank": 12}}, (1e-3, 3e-3, 9e-3)
    ),
    "SoRA": Method({"method": "sora", "adapter": {"rank": RANK}}, (1e-3, 3e-3, 9e-3)),
    "SaRA": Method({"method": "sara", "adapter": {"quantile": 0.018}}, (5e-4, 1.5e-3, 4.5e-3)),
}
"""Ranks are those of LoRA's r = 8, or train or hold as much."""
