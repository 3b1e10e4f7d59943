"""A fine-tuning run from a config to a finished run folder.

Data and settings are read and checked before the model's weights; `train.loop` holds what every
kind of run shares.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from adarankgrad.adapters.callback import STATE_NAME, StepCallback
from adarankgrad.adapters.interface import AdapterError
from adarankgrad.finetune.config import FinetuneConfig
from adarankgrad.finetune.deeper import deepen
from adarankgrad.finetune.defaults import check_duration, with_optimizer, with_steps
from adarankgrad.finetune.examples import (
    Examples,
    input_files,
    load_examples,
    save_examples,
    saved_examples,
)
from adarankgrad.finetune.inputs import check_model
from adarankgrad.finetune.methods.find import find_method
from adarankgrad.finetune.methods.interface import Method, Prepared
from adarankgrad.finetune.pretrained import (
    build_empty,
    check_known,
    checksum_of,
    fit_length,
    load_config,
    load_model,
    load_tokenizer,
    most_tokens,
)
from adarankgrad.finetune.summary import summarize
from adarankgrad.finetune.tasks.find import find_task
from adarankgrad.finetune.tasks.interface import Encoded, Example, Outcome, Task, pad
from adarankgrad.train.checkpoints import checkpoint_path
from adarankgrad.train.combinations import check_combinations
from adarankgrad.train.display import Display
from adarankgrad.train.errors import TrainingError, UserError
from adarankgrad.train.files import write_atomic
from adarankgrad.train.folder import (
    DATA_FOLDER,
    PREDICTIONS_NAME,
    check_inputs_outside,
    check_output,
    check_writable,
    create_run_folder,
)
from adarankgrad.train.growing_depth import check_stages_are_reached
from adarankgrad.train.loop import (
    Parts,
    Request,
    check_one_process,
    checkpoint_to_resume,
    describe_run,
    finish,
    fit,
    num_samples,
    run_in_folder,
)
from adarankgrad.train.measure import reset_peak_memory
from adarankgrad.train.quiet import peft_warnings_ignored
from adarankgrad.train.settings import (
    RUN_NAME,
    given_settings,
    resolve_device,
    settings_to_resume,
)
from adarankgrad.train.tokenizer import check_knows

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from adarankgrad.train.trainer import RunTrainer


@dataclass(frozen=True, kw_only=True)
class _Run(Request):
    """A sound request to fine-tune: these examples, a model of this configuration.

    Attributes:
        train: What the training examples became.
        validation: What the others became.
        num_layers: Layers of the pretrained model, where it is to grow.
    """

    config: FinetuneConfig
    task: Task
    method: Method
    examples: Examples
    tokenizer: Any
    model_config: PretrainedConfig
    train: Encoded
    validation: Encoded
    max_length: int
    num_layers: int | None


def finetune(
    config: FinetuneConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    command: list[str] | None = None,
    display: Display | None = None,
) -> dict[str, Any]:
    """Fine-tune a pretrained model and leave a complete run folder behind.

    Args:
        config: The settings.
        resume: Continue the run in ``config.output`` from its newest intact checkpoint, to the same
            result as an uninterrupted run (bit for bit on the CPU).
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
        >>> from adarankgrad.finetune import FinetuneConfig, finetune
        >>> config = FinetuneConfig(
        ...     task="classification", model="minilm", data="train.tsv", output="runs/a", epochs=3
        ... )
        >>> finetune(config)  # doctest: +SKIP
    """
    check = partial(
        _check, config, resume=resume, overwrite=overwrite, display=display or Display()
    )
    work = partial(_finetune, command=command or sys.argv)
    with _known_warnings_ignored():
        return run_in_folder(config, check, work, resume=resume, overwrite=overwrite)


def check_request(config: FinetuneConfig) -> None:
    """Find out whether a fresh run could be made, writing nothing and loading no weights.

    Raises:
        UserError: It could not.
    """
    with _known_warnings_ignored():
        _check(config, resume=False, overwrite=False, display=Display())


@contextmanager
def _known_warnings_ignored() -> Iterator[None]:
    with peft_warnings_ignored():
        # Checkpoints of SoRA hold gates; what is delivered has none.
        warnings.filterwarnings("ignore", message="this folder holds SoRA's gates")
        yield


def _check(config: FinetuneConfig, *, resume: bool, overwrite: bool, display: Display) -> _Run:
    """Find out whether the request can be met, writing nothing and loading no weights."""
    config.check()
    check_one_process(config)
    run_dir = Path(config.output).expanduser()
    check_output(run_dir, resume=resume, overwrite=overwrite)
    checkpoint = None
    if resume:
        settings = settings_to_resume(run_dir, given_settings(config), FinetuneConfig)
        config = FinetuneConfig.from_settings(settings)
        checkpoint = checkpoint_to_resume(config, run_dir, display)
    if not resume or config.steps is None:
        check_duration(config)
    check_model(config.model)
    device = resolve_device(config.device)
    config = with_optimizer(config)
    check_combinations(config)
    task = find_task(config)
    method = find_method(config, task)
    examples, tokenizer = read_data(config, run_dir, task, is_saved=checkpoint is not None)
    model_config = load_config(config, task)
    model_config.pad_token_id = tokenizer.pad_token_id
    num_layers = deepen(config, model_config)
    max_length = fit_length(config, model_config, tokenizer)
    task.check_answers(examples.validation, tokenizer, most_tokens(model_config, tokenizer))
    train, validation = (
        _encode(task, part, tokenizer, max_length) for part in (examples.train, examples.validation)
    )
    largest_token = task.largest_token(train.features + validation.features, tokenizer)
    check_knows(config.model, model_config.get_text_config().vocab_size, largest_token)
    config = with_steps(config, train.num_learnt)
    check_stages_are_reached(config, min(len(f["input_ids"]) for f in train.features))
    task.config = method.config = config
    with warnings.catch_warnings():
        # What is to be warned of is said when the model itself is prepared.
        warnings.simplefilter("ignore", UserWarning)
        method.check(build_empty(config, task, model_config))
    check_writable(run_dir)
    return _Run(
        config=config,
        run_dir=run_dir,
        device=device,
        checkpoint=checkpoint,
        display=display,
        task=task,
        method=method,
        examples=examples,
        tokenizer=tokenizer,
        model_config=model_config,
        train=train,
        validation=validation,
        max_length=max_length,
        num_layers=num_layers,
    )


def read_data(
    config: FinetuneConfig, run_dir: Path, task: Task, *, is_saved: bool
) -> tuple[Examples, Any]:
    """Read examples and tokenizer, from the run folder where they are saved; check both.

    Raises:
        UserError: They are missing or damaged, or do not fit the task.
    """
    if is_saved:
        tokenizer = load_tokenizer(config, run_dir / DATA_FOLDER / "tokenizer")
        examples = saved_examples(run_dir / DATA_FOLDER)
    else:
        check_inputs_outside(run_dir, [*input_files(config), Path(config.model).expanduser()])
        tokenizer = load_tokenizer(config)
        examples = load_examples(config, task)
    task.prepare(examples.train, examples.validation)
    task.check_tokenizer(tokenizer, examples.columns)
    return examples, tokenizer


def _finetune(run: _Run, command: list[str]) -> dict[str, Any]:
    """Train what was found to be sound."""
    for note in (*run.examples.notes, *_encoding_notes(run)):
        run.display.say(note)
    reset_peak_memory(run.device)
    model, new_weights = load_model(run.config, run.task, run.model_config, run.num_layers)
    run.task.start_head(model, new_weights, run.examples.train)
    base_checksum, base_parameters = checksum_of(model), model.num_parameters()
    if run.checkpoint is not None:
        _check_base(run, base_checksum)
    if new_weights:
        run.display.say(f"new weights: {', '.join(new_weights)}")
    if run.config.precision == "bfloat16":
        model.to(torch.bfloat16)
    # Before the optimizer is built: it binds the parameters where they are.
    model = run.method.apply(model, new_weights).to(run.device)
    prepared = run.method.prepare(model)
    if run.checkpoint is None:
        started_from = {"new_weights": new_weights, "base_checksum": base_checksum}
        _create_folder(run, command, prepared, started_from)
    evaluation = _Evaluation(run)
    try:
        trainer = fit(run, _parts(run, prepared, evaluation))
    except AdapterError as error:
        raise TrainingError(f"--method {run.config.method}: {error}.") from error
    return _finish(run, trainer, prepared, evaluation, base_parameters)


def _create_folder(
    run: _Run, command: list[str], prepared: Prepared, started_from: dict[str, Any]
) -> None:
    info = {
        **describe_run(run, command, prepared.model, prepared.groups),
        "task": run.config.task,
        "training_examples": len(run.examples.train),
        "validation_examples": len(run.examples.validation),
        **started_from,
    }
    create_run_folder(run.run_dir, run.config, info)
    save_examples(run.run_dir / DATA_FOLDER, run.examples, run.tokenizer)


def _check_base(run: _Run, base_checksum: int) -> None:
    """Refuse to continue an adapter on other weights than those it was begun on.

    Raises:
        UserError: They are others.
    """
    info = json.loads((run.run_dir / RUN_NAME).read_text(encoding="utf-8"))
    if run.config.method != "full" and info["base_checksum"] != base_checksum:
        raise UserError(
            f"cannot resume {run.run_dir}: the weights of {run.config.model} are not those that "
            f"its adapter was begun on. Put them back, or start again with --overwrite."
        )


def _encode(task: Task, examples: list[Example], tokenizer: Any, max_length: int) -> Encoded:
    encoded = task.encode(examples, tokenizer, max_length)
    check_known(encoded.features, tokenizer)
    return encoded


def _encoding_notes(run: _Run) -> Iterator[str]:
    """Say how many examples there are, and what cutting them took away."""
    for name, examples, encoded in (
        ("training", run.examples.train, run.train),
        ("validation", run.examples.validation, run.validation),
    ):
        empty = f", {encoded.num_empty:,} with no answer left" if encoded.num_empty else ""
        yield (
            f"{len(examples):,} {name} examples, {encoded.num_cut:,} cut to {run.max_length} "
            f"tokens{empty}"
        )


class _Evaluation:
    """Judges a model on the validation examples.

    Attributes:
        latest: What it found last.
    """

    def __init__(self, run: _Run) -> None:
        self._run = run
        self.latest: Outcome | None = None

    def __call__(self, model: Any) -> dict[str, float]:
        run = self._run
        self.latest = run.task.evaluate(
            model, run.validation.features, run.examples.validation, run.tokenizer
        )
        return self.latest.metrics


def _parts(run: _Run, prepared: Prepared, evaluation: _Evaluation) -> Parts:
    config, task = run.config, run.task
    pad_token_id = run.tokenizer.pad_token_id
    hook = prepared.hook
    return Parts(
        model=prepared.model,
        optimizer=prepared.optimizer,
        projected=prepared.projected,
        train_dataset=task.training_data(run.train.features, num_samples(config), run.tokenizer),
        eval_dataset=None,
        collate=lambda features: pad(features, pad_token_id),
        evaluation=evaluation,
        best_metric=task.best_metric,
        compute_loss=task.compute_loss,
        averages_examples=task.compute_loss is None,
        lr_factor=prepared.lr_factor,
        callbacks=[] if hook is None else [StepCallback(hook)],
        stateful={} if hook is None else {STATE_NAME: hook},
    )


def _finish(
    run: _Run,
    trainer: RunTrainer,
    prepared: Prepared,
    evaluation: _Evaluation,
    base_parameters: int,
) -> dict[str, Any]:
    """Go back to the best checkpoint, judge it, save the model and report."""
    best_step = trainer.recorder.best_step
    assert best_step is not None
    model = prepared.model
    if best_step != trainer.state.global_step or evaluation.latest is None:
        trainer.restore(checkpoint_path(run.run_dir, best_step))
        evaluation(model)
    assert evaluation.latest is not None
    outcome = run.task.complete(evaluation.latest, model, run.examples.validation, run.tokenizer)
    lines = "".join(json.dumps(prediction) + "\n" for prediction in outcome.predictions)
    write_atomic(run.run_dir / PREDICTIONS_NAME, lines)
    summary = summarize(
        run.config, run.run_dir, trainer, outcome.metrics, best_step, base_parameters
    )
    summary |= run.method.summary(model)
    run.method.save_beside(model, run.run_dir)

    def save(folder: Path) -> None:
        run.method.save(model, trainer.recorder.optimizer, folder)
        run.tokenizer.save_pretrained(folder)

    return finish(run, summary, save)
