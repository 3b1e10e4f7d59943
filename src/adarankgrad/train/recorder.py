"""What a run writes down while it trains: metrics.jsonl, ranks.jsonl, and the clocks behind them.

Everything but the times is the same whether a run was interrupted or not: sums that are open at a
checkpoint are saved in it, and lines after the checkpoint are dropped on resume.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from adarankgrad.train.files import keep_steps_up_to
from adarankgrad.train.measure import OptimizerClock, held_gradient_bytes, peak_memory
from adarankgrad.train.optimizers import StateSizes, count_skipped_steps, measure_state

METRICS_NAME = "metrics.jsonl"
RANKS_NAME = "ranks.jsonl"


class Recorder:
    """Collects the numbers of one run.

    Args:
        run_dir: Where the files are.
        optimizer: The one to time and measure.
        projected: Weights that count as projected.
        device: Whose memory is measured.

    Attributes:
        num_samples: Samples that were trained on, earlier sessions included.
        gradient_bytes: The most that gradients held between a backward pass and its step.
        best_step: Of the best evaluation so far, where one is looked for.
    """

    def __init__(
        self,
        run_dir: Path,
        optimizer: Optimizer,
        projected: list[Tensor],
        device: torch.device,
    ) -> None:
        self.run_dir = run_dir
        self.optimizer = optimizer
        self.projected = projected
        self.device = device
        self.clock = OptimizerClock(optimizer, device)
        self.training_s = 0.0
        self.gradient_bytes = 0
        self._session_started = time.perf_counter()
        self._step_started = 0.0
        self._elapsed_before_s = 0.0
        self._peak_before = 0
        self._loss_sum = 0.0
        self._num_open_steps = 0
        self._open_s = 0.0
        self.num_samples = 0
        self._num_tokens = 0
        self._num_open_tokens = 0
        self.best_step: int | None = None
        self._best_score: list[float] = []
        self._flops: int | None = 0

    @property
    def num_tokens(self) -> int:
        """Tokens trained on so far, without padding."""
        return self._num_tokens

    @property
    def training_flops(self) -> int | None:
        """Floating-point operations of training so far; None where they are not known."""
        return self._flops

    def start_step(self) -> None:
        """Note that a step begins."""
        self._step_started = time.perf_counter()

    def add_batch(self, loss: float, num_samples: int, num_tokens: int, flops: int | None) -> None:
        """Add a micro-batch.

        Args:
            loss: Its share of the step's loss.
            num_samples: Its samples.
            num_tokens: Its tokens, without padding.
            flops: Floating-point operations; None where they are not known.
        """
        self._loss_sum += loss
        self.num_samples += num_samples
        self._num_tokens += num_tokens
        self._num_open_tokens += num_tokens
        self._flops = None if self._flops is None or flops is None else self._flops + flops

    def measure_gradients(self) -> None:
        """Measure the gradients that are held now."""
        self.gradient_bytes = max(self.gradient_bytes, held_gradient_bytes(self.optimizer))

    def end_step(self) -> None:
        """Note that a step is done."""
        seconds = time.perf_counter() - self._step_started
        self.training_s += seconds
        self._open_s += seconds
        self._num_open_steps += 1

    def log_step(
        self, step: int, lr: float, grad_norm: float, more: Mapping[str, float | None]
    ) -> dict[str, Any]:
        """Write the lines of a logged step; its loss is the mean since the last one.

        Args:
            step: Its number.
            lr: Its learning rate.
            grad_norm: Its gradient's norm, before clipping.
            more: Numbers of methods, by name.

        Returns:
            The line of metrics.jsonl.
        """
        sizes = self.sizes()
        num_steps = max(self._num_open_steps, 1)
        row = {
            "step": step,
            "tokens": self._num_tokens,
            "training_flops": self._flops,
            "loss": self._loss_sum / num_steps,
            "lr": lr,
            # JSON has no infinity; a step whose gradient overflowed shows null.
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "skipped_steps": self.skipped_steps(),
            "mean_rank": sizes.mean_rank,
            "state_bytes": sizes.state_bytes,
            "tokens_per_second": self._num_open_tokens / max(self._open_s, 1e-9),
            **more,
            "elapsed_s": self.elapsed_s(),
        }
        self._loss_sum, self._num_open_steps, self._open_s = 0.0, 0, 0.0
        self._num_open_tokens = 0
        # Draining the clock here keeps its list of CUDA events short.
        self.clock.seconds()
        self._append(METRICS_NAME, row)
        if sizes.layers:
            self._append(RANKS_NAME, {"step": step, "layers": sizes.layers})
        return row

    def log_evaluation(
        self, step: int, val_loss: float, metrics: Mapping[str, float]
    ) -> dict[str, Any]:
        """Write the line of an evaluation, loss and other metrics, and return it."""
        row = {
            "step": step,
            "tokens": self._num_tokens,
            "training_flops": self._flops,
            "val_loss": val_loss,
            **metrics,
        }
        self._append(METRICS_NAME, row)
        return row

    def note_best(self, step: int, score: list[float]) -> bool:
        """Remember an evaluation if it is the best so far, and tell whether it is.

        Args:
            step: When it was made.
            score: Higher is better; of equal first numbers the second decides, and so on.
        """
        is_best = score > self._best_score
        if is_best:
            self.best_step, self._best_score = step, score
        return is_best

    def sizes(self) -> StateSizes:
        """Measure the optimizer's state now."""
        return measure_state(self.optimizer, self.projected)

    def skipped_steps(self) -> int | None:
        """Return how many steps were left out for gradients that were not finite, since step 1."""
        return count_skipped_steps(self.optimizer)

    def elapsed_s(self) -> float:
        """Return the time spent in this run, earlier sessions included."""
        return self._elapsed_before_s + time.perf_counter() - self._session_started

    def peak(self) -> tuple[int, str]:
        """Return the peak memory over all sessions, and which counter says so."""
        peak, source = peak_memory(self.device)
        return max(peak, self._peak_before), source

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold to continue, as plain values."""
        return {
            "loss_sum": self._loss_sum,
            "num_open_steps": self._num_open_steps,
            "open_s": self._open_s,
            "num_samples": self.num_samples,
            "num_tokens": self._num_tokens,
            "num_open_tokens": self._num_open_tokens,
            "best_step": self.best_step,
            "best_score": self._best_score,
            "training_flops": self._flops,
            "training_s": self.training_s,
            "optimizer_s": self.clock.seconds(),
            "elapsed_s": self.elapsed_s(),
            "peak_bytes": self.peak()[0],
            "gradient_bytes": self.gradient_bytes,
        }

    def restore(self, state: dict[str, Any], step: int) -> None:
        """Continue from a checkpoint of `step`; drops later lines of both files."""
        self._loss_sum = state["loss_sum"]
        self._num_open_steps = state["num_open_steps"]
        self._open_s = state["open_s"]
        self.num_samples = state["num_samples"]
        self._num_tokens = state["num_tokens"]
        self._num_open_tokens = state["num_open_tokens"]
        self.best_step = state["best_step"]
        self._best_score = state["best_score"]
        self._flops = state["training_flops"]
        self.training_s = state["training_s"]
        self.clock.start_from(state["optimizer_s"])
        self._elapsed_before_s = state["elapsed_s"]
        self._session_started = time.perf_counter()
        self._peak_before = state["peak_bytes"]
        self.gradient_bytes = state["gradient_bytes"]
        for name in (METRICS_NAME, RANKS_NAME):
            keep_steps_up_to(self.run_dir / name, step)

    def flush(self) -> None:
        """Force the written lines to disk, before a checkpoint relies on them."""
        for name in (METRICS_NAME, RANKS_NAME):
            path = self.run_dir / name
            if path.exists():
                with path.open("rb") as file:
                    os.fsync(file.fileno())

    def _append(self, name: str, row: dict[str, Any]) -> None:
        with (self.run_dir / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def perplexity(loss: float) -> float:
    """Return exp(loss), or the largest float where that overflows."""
    return math.exp(min(loss, 700.0))
