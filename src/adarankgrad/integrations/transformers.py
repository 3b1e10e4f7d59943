"""transformers' `Trainer`: resuming that a kill inside the writing of a checkpoint cannot break.

Trainer writes a checkpoint where it will be found, file by file, so that the newest one may be
incomplete; and it has nothing to tell whether a file is still as it was written.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adarankgrad.train.checkpoints import checkpoints_in
from adarankgrad.train.files import MANIFEST_NAME, find_fault, seal_folder


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
