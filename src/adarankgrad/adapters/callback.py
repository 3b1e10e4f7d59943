"""A step hook in transformers' `Trainer`: called, saved with each checkpoint, loaded on resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .interface import StepHook

STATE_NAME = "adapter_steps.pt"


class StepCallback(TrainerCallback):
    """Calls a hook around every optimizer step of a `Trainer`, and keeps nothing.

    Args:
        hook: from an adapter's ``step_hook``.
    """

    def __init__(self, hook: StepHook) -> None:
        self.hook = hook

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gradients are final: summed over micro-batches and processes, and clipped."""
        self.hook.before_optimizer_step(state.global_step + 1)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The optimizer has stepped, the scheduler has not."""
        self.hook.on_optimizer_step(state.global_step + 1)


class AdapterCallback(StepCallback):
    """Calls a hook around every optimizer step of a `Trainer`.

    Its state is written to ``adapter_steps.pt`` in each checkpoint, and read from the checkpoint
    that training resumes from.

    Args:
        hook: from an adapter's ``step_hook``. Without optimizer, it gets the Trainer's.
        checkpoint: folder that training resumes from, where it does not lie in the Trainer's
            ``output_dir``.
    """

    def __init__(self, hook: StepHook, *, checkpoint: str | Path | None = None) -> None:
        super().__init__(hook)
        self.checkpoint = checkpoint

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hand over the optimizer; after a resume, load the hook's state.

        Raises:
            ValueError: if training resumes and the state is not there, or of another model.
        """
        if self.hook.optimizer is None:
            self.hook.optimizer = kwargs.get("optimizer")
        if state.global_step == 0:
            return
        path = Path(self.checkpoint or _checkpoint_folder(args, state)) / STATE_NAME
        if not path.is_file():
            raise ValueError(
                f"training resumes at step {state.global_step}, but {path} does not exist; name "
                "the checkpoint's folder with AdapterCallback(hook, checkpoint=...)"
            )
        self.hook.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the hook's state into the checkpoint just written."""
        folder = _checkpoint_folder(args, state)
        if state.is_world_process_zero and folder.is_dir():
            torch.save(self.hook.state_dict(), folder / STATE_NAME)


def _checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
