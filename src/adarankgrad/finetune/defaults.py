"""Which settings a fine-tuning run really uses: optimizer, learning rate, steps, warm-up."""

from __future__ import annotations

import math
from dataclasses import replace

from adarankgrad.finetune.config import FinetuneConfig
from adarankgrad.train.errors import UserError
from adarankgrad.train.optimizers import find_optimizer
from adarankgrad.train.settings import default_lr, default_warmup_steps

# Places to start from, in docs/finetune.md: of projected weights and of the others. Those of
# AdaRankGrad are what benchmarks/finetune_small.py found on four tasks of five.
_ADAMW_LR = 5e-5
_ADARANKGRAD_LRS = (3e-4, 2e-4)
_LOW_RANK_LRS = (2e-4, _ADAMW_LR)
_ADAPTER_LRS = {"lora": 5e-4, "prilora": 5e-4, "sora": 8e-4, "sara": 5e-4}


def with_optimizer(config: FinetuneConfig) -> FinetuneConfig:
    """Decide optimizer and learning rates.

    Raises:
        UserError: The optimizer is unknown, or has no learning rate of its own and got none.
    """
    is_full = config.method == "full"
    optimizer = config.optimizer or ("adarankgrad" if is_full else "adamw")
    is_low_rank = find_optimizer(optimizer).is_low_rank
    lr = config.lr
    if lr is None:
        lr = _default_lr(config.method, optimizer, is_low_rank=is_low_rank)
    plain_lr = config.plain_lr
    if is_full and plain_lr is None:
        # AdaGradNorm has one rate; beside any other optimizer AdamW trains the plain weights.
        is_one_rate = config.lr is not None or optimizer == "adagrad-norm"
        plain_lr = lr if is_one_rate else _full_lrs(optimizer, is_low_rank=is_low_rank)[1]
    return replace(config, optimizer=optimizer, lr=lr, plain_lr=plain_lr)


def _default_lr(method: str, optimizer: str, *, is_low_rank: bool) -> float:
    if not is_low_rank and optimizer != "adamw":
        return default_lr(optimizer)
    if method != "full":
        return _ADAPTER_LRS[method]
    return _full_lrs(optimizer, is_low_rank=is_low_rank)[0]


def _full_lrs(optimizer: str, *, is_low_rank: bool) -> tuple[float, float]:
    if optimizer == "adarankgrad":
        return _ADARANKGRAD_LRS
    return _LOW_RANK_LRS if is_low_rank else (_ADAMW_LR, _ADAMW_LR)


def with_steps(config: FinetuneConfig, num_features: int) -> FinetuneConfig:
    """Decide the number of steps, and of those that warm up; what is decided stays.

    Args:
        config: The settings.
        num_features: What one pass takes: examples, or blocks of them.

    Raises:
        UserError: More steps warm up than there are.
    """
    steps: int | None = config.steps
    if steps is None:
        assert config.epochs is not None  # as `check_duration` saw
        per_step = config.batch_size * config.gradient_accumulation
        steps = max(1, math.ceil(config.epochs * num_features / per_step))
    warmup = default_warmup_steps(steps) if config.warmup_steps is None else config.warmup_steps
    if warmup > steps:
        raise UserError(f"warmup_steps = {warmup} is more than the {steps} steps.")
    return replace(config, steps=steps, warmup_steps=warmup)


def check_duration(config: FinetuneConfig) -> None:
    """See that exactly one of steps and epochs is given.

    Raises:
        UserError: It is not.
    """
    if (config.steps is None) == (config.epochs is None):
        raise UserError("how long to train: give --steps or --epochs, one of them.")
