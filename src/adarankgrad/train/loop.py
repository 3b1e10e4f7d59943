"""The phases that every kind of run shares: check, lock, fit or resume, finish.

The order matters: everything that can be wrong with a request is found before anything is
written. What a kind of run brings of its own comes as `Parts`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainerCallback

from adarankgrad.optim import describe
from adarankgrad.train.arguments import training_arguments
from adarankgrad.train.checkpoints import Checkpoint, newest_intact, remove_newer
from adarankgrad.train.display import Display
from adarankgrad.train.errors import Interrupted, TrainingError, UserError
from adarankgrad.train.extrapolated import extrapolated_steps
from adarankgrad.train.files import (
    remove_partial,
    restore_replaced,
    staged_folder,
    write_atomic,
)
from adarankgrad.train.flops import TrainingFlops
from adarankgrad.train.folder import (
    MODEL_FOLDER,
    SUMMARY_NAME,
    TENSORBOARD_FOLDER,
    check_output,
    describe_environment,
)
from adarankgrad.train.growing_batch import growing_batch
from adarankgrad.train.growing_depth import depth_of, growing_depth
from adarankgrad.train.lock import locked
from adarankgrad.train.methods import Method
from adarankgrad.train.optimizers import (
    accumulate_gradients,
    build_optimizer,
    find_optimizer,
    group_parameters,
    projected_parameters,
)
from adarankgrad.train.powered import power_model, power_updates
from adarankgrad.train.presets import checkpoint_activations
from adarankgrad.train.quiet import quiet_transformers
from adarankgrad.train.recorder import Recorder
from adarankgrad.train.run_config import RunConfig
from adarankgrad.train.settings import check_written_with
from adarankgrad.train.signals import StopRequest
from adarankgrad.train.trainer import (
    Evaluation,
    RunTrainer,
    Stateful,
    read_session,
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request found to be sound.

    Attributes:
        config: The settings, with every default decided.
        run_dir: The run folder.
        device: Where to train.
        checkpoint: What to continue from; None for a fresh start.
        display: Shows progress.
    """

    config: RunConfig
    run_dir: Path
    device: torch.device
    checkpoint: Checkpoint | None
    display: Display


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What one kind of run brings to the loop.

    Attributes:
        model: On the request's device, in training form.
        optimizer: Of the model's trainable weights.
        projected: Weights that count as projected.
        train_dataset: Examples in the order in which steps take them, as many as the run consumes.
        eval_dataset: Examples to validate on; for the loss, where there is no `evaluation`.
        collate: From examples to a batch; None stacks equal tensors.
        evaluation: From the model to its loss and metrics, in place of the loss alone.
        best_metric: What the best checkpoint is told by, which is kept; None for none.
        compute_loss: From outputs, labels and the number of labels of a step to its loss; None for
            the model's own.
        averages_examples: The model's own loss is a mean over the examples of a micro-batch.
        lr_factor: From the steps done to the rate's factor, in place of the settings' schedule.
        callbacks: Called around steps.
        stateful: What else a checkpoint holds, by the name of its file.
    """

    model: nn.Module
    optimizer: Optimizer
    projected: list[Tensor]
    train_dataset: Dataset[Any]
    eval_dataset: Dataset[Any] | None
    collate: Callable[[list[Any]], dict[str, Any]] | None = None
    evaluation: Evaluation | None = None
    best_metric: str | None = None
    compute_loss: Callable[..., Tensor] | None = None
    averages_examples: bool = False
    lr_factor: Callable[[float], float] | None = None
    callbacks: Sequence[TrainerCallback] = ()
    stateful: Mapping[str, Stateful] = field(default_factory=dict)


_Request = TypeVar("_Request", bound=Request)


def run_in_folder(
    config: RunConfig,
    check: Callable[[], _Request],
    work: Callable[[_Request], dict[str, Any]],
    *,
    resume: bool,
    overwrite: bool,
) -> dict[str, Any]:
    """Check a request, lock its folder and do the work.

    Args:
        config: The settings as given.
        check: Finds out whether the request can be met, writing nothing.
        work: Does it, and returns the summary.
        resume: Continue the run in the folder.
        overwrite: Replace the run in the folder.

    Raises:
        UserError: The request cannot be met; nothing was written.
    """
    quiet_transformers()
    run_dir = Path(config.output).expanduser()
    request = None if resume else check()  # a refused request does not touch the folder
    with locked(run_dir):
        check_output(run_dir, resume=resume, overwrite=overwrite)  # it may have changed since
        return work(request or check())


def check_one_process(config: RunConfig) -> None:
    """Refuse to run under torchrun.

    Raises:
        UserError: There are several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"adarankgrad {config.command} runs in one process: start it without torchrun."
        )


def checkpoint_to_resume(config: RunConfig, run_dir: Path, display: Display) -> Checkpoint | None:
    """Find the newest intact checkpoint and see that it is of this run; None before the first.

    Raises:
        UserError: There are checkpoints, but none to continue from.
    """
    restore_replaced(run_dir)
    checkpoint, warnings = newest_intact(run_dir)
    for warning in warnings:
        display.say(f"warning: {warning}")
    if checkpoint is None:
        display.say("the run was stopped before its first checkpoint: starting from the beginning")
        return None
    read_session(checkpoint)
    check_written_with(checkpoint.path, config)
    return checkpoint


def prepare_model(model: PreTrainedModel, config: RunConfig) -> PreTrainedModel:
    """Bring a model, in place, into the form in which it is trained; return it.

    Raises:
        UserError: A setting does not fit the model.
    """
    if config.activation_checkpointing:
        checkpoint_activations(model)
    return power_model(model, config)


def prepare_optimizer(model: nn.Module, config: RunConfig) -> tuple[Optimizer, list[Tensor]]:
    """Build the optimizer of all of a model's weights, hooks included.

    Returns:
        The optimizer, and the weights that count as projected.

    Raises:
        UserError: A setting does not fit the optimizer or the model.
    """
    groups = group_parameters(model, config)
    optimizer = build_optimizer(groups, config)
    power_updates(optimizer, model, config)
    accumulate_gradients(optimizer, model, config)
    return optimizer, projected_parameters(groups)


def check_trains(meta_model: PreTrainedModel, config: RunConfig) -> None:
    """See that all of a model's weights can be trained as the settings ask, optimizer and methods.

    Args:
        meta_model: On the meta device; brought into the form in which it would be trained.
        config: The settings, with every default decided.

    Raises:
        UserError: They cannot.
    """
    model = prepare_model(meta_model, config)
    optimizer, _ = prepare_optimizer(model, config)
    run_methods(config, model, optimizer)


def run_methods(config: RunConfig, model: nn.Module, optimizer: Optimizer) -> list[Method]:
    """Return the methods of a run that change its loop.

    Raises:
        UserError: One does not fit the other settings, or the model.
    """
    methods = [  # a model that grows does so before its weights move ahead
        growing_depth(config, model, optimizer),
        growing_batch(config, model, optimizer),
        extrapolated_steps(config, model, optimizer),
    ]
    return [method for method in methods if method is not None]


def num_samples(config: RunConfig) -> int:
    """Return how many examples a run takes, passes over the data included."""
    return config.samples_per_step * config.steps


def describe_run(
    request: Request, command: list[str], model: nn.Module, groups: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return what run.json says of every run.

    Args:
        request: The request.
        command: The command line.
        model: With its final shapes; may be on the meta device.
        groups: Of its weights; described where the optimizer projects some of them.
    """
    is_cuda = request.device.type == "cuda"
    is_low_rank = find_optimizer(request.config.optimizer).is_low_rank
    return {
        "subcommand": request.config.command,
        "command": command,
        **describe_environment(),
        "device": torch.cuda.get_device_name(request.device) if is_cuda else "cpu",
        "num_threads": torch.get_num_threads(),
        "dtype": request.config.precision,
        "model": request.config.model,
        "model_parameters": sum(weight.numel() for weight in model.parameters()),
        **({"describe": describe(groups)} if is_low_rank else {}),
    }


def fit(request: Request, parts: Parts) -> RunTrainer:
    """Train from the start or from the checkpoint until the last step.

    Raises:
        TrainingError: Training broke off.
        Interrupted: A signal stopped it after a checkpoint.
    """
    with StopRequest() as stop:
        trainer = _fit(request, parts, stop)
    if stop.received is not None:
        raise Interrupted(
            f"stopped after step {trainer.state.global_step} with a checkpoint; continue with: "
            f"adarankgrad {request.config.command} --resume --output {request.run_dir}",
            exit_code=128 + stop.received,
        )
    return trainer


def _fit(request: Request, parts: Parts, stop: StopRequest) -> RunTrainer:
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations.integration_utils import TensorBoardCallback

    tensorboard: Any = TensorBoardCallback
    config, checkpoint = request.config, request.checkpoint
    recorder = Recorder(request.run_dir, parts.optimizer, parts.projected, request.device)
    step = 0
    if checkpoint is not None:
        step = checkpoint.step
        _rewind(request, checkpoint, recorder)
    methods = run_methods(config, parts.model, parts.optimizer)
    writer = SummaryWriter(request.run_dir / TENSORBOARD_FOLDER, purge_step=step + 1)
    trainer = RunTrainer(
        config,
        request.run_dir,
        recorder,
        request.display,
        stop,
        evaluation=parts.evaluation,
        best_metric=parts.best_metric,
        averages_examples=parts.averages_examples,
        lr_factor=parts.lr_factor,
        stateful=parts.stateful,
        methods=methods,
        flops=TrainingFlops(parts.model, depth_of(methods)),
        model=parts.model,
        args=training_arguments(config, request.run_dir, request.device),
        train_dataset=parts.train_dataset,
        eval_dataset=parts.eval_dataset,
        data_collator=parts.collate,
        compute_loss_func=parts.compute_loss,
        optimizers=(parts.optimizer, None),
        callbacks=[tensorboard(writer), *parts.callbacks],
    )
    request.display.start(config.steps, step)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"{request.device} is out of memory: lower --batch-size (and raise "
            f"--gradient-accumulation), or lower {config.length_flag}."
        ) from error
    except FloatingPointError as error:  # the optimizer's, where it is told to raise
        what = str(error).partition(";")[0]
        raise trainer.not_finite(what, trainer.state.global_step + 1) from error
    finally:
        trainer.give_cache_back()
        request.display.stop()
        recorder.clock.remove()
        writer.close()
    return trainer


def _rewind(request: Request, checkpoint: Checkpoint, recorder: Recorder) -> None:
    """Bring the run folder back to the state of the checkpoint."""
    recorder.restore(read_session(checkpoint), checkpoint.step)
    remove_partial(request.run_dir)
    remove_newer(request.run_dir, checkpoint.step)
    (request.run_dir / SUMMARY_NAME).unlink(missing_ok=True)
    write_atomic(request.run_dir / "config.toml", request.config.to_toml())
    request.display.say(f"continuing after step {checkpoint.step} of {request.config.steps}")


def finish(
    request: Request, summary: dict[str, Any], save_model: Callable[[Path], None]
) -> dict[str, Any]:
    """Save the model, write the summary, draw plots and report.

    Args:
        request: The request.
        summary: The content of summary.json.
        save_model: Writes the model into an empty folder.
    """
    from adarankgrad.train.plots import write_plots
    from adarankgrad.train.report import write_report

    run_dir = request.run_dir
    with staged_folder(run_dir / MODEL_FOLDER) as staging:
        save_model(staging)
    write_atomic(run_dir / SUMMARY_NAME, json.dumps(summary, indent=1))
    write_plots(run_dir)
    write_report(run_dir)
    request.display.show_summary(summary)
    return summary
