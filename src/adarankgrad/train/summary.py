"""The result of a finished run, as summary.json holds it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from adarankgrad.train.files import read_jsonl
from adarankgrad.train.folder import MODEL_FOLDER
from adarankgrad.train.recorder import METRICS_NAME

if TYPE_CHECKING:
    from adarankgrad.train.run_config import RunConfig
    from adarankgrad.train.trainer import RunTrainer


def summarize(config: RunConfig, run_dir: Path, trainer: RunTrainer) -> dict[str, Any]:
    """Collect the numbers of summary.json from a finished run."""
    rows = read_jsonl(run_dir / METRICS_NAME)
    last = [row for row in rows if "loss" in row][-1]
    last_evaluation = [row for row in rows if "val_loss" in row][-1]
    recorder = trainer.recorder
    sizes = recorder.sizes()
    peak_bytes, peak_source = recorder.peak()
    model: Any = trainer.model
    return {
        "optimizer": config.optimizer,
        "steps": trainer.state.global_step,
        "samples": recorder.num_samples,
        "tokens": last["tokens"],
        "training_flops": recorder.training_flops,
        "train_loss": last["loss"],
        "val_loss": last_evaluation["val_loss"],
        "perplexity": last_evaluation.get("perplexity"),
        "state_bytes": sizes.state_bytes,
        "projected_state_bytes": sizes.projected_state_bytes,
        "adamw_projected_state_bytes": sizes.adamw_projected_state_bytes,
        "weight_bytes": sum(w.numel() * w.element_size() for w in model.parameters())
        + sizes.correction_bytes,
        "gradient_bytes": recorder.gradient_bytes,
        "peak_bytes": peak_bytes,
        "peak_bytes_source": peak_source,
        "skipped_steps": recorder.skipped_steps(),
        "mean_rank": sizes.mean_rank,
        "tokens_per_second": last["tokens"] / max(recorder.training_s, 1e-9),
        "optimizer_s": recorder.clock.seconds(),
        "elapsed_s": recorder.elapsed_s(),
        **trainer.method_summary(),
        "paths": {
            "model": str(run_dir / MODEL_FOLDER),
            "report": str(run_dir / "report.html"),
            "metrics": str(run_dir / METRICS_NAME),
            "plots": str(run_dir / "plots"),
        },
    }
