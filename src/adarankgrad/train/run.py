"""A training run from a config to a finished run folder.

Everything cheap is checked before anything slow; `loop` holds what every kind of run shares.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from adarankgrad.reparam import export_plain
from adarankgrad.train.combinations import check_combinations
from adarankgrad.train.config import TrainConfig
from adarankgrad.train.display import Display
from adarankgrad.train.folder import (
    TOKENS_FOLDER,
    check_inputs_outside,
    check_output,
    check_writable,
    create_run_folder,
)
from adarankgrad.train.growing_depth import check_stages_are_reached, check_starts_from_nothing
from adarankgrad.train.loop import (
    Parts,
    Request,
    check_one_process,
    check_trains,
    checkpoint_to_resume,
    describe_run,
    finish,
    fit,
    num_samples,
    prepare_model,
    prepare_optimizer,
    run_in_folder,
)
from adarankgrad.train.measure import reset_peak_memory
from adarankgrad.train.optimizers import group_parameters, widen_corrected_weights
from adarankgrad.train.presets import ModelPlan, build_model, plan_model
from adarankgrad.train.settings import (
    given_settings,
    resolve,
    resolve_device,
    settings_to_resume,
)
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
    Shuffled,
    TokenStreams,
    encode,
    load_tokens,
    require_enough,
    save_tokens,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from adarankgrad.train.trainer import RunTrainer


@dataclass(frozen=True, kw_only=True)
class _Run(Request):
    """A sound request to train: on text, a model of this plan."""

    config: TrainConfig
    plan: ModelPlan
    tokenizer: PreTrainedTokenizerBase | None


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
    check = partial(
        _check, config, resume=resume, overwrite=overwrite, display=display or Display()
    )
    work = partial(_train, command=command or sys.argv)
    return run_in_folder(config, check, work, resume=resume, overwrite=overwrite)


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
    trainer = fit(run, _parts(run.config, model, streams))
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
    check_one_process(config)
    run_dir = Path(config.output).expanduser()
    check_output(run_dir, resume=resume, overwrite=overwrite)
    checkpoint = None
    tokenizer: PreTrainedTokenizerBase | None
    if resume:
        settings = settings_to_resume(run_dir, given_settings(config), TrainConfig)
        config = TrainConfig.from_settings(settings)
        checkpoint = checkpoint_to_resume(config, run_dir, display)
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
    check_combinations(config)
    check_starts_from_nothing(config, plan.weights is not None)
    check_stages_are_reached(config, config.seq_len)
    check_trains(build_model(plan, config.seed, meta=True), config)
    check_writable(run_dir)
    return _Run(
        config=config,
        run_dir=run_dir,
        device=device,
        checkpoint=checkpoint,
        display=display,
        plan=plan,
        tokenizer=tokenizer,
    )


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
    model = prepare_model(build_model(run.plan, run.config.seed, meta=True), run.config)
    info = {
        **describe_run(run, command, model, group_parameters(model, run.config)),
        "training_tokens": len(streams.train),
        "validation_tokens": len(streams.validation),
    }
    create_run_folder(run.run_dir, run.config, info)
    save_tokens(run.run_dir / TOKENS_FOLDER, streams, tokenizer)


def _parts(config: TrainConfig, model: Any, streams: TokenStreams) -> Parts:
    optimizer, projected = prepare_optimizer(model, config)
    blocks = Blocks(streams.train, config.seq_len)
    return Parts(
        model=model,
        optimizer=optimizer,
        projected=projected,
        train_dataset=Shuffled(blocks, num_samples(config), config.seed),
        eval_dataset=Blocks(streams.validation, config.seq_len),
    )


def _build_model(run: _Run, tokenizer: PreTrainedTokenizerBase) -> Any:
    if run.plan.weights is None:
        run.plan.config.bos_token_id = tokenizer.bos_token_id
        run.plan.config.eos_token_id = tokenizer.eos_token_id
    model: Any = build_model(run.plan, run.config.seed)
    if run.config.precision == "bfloat16":
        model.to(torch.bfloat16)
    # Before the optimizer is built: it binds the parameters where they are.
    prepared: Any = prepare_model(model, run.config)
    return prepared.to(run.device)


def _finish(run: _Run, trainer: RunTrainer, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Save the model and its tokenizer, and report."""
    model: Any = trainer.model
    summary = summarize(run.config, run.run_dir, trainer)
    widen_corrected_weights(model, trainer.recorder.optimizer)
    export_plain(model)

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return finish(run, summary, save)
