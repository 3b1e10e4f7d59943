"""A comparison from its plan to its report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from adarankgrad.compare.cells import CellRunner
from adarankgrad.compare.grow import grown
from adarankgrad.compare.kinds import Pretraining
from adarankgrad.compare.plan import (
    CELLS_FOLDER,
    PLAN_NAME,
    Cell,
    Plan,
    load_plan,
)
from adarankgrad.compare.results import best_cell
from adarankgrad.train.config import TrainConfig
from adarankgrad.train.errors import Interrupted, TrainingError, UserError
from adarankgrad.train.files import staged_folder
from adarankgrad.train.lock import LOCK_NAME, locked


def compare(
    plan: Plan,
    *,
    resume: bool = False,
    workers: int = 1,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run every cell of a plan, choose rates, and write the results.

    The rates of each method are chosen on the first seed, by the plan's metric; the chosen ones are
    then run with all other seeds. At a seed, every method starts from the same weights and
    sees the same batches. A cell that fails or diverges is reported and does not stop the rest.

    Args:
        plan: From `make_plan`.
        resume: Continue the comparison in ``plan.output``; finished cells are reused, and what
            the plan adds to it is trained.
        workers: How many runs at a time, which share the processor's cores.
        say: Told one line about each thing that happens.

    Returns:
        The content of results.json.

    Raises:
        UserError: The plan cannot be met; nothing was trained.
        TrainingError: No cell of any method came to its end.
        Interrupted: A signal stopped the comparison; ``resume`` continues it.
    """
    with locked(plan.output):
        check_folder(plan.output, resume=resume)
        if resume:
            plan = grown(load_plan(plan.output), plan)
        prepare(plan, say)
        return _compare(plan, workers, say)


def _compare(plan: Plan, workers: int, say: Callable[[str], None]) -> dict[str, Any]:
    from adarankgrad.compare.report import write_results

    runner = CellRunner(plan, workers, say)
    try:
        runner.run(list(plan.all_possible_cells()))
        chosen = [cell for method in plan.methods if (cell := best_cell(plan, method)) is not None]
        repeats = [replace(cell, seed=seed) for seed in plan.seeds[1:] for cell in chosen]
        if repeats:
            runner.run(repeats)
    except Interrupted as error:
        raise Interrupted(
            "stopped; what is finished is kept. Continue with: "
            f"adarankgrad compare --resume --output {plan.output}",
            error.exit_code,
        ) from error
    results = write_results(plan, workers=workers)
    if not chosen:
        raise TrainingError(f"no run came to its end; what each said is in {results['report']}.")
    return results


def prepare(plan: Plan, say: Callable[[str], None]) -> None:
    """Check a plan against its data and optimizers, then save it and make the tokenizer.

    Raises:
        UserError: The plan cannot be met; nothing was written.
    """
    _check_methods(plan)
    plan.save()
    if isinstance(plan.kind, Pretraining):
        _prepare_tokenizer(plan, say)


def check_folder(output: Path, *, resume: bool) -> None:
    """See that a locked folder may be given to a new comparison, or is being resumed.

    Raises:
        UserError: It holds something.
    """
    if resume:
        return
    if (output / PLAN_NAME).exists():
        raise UserError(
            f"output {output} holds a comparison: continue it with --resume, or name another "
            "folder."
        )
    if any(path.name != LOCK_NAME for path in output.iterdir()):
        raise UserError(f"output {output} holds other files: name another folder.")


def _check_methods(plan: Plan) -> None:
    """Find out whether every method could train, before the first one does."""
    for method in plan.methods:
        cell = Cell(method, *method.rates[0], plan.seeds[0])
        config = replace(plan.config(cell), output=str(plan.output / CELLS_FOLDER / "check"))
        try:
            plan.kind.check_request(config)
        except UserError as error:
            raise UserError(f"{method.label}: {error}") from error


def _prepare_tokenizer(plan: Plan, say: Callable[[str], None]) -> None:
    """Train the tokenizer once for all runs, unless there is one."""
    from adarankgrad.train.presets import plan_model
    from adarankgrad.train.sources import find_text
    from adarankgrad.train.tokenizer import given_tokenizer, train_tokenizer

    config = cast(TrainConfig, plan.config(next(plan.all_possible_cells())))
    if given_tokenizer(config) is not None:
        return
    say("training a tokenizer")
    source, _ = find_text(config)
    vocab_size = plan_model(config, None).config.get_text_config().vocab_size
    texts = (piece.text for piece in source.pieces())
    with staged_folder(plan.tokenizer_dir) as staging:
        train_tokenizer(texts, vocab_size, config.seq_len).save_pretrained(staging)
