"""What a fine-tuned run left, for ``adarankgrad sparsify``: its model, judged by its task."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from adarankgrad.finetune.config import FinetuneConfig
from adarankgrad.finetune.pretrained import fit_length, load_config, load_model
from adarankgrad.finetune.run import read_data
from adarankgrad.finetune.tasks.find import find_task
from adarankgrad.train.errors import UserError
from adarankgrad.train.run_config import with_tables
from adarankgrad.train.sparsity import Subject, model_folder

if TYPE_CHECKING:
    from adarankgrad.train.record import RunRecord


def is_finetuned(run: RunRecord) -> bool:
    """Whether a run is of ``adarankgrad finetune``."""
    return "task" in run.config


def open_finetuned(run: RunRecord, device: torch.device) -> Subject:
    """Load model and validation examples from the run folder.

    Answers are not generated: a language model is judged by the loss of their tokens.

    Raises:
        UserError: The run left an adapter, or model or data are missing or damaged.
    """
    config = FinetuneConfig.from_settings(with_tables(run.config, FinetuneConfig))
    if config.method not in ("full", "sara"):
        raise UserError(
            f"{run.path} left an adapter ({config.method}), and its base model as it was: name a "
            "run of --method full or sara."
        )
    config = replace(config, model=str(model_folder(run)))
    task = find_task(config)
    examples, tokenizer = read_data(config, run.path, task, is_saved=True)
    model_config = load_config(config, task)
    max_length = fit_length(config, model_config, tokenizer)
    model, new_weights = load_model(config, task, model_config)
    if new_weights:
        raise UserError(f"{config.model} lacks {new_weights[0]}: train again with --overwrite.")
    features = task.encode(examples.validation, tokenizer, max_length).features

    def evaluate(model: nn.Module) -> dict[str, float]:
        return task.evaluate(model, features, examples.validation, tokenizer).metrics

    return Subject(model.to(device).eval(), evaluate, task.best_metric, "validation loss")
