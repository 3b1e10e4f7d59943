"""transformers' `Trainer`: optimizers, logs, projected gradients, and checkpoints that survive.

Trainer writes a checkpoint where it will be found, file by file, so that the newest one may be
incomplete; and it has nothing to tell whether a file is still as it was written.
"""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adarankgrad.integrations.accelerate import unwrapped
from adarankgrad.integrations.optimizer_factories import (
    AdaGradNormFactory,
    AdaRankGradFactory,
    FiraFactory,
    GaLoreFactory,
    LowMemoryAdaRankGradFactory,
    OptimizerFactory,
    OrthogonalizedSGDFactory,
    PublishedAdaRankGradFactory,
)
from adarankgrad.integrations.subspace_log import log_subspaces
from adarankgrad.optim.accumulation import BackwardAccumulation
from adarankgrad.train.checkpoints import checkpoints_in
from adarankgrad.train.files import MANIFEST_NAME, find_fault, seal_folder

__all__ = [
    "AccumulateInBackward",
    "AdaGradNormFactory",
    "AdaRankGradFactory",
    "FiraFactory",
    "GaLoreFactory",
    "LowMemoryAdaRankGradFactory",
    "OptimizerFactory",
    "OrthogonalizedSGDFactory",
    "PublishedAdaRankGradFactory",
    "SealCheckpoints",
    "log_subspaces",
    "newest_sealed",
]


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


class SealCheckpoints(TrainerCallback):
    """Adds a manifest of sizes and checksums to every checkpoint, as soon as it is complete.

    For training in one process. Trainer deletes old checkpoints before the new one is sealed, so at
    least two must be kept.

    Example:
        >>> trainer = Trainer(model, args, callbacks=[SealCheckpoints()])  # doctest: +SKIP
        >>> trainer.train(resume_from_checkpoint=newest_sealed("runs/a"))  # doctest: +SKIP
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Refuse to keep a single checkpoint.

        Raises:
            ValueError: if ``save_total_limit`` is 1.
        """
        if args.save_total_limit is not None and args.save_total_limit < 2:
            raise ValueError(
                f"save_total_limit = {args.save_total_limit} deletes the last checkpoint before "
                "the next one is sealed; keep at least 2"
            )

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Seal the checkpoint that was just written."""
        seal_folder(Path(args.output_dir or ".") / f"checkpoint-{state.global_step}")


def newest_sealed(output_dir: str | os.PathLike[str]) -> str | None:
    """Find the newest checkpoint whose files are all as `SealCheckpoints` saw them.

    Args:
        output_dir: as in `TrainingArguments`.

    Returns:
        Its path, for ``resume_from_checkpoint``; None where training stopped before the first was
        complete, or never started. A warning names every newer one that was passed over.

    Raises:
        ValueError: if there are checkpoints to lose, and none is intact.
    """
    faults = []
    checkpoints = checkpoints_in(Path(output_dir))
    for checkpoint in checkpoints:
        fault = find_fault(checkpoint.path)
        if fault is None:
            break
        faults.append(f"{checkpoint.path}: {fault}")
    else:
        is_first = len(checkpoints) == 1 and not (checkpoints[0].path / MANIFEST_NAME).exists()
        if checkpoints and not is_first:
            raise ValueError(
                f"no checkpoint in {output_dir} is intact ({'; '.join(faults)}); restore one, name "
                "one to resume_from_checkpoint yourself, or use another output_dir"
            )
    for fault in faults:
        warnings.warn(f"passed over {fault}", stacklevel=2)
    return str(checkpoint.path) if len(faults) < len(checkpoints) else None


def _length_of(batches: Any) -> int | None:
    try:
        return len(batches)
    except TypeError:  # streamed
        return None
