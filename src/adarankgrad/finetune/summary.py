"""The result of a finished fine-tuning run, as summary.json holds it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from adarankgrad.train.folder import PREDICTIONS_NAME
from adarankgrad.train.summary import summarize as summarize_run

if TYPE_CHECKING:
    from adarankgrad.finetune.config import FinetuneConfig
    from adarankgrad.train.trainer import RunTrainer


def summarize(
    config: FinetuneConfig,
    run_dir: Path,
    trainer: RunTrainer,
    metrics: dict[str, float],
    best_step: int,
    base_parameters: int,
) -> dict[str, Any]:
    """Collect the numbers of summary.json.

    Args:
        config: The settings.
        run_dir: The run folder.
        trainer: At the end of the run.
        metrics: Those of the best checkpoint.
        best_step: Its step.
        base_parameters: Weights of the model without an adapter, a new head included.
    """
    summary = summarize_run(config, run_dir, trainer)
    weights = list(trainer.recorder.optimizer.param_groups)
    paths = summary.pop("paths")
    if (run_dir / PREDICTIONS_NAME).exists():
        paths["predictions"] = str(run_dir / PREDICTIONS_NAME)
    return {
        "task": config.task,
        "method": config.method,
        **summary,
        "val_loss": metrics["loss"],
        "perplexity": metrics.get("perplexity"),
        "metrics": metrics,
        "best_metric": trainer.best_metric,
        "best_step": best_step,
        "trainable_parameters": sum(w.numel() for group in weights for w in group["params"]),
        "base_parameters": base_parameters,
        "paths": paths,
    }
