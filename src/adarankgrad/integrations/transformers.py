"""`SubspaceOptimizer.accumulate_in_backward` for transformers' `Trainer`."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adarankgrad.integrations.accelerate import unwrapped
from adarankgrad.optim.accumulation import BackwardAccumulation


class AccumulateInBackward(TrainerCallback):
    """Project gradients in the backward pass of a `Trainer`, in one process.

    Model, optimizer and number of micro-batches are the Trainer's, whose gradient accumulation,
    clipping, logged norm, checkpoints and resuming work as they are. Where the last step of an
    epoch has fewer micro-batches, the residual's step is divided among those; in data without a
    length that is not known, and that step is shorter outside the basis.

    Attributes:
        handle: of the training that goes on, else None.

    Raises:
        ValueError: when training starts, if the optimizer cannot do it
            (`SubspaceOptimizer.accumulate_in_backward`).

    Example:
        >>> optimizer = AdaRankGrad(param_groups(model), basis="sketched")  # doctest: +SKIP
        >>> Trainer(
        ...     model,
        ...     optimizers=(optimizer, None),
        ...     callbacks=[AccumulateInBackward()],
        ... )  # doctest: +SKIP
    """

    handle: BackwardAccumulation | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        """Start, with the optimizer that the Trainer has by now."""
        optimizer = unwrapped(parts["optimizer"])
        self.handle = optimizer.accumulate_in_backward(
            parts["model"], num_micro_batches=args.gradient_accumulation_steps
        )
        self._num_batches = _length_of(parts["train_dataloader"])
        self._batches_begun = 0

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Find out how far into the epoch a resumed training is."""
        count = args.gradient_accumulation_steps
        self._batches_begun = 0
        if self._num_batches is not None and not args.ignore_data_skip:
            steps_per_epoch = math.ceil(self._num_batches / count)
            self._batches_begun = state.global_step % steps_per_epoch * count

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Say how many micro-batches the step has."""
        assert self.handle is not None
        count = args.gradient_accumulation_steps
        if self._num_batches is not None:
            count = min(count, self._num_batches - self._batches_begun)
        self.handle.num_micro_batches = count
        self._batches_begun += count

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Leave gradients alone again."""
        if self.handle is not None:
            self.handle.remove()
        self.handle = None


def _length_of(batches: Any) -> int | None:
    try:
        return len(batches)
    except TypeError:  # streamed
        return None
