"""transformers' `Trainer`, with checkpoints that survive a kill and a loop that can be resumed.

Differences from the stock `Trainer`: a checkpoint appears only when complete; data order and
learning rate are functions of the samples seen (`tokens.Shuffled`), so nothing is replayed on
resume, and a step may take any number of micro-batches; a loss that is not finite ends the run;
logging, evaluation and saving follow the settings; ``use_cache`` is saved and left as it was.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, Trainer

from adarankgrad.train.checkpoints import Checkpoint, checkpoint_path, list_checkpoints, remove_old
from adarankgrad.train.errors import DivergedError, TrainingError, UserError
from adarankgrad.train.files import staged_folder
from adarankgrad.train.flow import Flow
from adarankgrad.train.methods import Batch, Method, Step, count_samples
from adarankgrad.train.presets import first_line
from adarankgrad.train.recorder import perplexity
from adarankgrad.train.score import score_of
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


class Stateful(Protocol):
    """What changes while a run trains, beside model and optimizer."""

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        ...


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
        best_metric: What the best evaluation is told by, whose checkpoint is kept; None for none.
        averages_examples: The model's loss is a mean over the examples of a micro-batch.
        lr_factor: From the steps done to the rate's factor; None for the schedule of the settings.
        stateful: What else a checkpoint holds, by the name of its file.
        flops: Counts operations.
        methods: Act around steps.
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
        best_metric: str | None = None,
        averages_examples: bool = False,
        lr_factor: Callable[[float], float] | None = None,
        stateful: Mapping[str, Stateful] | None = None,
        flops: TrainingFlops,
        methods: Sequence[Method] = (),
        **options: Any,
    ) -> None:
        self.run_config = config
        self._resumed_from: str | None = None
        self.evaluation = evaluation
        self.methods = list(methods)
        self.stateful: dict[str, Stateful] = dict(stateful or {})
        self.stateful |= {f"{method.name}.pt": method for method in methods}
        self.best_metric = best_metric
        self.lr_factor = lr_factor
        self.flops = flops
        self.run_dir = run_dir
        self.recorder = recorder
        self.display = display
        # `Trainer` switches it off.
        self._uses_cache = getattr(options["model"].config, "use_cache", None)
        super().__init__(**options)
        if averages_examples:
            # Else the loss of every micro-batch would count as its share of the step's.
            self.model_accepts_loss_kwargs = False
        self.remove_callback(PrinterCallback)
        num_samples = len(options["train_dataset"])
        self.add_callback(Flow(config, recorder, display, stop, num_samples))

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """Make the learning rate a function of the samples seen: of the steps that they would make.

        Where every step has the same number of samples, these are the steps.
        """
        if self.lr_scheduler is not None:
            return self.lr_scheduler
        if self.lr_factor is not None:
            trained: Any = optimizer or self.optimizer
            self.lr_scheduler = LambdaLR(trained, self._by_samples(self.lr_factor))
            return self.lr_scheduler
        scheduler: Any = super().create_scheduler(num_training_steps, optimizer)
        scheduler.lr_lambdas = [self._by_samples(factor) for factor in scheduler.lr_lambdas]
        return scheduler

    def _by_samples(self, factor: Callable[[float], float]) -> Callable[[int], float]:
        return lambda _: factor(self.recorder.num_samples / self.run_config.samples_per_step)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, *options: Any
    ) -> tuple[list[Any], Any]:
        """Fetch the micro-batches of a step, as a single batch; fewer where the data end."""
        count = self.run_config.gradient_accumulation
        for method in self.methods:
            count = method.num_micro_batches(count)
        batches, num_items = super().get_batch_samples(epoch_iterator, count, *options)
        if self._resumed_from is not None:
            # Only now: starting to read the data draws a random number.
            self._load_rng_state(self._resumed_from)
            self._resumed_from = None
        return [batches] if batches else [], num_items

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """Compute the gradient of a step from its micro-batches."""
        self.current_gradient_accumulation_steps = len(inputs)
        step = self._step(model, inputs, num_items_in_batch)
        batches = step.micro_batches
        try:
            for method in self.methods:
                method.begin_step(step)
            losses = [self._micro_batch(model, batch, num_items_in_batch) for batch in batches]
            for method in self.methods:
                method.end_backward(step)
        except BaseException:
            for method in self.methods:
                method.abandon_step()
            raise
        return torch.stack(losses).sum()

    def _micro_batch(self, model: nn.Module, batch: Batch, num_items: Any) -> Tensor:
        """Compute gradients of a micro-batch; a loss that is not finite ends the run."""
        num_tokens = count_tokens(batch)
        flops = self.flops.of(num_tokens, batch["input_ids"].shape[-1])
        loss = super().training_step(model, dict(batch), num_items)
        value = loss.item()
        if not math.isfinite(value):
            raise self.not_finite(f"the loss became {value}", self.state.global_step + 1)
        self.recorder.add_batch(value, count_samples(batch), num_tokens, flops)
        return loss

    def _step(self, model: nn.Module, batches: list[Batch], num_items: Any) -> Step:
        inputs: list[Batch] = [self._prepare_inputs(dict(batch)) for batch in batches]
        num_samples = sum(map(count_samples, inputs))

        def share_of(call: Callable[..., Any], sample: Batch) -> Tensor:
            trained: Any = call
            with self.compute_loss_context_manager():
                loss: Any = self.compute_loss(trained, dict(sample), num_items_in_batch=num_items)
            weight = 1.0 if num_items is not None else count_samples(sample) / num_samples
            share: Tensor = loss * weight
            return share

        return Step(model, inputs, share_of, self.state.global_step, self.recorder.num_tokens)

    def floating_point_ops(self, inputs: Any) -> int:
        """Return the operations of a step's micro-batches."""
        return sum(super(RunTrainer, self).floating_point_ops(batch) for batch in inputs)

    def method_summary(self) -> dict[str, float | None]:
        """Return what the methods add to summary.json."""
        return {name: value for each in self.methods for name, value in each.summary().items()}

    def evaluate(self, *inputs: Any, **options: Any) -> dict[str, float]:
        """Evaluate without drawing from training's random numbers."""
        gpus = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=gpus):
            if self.evaluation is None:
                return super().evaluate(*inputs, **options)
            model: Any = self.model
            found = self.evaluation(model)
        metrics = {f"eval_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        if self.best_metric is not None and all(method.is_whole for method in self.methods):
            score = score_of(found, self.best_metric)
            self.control.should_save |= self.recorder.note_best(self.state.global_step, score)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write metrics lines, and hand the numbers on to TensorBoard."""
        step = self.state.global_step
        if "loss" in logs:
            more = {name: value for m in self.methods for name, value in m.metrics().items()}
            row = self.recorder.log_step(step, logs["learning_rate"], logs["grad_norm"], more)
            self.display.show_step(row)
            logs["loss"] = row["loss"]
            logs["tokens_per_second"] = row["tokens_per_second"]
            logs["optimizer_mib"] = row["state_bytes"] / 2**20
            for name in ("mean_rank", "skipped_steps", *more):
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

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Take what the run has not seen, in order: the data are already shuffled."""
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        return range(self.recorder.num_samples, len(dataset))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint that appears only when complete, then delete old ones."""
        step = self.state.global_step
        trained: Any = self.model
        if not all(bool(torch.isfinite(weight).all()) for weight in trained.parameters()):
            raise self.not_finite("a weight became infinite or not a number", step)
        try:
            self.recorder.flush()
            with staged_folder(checkpoint_path(self.run_dir, step)) as staging:
                self.give_cache_back()
                trained.save_pretrained(staging)
                trained.config.use_cache = self.args.use_cache
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
        kept = list_checkpoints(self.run_dir)[: self.run_config.keep_checkpoints]
        remove_old(self.run_dir, self.run_config.keep_checkpoints, _best_steps(kept))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load tensors and plain values; objects, which could run code, end the resume.

        Raises:
            UserError: There are objects, or the state is not of this optimizer and model.
        """
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
            self._resumed_from = checkpoint
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

    def give_cache_back(self) -> None:
        """Let the model's configuration say of its cache what it did before training."""
        trained: Any = self.model
        if self._uses_cache is None:
            vars(trained.config).pop("use_cache", None)
        else:
            trained.config.use_cache = self._uses_cache

    def restore(self, checkpoint: Path) -> None:
        """Go back to the weights, the optimizer's state and whatever else a checkpoint holds."""
        self._load_from_checkpoint(str(checkpoint))
        self._load_optimizer_and_scheduler(str(checkpoint))

    def not_finite(self, what: str, step: int) -> DivergedError:
        """Return the error that ends a run at a step, and says what to do."""
        return DivergedError(
            f"{what} at step {step}. Lower --lr, or give more "
            f"--warmup-steps; checkpoints up to here are kept in {self.run_dir / 'checkpoints'}."
        )


def _best_steps(checkpoints: list[Checkpoint]) -> set[int | None]:
    """Return the best steps so far as checkpoints name them: a resume from each needs its own."""
    steps = set()
    for checkpoint in checkpoints:
        try:
            steps.add(read_session(checkpoint)["best_step"])
        except (OSError, ValueError, KeyError):  # a damaged one is not resumed from
            continue
    return steps


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
