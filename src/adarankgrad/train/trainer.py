"""transformers' `Trainer`, with checkpoints that survive a kill and a loop that can be resumed.

Differences from the stock `Trainer`: a checkpoint appears only when complete; the data order is a
function of the step (`tokens.Shuffled`), so nothing is replayed on resume; a loss that is
not finite ends the run; logging, evaluation and saving follow the settings.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from adarankgrad.train.checkpoints import Checkpoint, checkpoint_path, remove_old
from adarankgrad.train.errors import DivergedError, TrainingError, UserError
from adarankgrad.train.files import staged_folder
from adarankgrad.train.presets import first_line
from adarankgrad.train.recorder import perplexity
from adarankgrad.train.settings import CONFIG_NAME

if TYPE_CHECKING:
    from adarankgrad.train.display import Display
    from adarankgrad.train.flops import TrainingFlops
    from adarankgrad.train.recorder import Recorder
    from adarankgrad.train.run_config import RunConfig
    from adarankgrad.train.signals import StopRequest

Evaluation = Callable[[nn.Module], dict[str, float]]
"""From a model to its validation ``loss`` and other metrics."""

SESSION_NAME = "session.json"
_FORMAT_VERSION = 3
"""Of our files in a checkpoint; since 3 they count operations."""
_TRAINER_STATE_NAME = "trainer_state.json"
_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def training_arguments(config: RunConfig, run_dir: Path, device: torch.device) -> TrainingArguments:
    """Translate the settings for transformers; what to log and save when stays with `Flow`."""
    assert config.lr is not None and config.warmup_steps is not None
    arguments_class = _arguments_on(device) if device.type == "cuda" else TrainingArguments
    return arguments_class(
        output_dir=str(run_dir),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.lr,
        lr_scheduler_type=_SCHEDULES[config.lr_schedule],
        warmup_steps=config.warmup_steps,
        max_grad_norm=config.max_grad_norm,
        bf16=config.precision == "mixed-bfloat16",
        seed=config.seed,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        logging_strategy="no",
        logging_nan_inf_filter=False,
        eval_strategy="no",
        save_strategy="no",
        prediction_loss_only=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
        log_level="error",
    )


class Stateful(Protocol):
    """What changes while a run trains, beside model and optimizer."""

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        ...


class Flow(TrainerCallback):
    """Decides after each step what happens next, and tells recorder and display."""

    def __init__(
        self, config: RunConfig, recorder: Recorder, display: Display, stop: StopRequest
    ) -> None:
        self.config = config
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
        self.display.advance(step)
        num_skipped = self.recorder.skipped_steps() or 0
        if num_skipped > self._skipped_before:
            self.display.say(
                f"warning: skipped step {step}, whose gradients were not finite "
                f"({num_skipped} skipped so far)"
            )
        is_last = step >= self.config.steps
        control.should_log = is_last or step % self.config.log_every == 0
        control.should_evaluate = is_last or step % self.config.eval_every == 0
        control.should_save = is_last or step % self.config.save_every == 0
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


class RunTrainer(Trainer):
    """Trains one run.

    Args:
        config: The settings.
        run_dir: Where checkpoints go.
        recorder: Receives losses and writes the metrics.
        display: Shows them.
        stop: Whether to stop after the current step.
        evaluation: From the model to ``loss`` and other metrics; None for the loss of
            ``eval_dataset`` and its perplexity.
        stateful: What else a checkpoint holds, by the name of its file.
        flops: Counts operations.
        options: Passed on to transformers' `Trainer`.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        recorder: Recorder,
        display: Display,
        stop: StopRequest,
        *,
        evaluation: Evaluation | None = None,
        stateful: Mapping[str, Stateful] | None = None,
        flops: TrainingFlops,
        **options: Any,
    ) -> None:
        self.run_config = config
        self.evaluation = evaluation
        self.stateful = dict(stateful or {})
        self.flops = flops
        self.run_dir = run_dir
        self.recorder = recorder
        self.display = display
        super().__init__(**options)
        self.remove_callback(PrinterCallback)
        self.add_callback(Flow(config, recorder, display, stop))

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], *more: Any, **options: Any
    ) -> Tensor:
        """Compute gradients of a micro-batch; a loss that is not finite ends the run."""
        num_tokens = count_tokens(inputs)
        flops = self.flops.of(num_tokens, inputs["input_ids"].shape[-1])
        loss = super().training_step(model, inputs, *more, **options)
        value = loss.item()
        if not math.isfinite(value):
            raise self.not_finite(f"the loss became {value}", self.state.global_step + 1)
        self.recorder.add_batch(value, num_tokens, flops)
        return loss

    def evaluate(self, *inputs: Any, **options: Any) -> dict[str, float]:
        """Evaluate without drawing from training's random numbers."""
        gpus = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=gpus):
            if self.evaluation is None:
                return super().evaluate(*inputs, **options)
            model: Any = self.model
            metrics = {f"eval_{name}": value for name, value in self.evaluation(model).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write metrics lines, and hand the numbers on to TensorBoard."""
        step = self.state.global_step
        if "loss" in logs:
            row = self.recorder.log_step(step, logs["learning_rate"], logs["grad_norm"])
            self.display.show_step(row)
            logs["loss"] = row["loss"]
            logs["tokens_per_second"] = row["tokens_per_second"]
            logs["optimizer_mib"] = row["state_bytes"] / 2**20
            for name in ("mean_rank", "skipped_steps"):
                if row[name] is not None:
                    logs[name] = row[name]
        elif "eval_loss" in logs:
            self._record_evaluation(step, logs)
        super().log(logs, start_time)

    def _record_evaluation(self, step: int, logs: dict[str, float]) -> None:
        loss = logs["eval_loss"]
        if not math.isfinite(loss):
            raise self.not_finite(f"the validation loss became {loss}", step)
        if self.evaluation is None:
            metrics = {"perplexity": perplexity(loss)}
        else:
            metrics = {name.removeprefix("eval_"): value for name, value in logs.items()}
            del metrics["loss"]
        self.display.show_evaluation(self.recorder.log_evaluation(step, loss, metrics))

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        """Keep the dataset's order: it is already shuffled, as a function of the step."""
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(dataset)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint that appears only when complete, then delete old ones."""
        step = self.state.global_step
        trained: Any = self.model
        if not all(bool(torch.isfinite(weight).all()) for weight in trained.parameters()):
            raise self.not_finite("a weight became infinite or not a number", step)
        try:
            self.recorder.flush()
            with staged_folder(checkpoint_path(self.run_dir, step)) as staging:
                trained.save_pretrained(staging)
                self._save_optimizer_and_scheduler(str(staging))
                self._save_rng_state(str(staging))
                self.state.save_to_json(str(staging / _TRAINER_STATE_NAME))
                for name, part in self.stateful.items():
                    torch.save(part.state_dict(), staging / name)
                (staging / CONFIG_NAME).write_text(self.run_config.to_toml(), encoding="utf-8")
                session = {"format_version": _FORMAT_VERSION, "step": step}
                session |= self.recorder.state()
                (staging / SESSION_NAME).write_text(json.dumps(session, indent=1), "utf-8")
        except Exception as error:  # the libraries below raise many kinds for a full disk
            raise TrainingError(
                f"could not save the checkpoint of step {step} ({first_line(error)}). "
                f"Earlier ones are kept in {checkpoint_path(self.run_dir, step).parent}."
            ) from error
        remove_old(self.run_dir, self.run_config.keep_checkpoints)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load tensors and plain values; objects, which could run code, end the resume.

        Raises:
            UserError: There are objects, or the state is not of this optimizer and model.
        """
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None:
                for name, part in self.stateful.items():
                    path = Path(checkpoint) / name
                    part.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except ValueError as error:
            raise UserError(
                f"cannot resume {self.run_dir}: {checkpoint}/optimizer.pt does not fit "
                f"({first_line(error)}). Start again with --overwrite."
            ) from error
        except pickle.UnpicklingError as error:
            raise UserError(
                f"cannot resume {self.run_dir}: the state of {self.run_config.optimizer} holds "
                "objects of its package, which are not loaded because that could run code. "
                "Start again with --overwrite."
            ) from error

    def not_finite(self, what: str, step: int) -> DivergedError:
        """Return the error that ends a run at a step, and says what to do."""
        return DivergedError(
            f"{what} at step {step}. Lower --lr, or give more "
            f"--warmup-steps; checkpoints up to here are kept in {self.run_dir / 'checkpoints'}."
        )


def read_session(checkpoint: Checkpoint) -> dict[str, Any]:
    """Read what the recorder saved in a checkpoint.

    Raises:
        UserError: It is of a newer version, or of another step than its folder's name says.
    """
    path = checkpoint.path / SESSION_NAME
    session = dict(json.loads(path.read_text(encoding="utf-8")))
    version, step = session.pop("format_version"), session.pop("step")
    if version != _FORMAT_VERSION:
        advice = (
            "a newer one; update adarankgrad"
            if version > _FORMAT_VERSION
            else "an older one; resume with that one, or start again with --overwrite"
        )
        raise UserError(
            f"{path} has format version {version}, and this adarankgrad reads "
            f"{_FORMAT_VERSION}: it was written by {advice}."
        )
    if step != checkpoint.step:
        raise UserError(
            f"{path} is of step {step}, not {checkpoint.step}: the folder was renamed; give it its "
            "name back."
        )
    return session


def count_tokens(inputs: Mapping[str, Any]) -> int:
    """Return the tokens of a batch, without padding."""
    mask = inputs.get("attention_mask")
    return inputs["input_ids"].numel() if mask is None else int(mask.sum())


def _arguments_on(device: torch.device) -> type[TrainingArguments]:
    """Return arguments for exactly one GPU; transformers would use every visible one."""

    class OneGpuArguments(TrainingArguments):
        @cached_property
        def _setup_devices(self) -> torch.device:
            super()._setup_devices  # noqa: B018 - sets up accelerate's state
            torch.cuda.set_device(device)
            self._n_gpu = 1
            return device

    return OneGpuArguments
