"""The settings of a run in transformers' words."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import TrainingArguments

if TYPE_CHECKING:
    from adarankgrad.train.run_config import RunConfig

_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def training_arguments(config: RunConfig, run_dir: Path, device: torch.device) -> TrainingArguments:
    """Translate the settings for transformers; what to log and save when stays with `Flow`."""
    assert config.lr is not None and config.warmup_steps is not None
    arguments_class = _arguments_on(device) if device.type == "cuda" else TrainingArguments
    return arguments_class(
        output_dir=str(run_dir),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        # `RunTrainer` takes all micro-batches of a step at once, and continues by itself.
        gradient_accumulation_steps=1,
        ignore_data_skip=True,
        learning_rate=config.lr,
        lr_scheduler_type=_SCHEDULES[config.lr_schedule],
        warmup_steps=config.warmup_steps,
        max_grad_norm=config.max_grad_norm,
        bf16=config.precision == "mixed-bfloat16",
        seed=config.seed,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        logging_strategy="no",
        logging_nan_inf_filter=False,
        eval_strategy="no",
        save_strategy="no",
        prediction_loss_only=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
        log_level="error",
    )


def _arguments_on(device: torch.device) -> type[TrainingArguments]:
    """Return arguments for exactly one GPU; transformers would use every visible one."""

    class OneGpuArguments(TrainingArguments):
        @cached_property
        def _setup_devices(self) -> torch.device:
            super()._setup_devices  # noqa: B018 - sets up accelerate's state
            torch.cuda.set_device(device)
            self._n_gpu = 1
            return device

    return OneGpuArguments
