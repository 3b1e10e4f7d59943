"""Ranks, captured energy, rates and bytes in the logs of transformers' `Trainer`."""

from __future__ import annotations

import math
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adarankgrad.integrations.accelerate import unwrapped
from adarankgrad.optim.engine import SubspaceOptimizer


def log_subspaces(trainer: Trainer) -> LogSubspaces:
    """Add what the optimizer does to every training log, wherever ``report_to`` sends it.

    Beside the loss then stand ``lr_projected`` and ``lr_plain`` (of the step that is logged;
    Trainer's ``learning_rate`` is that of the first group alone; groups of one kind whose rates
    differ have one each, such as ``lr_plain_2`` of ``optimizer.param_groups[2]``), ``mean_rank``,
    ``smallest_rank``, ``largest_rank``, ``captured_energy`` (share of the gradient's, at the last
    refresh, mean over weights), ``state_bytes``, ``skipped_steps``, and ``grad_norm`` where
    Trainer has none.

    Args:
        trainer: whose log to extend; its optimizer has to be of this package when it trains.

    Returns:
        The callback, for ``trainer.remove_callback``. It is not meant for ``Trainer(callbacks=)``,
        which would have it called after those that report.

    Raises:
        ValueError: when training starts, if the optimizer is of another package.

    Example:
        >>> trainer = Trainer(model, args, optimizers=(optimizer, None))  # doctest: +SKIP
        >>> log_subspaces(trainer)  # doctest: +SKIP
    """
    callback = LogSubspaces()
    trainer.callback_handler.callbacks.insert(0, callback)
    return callback


class LogSubspaces(TrainerCallback):
    """Extends training logs in place; installed by `log_subspaces`."""

    _optimizer: SubspaceOptimizer
    _rates: dict[str, float]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        """Find the optimizer."""
        self._optimizer = unwrapped(parts["optimizer"])
        self._rates = {}

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Note the rates of this step, which the scheduler changes before they are logged."""
        groups = self._optimizer.param_groups
        self._rates = {**_rates_of(groups, True), **_rates_of(groups, False)}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Extend a log of training; those of evaluation and of the end stay as they are."""
        if logs is not None and "loss" in logs:
            values = {**self._rates, **_values_of(self._optimizer), **logs}
            logs.update(values)
            state.log_history[-1].update(values)


def _rates_of(groups: list[dict[str, Any]], is_projected: bool) -> dict[str, float]:
    kind = "lr_projected" if is_projected else "lr_plain"
    rates = {
        number: float(group["lr"])
        for number, group in enumerate(groups)
        if group["project"] == is_projected
    }
    distinct = set(rates.values())
    if len(distinct) > 1:
        return {f"{kind}_{number}": rate for number, rate in rates.items()}
    return {kind: distinct.pop()} if distinct else {}


def _values_of(optimizer: SubspaceOptimizer) -> dict[str, float]:
    report = optimizer.report()
    ranks = [layer.rank for layer in report.layers]
    energies = [layer.captured_energy for layer in report.layers]
    norm = report.last_grad_norm
    return {
        **({"grad_norm": norm} if norm is not None and math.isfinite(norm) else {}),
        "mean_rank": report.mean_rank,
        "smallest_rank": min(ranks, default=0),
        "largest_rank": max(ranks, default=0),
        "captured_energy": sum(energies) / max(1, len(energies)),
        "state_bytes": report.state_bytes,
        "skipped_steps": report.num_skipped_steps,
    }
