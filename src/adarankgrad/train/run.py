"""A training run from a config to a finished run folder.

The order matters: everything that can be wrong with a request is found before anything is
written, and everything cheap is checked before anything slow.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from adarankgrad.optim import describe
from adarankgrad.reparam import export_plain
from adarankgrad.train.checkpoints import Checkpoint, newest_intact, remove_newer
from adarankgrad.train.config import TrainConfig
from adarankgrad.train.display import Display
from adarankgrad.train.errors import Interrupted, TrainingError, UserError
from adarankgrad.train.files import (
    remove_partial,
    restore_replaced,
    staged_folder,
    write_atomic,
)
from adarankgrad.train.folder import (
    MODEL_FOLDER,
    SUMMARY_NAME,
    TENSORBOARD_FOLDER,
    TOKENS_FOLDER,
    check_inputs_outside,
    check_output,
    check_writable,
    create_run_folder,
    describe_environment,
)
from adarankgrad.train.lock import locked
from adarankgrad.train.measure import reset_peak_memory
from adarankgrad.train.optimizers import (
    accumulate_gradients,
    build_optimizer,
    group_parameters,
    projected_parameters,
    widen_corrected_weights,
)
from adarankgrad.train.powered import power_model, power_updates
from adarankgrad.train.presets import ModelPlan, build_model, plan_model
from adarankgrad.train.recorder import Recorder
from adarankgrad.train.settings import (
    check_written_with,
    given_settings,
    resolve,
    resolve_device,
    settings_to_resume,
)
from adarankgrad.train.signals import StopRequest
from adarankgrad.train.sources import find_text, input_paths
from adarankgrad.train.summary import summarize
from adarankgrad.train.tokenizer import (
    check_can_train,
    given_tokenizer,
    load_tokenizer,
    train_tokenizer,
)
from adarankgrad.train.tokens import (
    Blocks,
    ShuffledBlocks,
    TokenStreams,
    encode,
    load_tokens,
    require_enough,
    save_tokens,
)
from adarankgrad.train.trainer import RunTrainer, read_session, training_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class _Run:
    """A request found to be sound: what to train on which device, from which checkpoint on."""

    config: TrainConfig
    run_dir: Path
    device: torch.device
    plan: ModelPlan
    tokenizer: PreTrainedTokenizerBase | None
    checkpoint: Checkpoint | None
    display: Display


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    command: list[str] | None = None,
    display: Display | None = None,
) -> dict[str, Any]:
    """Train a language model and leave a complete run folder behind.

    Args:
        config: The settings.
        resume: Continue the run in ``config.output`` from its newest intact checkpoint, or from
            the start where it stopped before the first, to the same result as an uninterrupted run
            (bit for bit on the CPU).
        overwrite: Replace the run in ``config.output``.
        command: The command line to note in run.json; default ``sys.argv``.
        display: Shows progress; silent by default.

    Returns:
        The content of summary.json.

    Raises:
        UserError: The request cannot be met; nothing was written.
        TrainingError: Training broke off; checkpoints are kept.
        Interrupted: A signal stopped the run after a checkpoint.

    Example:
        >>> from adarankgrad.train import TrainConfig, train
        >>> train(TrainConfig(data="corpus/", output="runs/a", steps=100))  # doctest: +SKIP
    """
    transformers.utils.logging.set_verbosity(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    check = partial(
        _check, config, resume=resume, overwrite=overwrite, display=display or Display()
    )
    run_dir = Path(config.output).expanduser()
    run = None if resume else check()  # a refused request does not touch the folder
    with locked(run_dir):
        check_output(run_dir, resume=resume, overwrite=overwrite)  # it may have changed since
        return _train(run or check(), command or sys.argv)


def _train(run: _Run, command: list[str]) -> dict[str, Any]:
    """Train what was found to be sound."""
    # Where it can be, the model is built first: bad weights are found before the data is read.
    model = None if run.tokenizer is None else _build_model(run, run.tokenizer)
    tokenizer, streams = _get_tokens(run)
    reset_peak_memory(run.device)
    if model is None:
        model = _build_model(run, tokenizer)
    if run.checkpoint is None:
        _create_folder(run, tokenizer, streams, command)
        streams = load_tokens(run.run_dir / TOKENS_FOLDER)
    with StopRequest() as stop:
        trainer = _fit(run, model, streams, stop)
    if stop.received is not None:
        raise Interrupted(
            f"stopped after step {trainer.state.global_step} with a checkpoint; continue with: "
            f"adarankgrad train --resume --output {run.run_dir}",
            exit_code=128 + stop.received,
        )
    return _finish(run, trainer, tokenizer)


def check_request(config: TrainConfig) -> None:
    """Find out whether a fresh run could be made, writing nothing.

    Raises:
        UserError: It could not.
    """
    _check(config, resume=False, overwrite=False, display=Display())


def _check(config: TrainConfig, *, resume: bool, overwrite: bool, display: Display) -> _Run:
    """Find out whether the request can be met, writing nothing."""
    config.check()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("adarankgrad train runs in one process: start it without torchrun.")
    run_dir = Path(config.output).expanduser()
    check_output(run_dir, resume=resume, overwrite=overwrite)
    checkpoint = None
    tokenizer: PreTrainedTokenizerBase | None
    if resume:
        config = TrainConfig.from_settings(settings_to_resume(run_dir, given_settings(config)))
        checkpoint = _checkpoint_to_resume(config, run_dir, display)
    if checkpoint is not None:
        tokenizer = load_tokenizer(run_dir / TOKENS_FOLDER / "tokenizer")
        plan = ModelPlan(transformers.AutoConfig.from_pretrained(checkpoint.path), None)
    else:
        check_inputs_outside(run_dir, input_paths(config))
        config = resolve(config)
        tokenizer = given_tokenizer(config)
        plan = plan_model(config, tokenizer)
        vocab_size = plan.config.get_text_config().vocab_size
        if tokenizer is None:
            check_can_train(vocab_size)
        config = replace(config, vocab_size=vocab_size)
    device = resolve_device(config.device)
    meta_model = power_model(build_model(plan, config.seed, meta=True), config)
    optimizer = build_optimizer(group_parameters(meta_model, config), config)
    power_updates(optimizer, meta_model, config)
    accumulate_gradients(optimizer, meta_model, config)
    check_writable(run_dir)
    return _Run(config, run_dir, device, plan, tokenizer, checkpoint, display)


def _checkpoint_to_resume(
    config: TrainConfig, run_dir: Path, display: Display
) -> Checkpoint | None:
    """Find the newest intact checkpoint and see that it is of this run; None before the first."""
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


def _get_tokens(run: _Run) -> tuple[PreTrainedTokenizerBase, TokenStreams]:
    """Load the tokens of a resumed run, or read the data; writes nothing."""
    config = run.config
    if run.checkpoint is not None and run.tokenizer is not None:
        return run.tokenizer, load_tokens(run.run_dir / TOKENS_FOLDER)
    source, validation = find_text(config)
    tokenizer = run.tokenizer
    if tokenizer is None:
        assert config.vocab_size is not None
        run.display.say("training a tokenizer")
        texts = (piece.text for piece in source.pieces())
        tokenizer = train_tokenizer(texts, config.vocab_size, config.seq_len)
    run.display.say("reading the data")
    streams = TokenStreams(encode(source, tokenizer), encode(validation, tokenizer))
    require_enough(streams, config.seq_len, config.batch_size)
    run.display.say(
        f"{len(streams.train):,} training tokens, {len(streams.validation):,} validation tokens, "
        f"vocabulary {len(tokenizer):,}"
    )
    return tokenizer, streams


def _create_folder(
    run: _Run, tokenizer: PreTrainedTokenizerBase, streams: TokenStreams, command: list[str]
) -> None:
    model = power_model(build_model(run.plan, run.config.seed, meta=True), run.config)
    is_cuda = run.device.type == "cuda"
    info = {
        "command": command,
        **describe_environment(),
        "device": torch.cuda.get_device_name(run.device) if is_cuda else "cpu",
        "num_threads": torch.get_num_threads(),
        "dtype": run.config.precision,
        "model": run.config.model,
        "model_parameters": sum(weight.numel() for weight in model.parameters()),
        "training_tokens": len(streams.train),
        "validation_tokens": len(streams.validation),
        "describe": describe(group_parameters(model, run.config)),
    }
    create_run_folder(run.run_dir, run.config, info)
    save_tokens(run.run_dir / TOKENS_FOLDER, streams, tokenizer)


def _fit(run: _Run, model: Any, streams: TokenStreams, stop: StopRequest) -> RunTrainer:
    """Train from the start or from the checkpoint until the last step or a signal."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations.integration_utils import TensorBoardCallback

    tensorboard: Any = TensorBoardCallback
    config = run.config
    groups = group_parameters(model, config)
    optimizer = build_optimizer(groups, config)
    power_updates(optimizer, model, config)
    accumulate_gradients(optimizer, model, config)
    sequences_per_step = config.batch_size * config.gradient_accumulation
    recorder = Recorder(
        run.run_dir,
        optimizer,
        projected_parameters(groups),
        sequences_per_step * config.seq_len,
        run.device,
    )
    step = 0
    if run.checkpoint is not None:
        step = run.checkpoint.step
        _rewind(run, recorder)
    train_blocks = Blocks(streams.train, config.seq_len)
    writer = SummaryWriter(run.run_dir / TENSORBOARD_FOLDER, purge_step=step + 1)
    trainer = RunTrainer(
        config,
        run.run_dir,
        recorder,
        run.display,
        stop,
        model=model,
        args=training_arguments(config, run.run_dir, run.device),
        train_dataset=ShuffledBlocks(train_blocks, sequences_per_step * config.steps, config.seed),
        eval_dataset=Blocks(streams.validation, config.seq_len),
        optimizers=(optimizer, None),
        callbacks=[tensorboard(writer)],
    )
    run.display.start(config.steps, step)
    try:
        trainer.train(resume_from_checkpoint=str(run.checkpoint.path) if run.checkpoint else None)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"{run.device} is out of memory: lower --batch-size (and raise "
            "--gradient-accumulation), or lower --seq-len."
        ) from error
    except FloatingPointError as error:  # the optimizer's, where it is told to raise
        what = str(error).partition(";")[0]
        raise trainer.not_finite(what, trainer.state.global_step + 1) from error
    finally:
        run.display.stop()
        recorder.clock.remove()
        writer.close()
    return trainer


def _build_model(run: _Run, tokenizer: PreTrainedTokenizerBase) -> Any:
    if run.plan.weights is None:
        run.plan.config.bos_token_id = tokenizer.bos_token_id
        run.plan.config.eos_token_id = tokenizer.eos_token_id
    model: Any = build_model(run.plan, run.config.seed)
    if run.config.precision == "bfloat16":
        model.to(torch.bfloat16)
    # Before the optimizer is built: it binds the parameters where they are.
    return power_model(model, run.config).to(run.device)


def _rewind(run: _Run, recorder: Recorder) -> None:
    """Bring the run folder back to the state of the checkpoint."""
    checkpoint = run.checkpoint
    assert checkpoint is not None
    recorder.restore(read_session(checkpoint), checkpoint.step)
    remove_partial(run.run_dir)
    remove_newer(run.run_dir, checkpoint.step)
    (run.run_dir / SUMMARY_NAME).unlink(missing_ok=True)
    write_atomic(run.run_dir / "config.toml", run.config.to_toml())
    run.display.say(f"continuing after step {checkpoint.step} of {run.config.steps}")


def _finish(run: _Run, trainer: RunTrainer, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Save the model, write the summary, draw plots and report."""
    from adarankgrad.train.plots import write_plots
    from adarankgrad.train.report import write_report

    model: Any = trainer.model
    model.config.use_cache = True
    summary = summarize(run.config, run.run_dir, trainer)
    widen_corrected_weights(model, trainer.recorder.optimizer)
    export_plain(model)
    with staged_folder(run.run_dir / MODEL_FOLDER) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
    write_atomic(run.run_dir / SUMMARY_NAME, json.dumps(summary, indent=1))
    write_plots(run.run_dir)
    write_report(run.run_dir)
    run.display.show_summary(summary)
    return summary
