"""What happens after each step of a run: logging, evaluation, saving, the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

if TYPE_CHECKING:
    from adarankgrad.train.display import Display
    from adarankgrad.train.recorder import Recorder
    from adarankgrad.train.run_config import RunConfig
    from adarankgrad.train.signals import StopRequest


class Flow(TrainerCallback):
    """Decides after each step what happens next, and tells recorder and display."""

    def __init__(
        self,
        config: RunConfig,
        recorder: Recorder,
        display: Display,
        stop: StopRequest,
        num_samples: int,
    ) -> None:
        self.config = config
        self.num_samples = num_samples
        self.recorder = recorder
        self.display = display
        self.stop = stop
        self._skipped_before = 0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start the step's clock."""
        self._skipped_before = self.recorder.skipped_steps() or 0
        self.recorder.start_step()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Measure the gradients while they are there."""
        self.recorder.measure_gradients()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Log, evaluate and save when due; at the last step all three."""
        step = state.global_step
        self.recorder.end_step()
        self.display.advance(self.recorder.num_samples // self.config.samples_per_step)
        num_skipped = self.recorder.skipped_steps() or 0
        if num_skipped > self._skipped_before:
            self.display.say(
                f"warning: skipped step {step}, whose gradients were not finite "
                f"({num_skipped} skipped so far)"
            )
        is_last = self.recorder.num_samples >= self.num_samples
        control.should_log = is_last or step % self.config.log_every == 0
        control.should_evaluate = is_last or step % self.config.eval_every == 0
        control.should_save = is_last or step % self.config.save_every == 0
        control.should_training_stop = control.should_training_stop or is_last
        self._stop_if_asked(control)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Stop now when asked during an evaluation."""
        self._stop_if_asked(control)

    def _stop_if_asked(self, control: TrainerControl) -> None:
        if self.stop.received is not None:
            control.should_save = True
            control.should_training_stop = True
