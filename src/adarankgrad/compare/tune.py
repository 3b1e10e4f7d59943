"""A learning rate for one optimizer, from a few short runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from adarankgrad.compare.cells import CellRunner, flags_of, outcome_of
from adarankgrad.compare.grow import check_same_settings
from adarankgrad.compare.kinds import Pretraining
from adarankgrad.compare.plan import Cell, Plan, load_plan, rate_text
from adarankgrad.compare.run import check_folder, prepare
from adarankgrad.train.errors import Interrupted, TrainingError, UserError
from adarankgrad.train.lock import locked
from adarankgrad.train.score import LOSS

MAX_RUNS = 8
_OF_THE_SEARCH = ("output", "steps", "eval_every")
"""Settings of the short runs, which a real run has its own of."""
_FACTOR = 2.0
_FACTOR_AFTER_DIVERGENCE = 10.0


def next_rates(losses: dict[float, float], start: float, num_runs: int) -> list[float]:
    """Return the rates to try next, none when the search is over.

    The start, twice and half of it first; then on by factors of two until the best rate has worse
    ones on both sides; then the two rates half-way (by factor) to its neighbours. Where every run
    diverged, a tenth of the lowest.

    Args:
        losses: Rate to validation loss of the runs so far, infinite where a run diverged.
        start: The first rate to try.
        num_runs: Most runs in all.
    """
    left = num_runs - len(losses)
    if not losses:
        wanted = [start, start * _FACTOR, start / _FACTOR]
    elif math.isinf(min(losses.values())):
        wanted = [min(losses) / _FACTOR_AFTER_DIVERGENCE]
    else:
        best = min(losses, key=lambda rate: losses[rate])
        above, below = (
            [rate for rate in losses if rate > best],
            [rate for rate in losses if rate < best],
        )
        if not above or not below:
            wanted = [best / _FACTOR if above else best * _FACTOR]
        else:
            middles = [math.sqrt(best * rate) for rate in (min(above), max(below))]
            # A neighbour at the root of two or nearer is near enough.
            wanted = [m for m in middles if max(m / best, best / m) > _FACTOR ** (3 / 8)]
    return [_rounded(rate) for rate in wanted[: max(0, left)]]


def settings_to_resume(output: Path) -> dict[str, Any]:
    """Return the settings that a search was started with, as `TrainConfig` names them.

    Raises:
        UserError: The folder holds no search.
    """
    saved = load_plan(output)
    _check_kind(saved)
    if not len(saved.methods) == len(saved.lrs) == len(saved.plain_lrs) == len(saved.seeds) == 1:
        raise UserError(f"{output} holds a comparison: resume it with adarankgrad compare.")
    return {
        **saved.shared,
        **saved.methods[0].settings,
        "lr": saved.lrs[0],
        "plain_lr": saved.plain_lrs[0],
        "seed": saved.seeds[0],
    }


def tune(
    plan: Plan,
    *,
    num_runs: int = MAX_RUNS,
    resume: bool = False,
    workers: int = 1,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Search the learning rate of a plan's only method, on its first seed.

    Args:
        plan: From `make_plan`, with one method, one seed, and one of each rate: the learning rate
            to try first, and that of the weights that no method projects.
        num_runs: Most runs.
        resume: Continue the search in ``plan.output``; finished runs are reused.
        workers: How many runs at a time.
        say: Told one line about each thing that happens.

    Returns:
        ``lr``, ``val_loss``, ``is_at_edge`` (a better rate may lie outside), ``losses`` (rate to
        validation loss, None where the run diverged or failed), ``command`` (which trains at
        ``lr`` and wants ``--output`` and ``--steps``), and what `compare` returns as ``results``.

    Raises:
        UserError: The plan cannot be met; nothing was trained.
        TrainingError: No run came to its end.
        Interrupted: A signal stopped the search; ``resume`` continues it.
    """
    _check_kind(plan)
    with locked(plan.output):
        check_folder(plan.output, resume=resume)
        if resume:
            _check_same_search(load_plan(plan.output), plan)
        prepare(plan, say)
        return _search(plan, num_runs, workers, say)


def _check_kind(plan: Plan) -> None:
    """Refuse other runs than those of pretraining, whose rates are told apart by their loss."""
    if not isinstance(plan.kind, Pretraining):
        raise UserError(
            "tune searches the rate of pretraining: for fine-tuning, give adarankgrad compare "
            "several --lrs."
        )


def _check_same_search(saved: Plan, plan: Plan) -> None:
    check_same_settings(saved, plan)
    for what, then, now in (
        ("--optimizer", *([method.label for method in p.methods] for p in (saved, plan))),
        ("--seed", saved.seeds, plan.seeds),
        ("--lr", saved.lrs, plan.lrs),
        ("--plain-lr", saved.plain_lrs, plan.plain_lrs),
    ):
        if list(then) != list(now):
            raise UserError(
                f"{plan.output} holds another search, with {what} {', '.join(map(str, then))} "
                f"instead of {', '.join(map(str, now))}: name another --output."
            )


def _search(plan: Plan, num_runs: int, workers: int, say: Callable[[str], None]) -> dict[str, Any]:
    from adarankgrad.compare.report import write_results

    runner = CellRunner(plan, workers, say)
    method = plan.methods[0]
    start, plain_lr = method.rates[0]
    assert start is not None
    losses: dict[float, float] = {}
    while rates := next_rates(losses, start, num_runs):
        method = replace(method, lrs=tuple(sorted([*losses, *rates])))
        plan = replace(plan, methods=(method,))
        plan.save()
        cells = [Cell(method, rate, plain_lr, plan.seeds[0]) for rate in rates]
        try:
            runner.run(cells)
        except Interrupted as error:
            raise Interrupted(
                "stopped; what is finished is kept. Continue with: adarankgrad tune --resume "
                f"--output {plan.output}" + f" --runs {num_runs}" * (num_runs != MAX_RUNS),
                error.exit_code,
            ) from error
        for cell, rate in zip(cells, rates, strict=True):
            losses[rate] = outcome_of(plan, cell).metrics.get(LOSS, math.inf)
    best = min(losses, key=lambda rate: losses[rate])
    results = write_results(plan, workers=workers)
    if math.isinf(losses[best]):
        raise TrainingError(f"no run came to its end; what each said is in {results['report']}.")
    return {
        "lr": best,
        "plain_lr": plain_lr,
        "val_loss": losses[best],
        "is_at_edge": best in (min(losses), max(losses)),
        "command": _command(plan, Cell(method, best, plain_lr, plan.seeds[0])),
        "losses": {rate_text(r): None if math.isinf(x) else x for r, x in sorted(losses.items())},
        "results": results,
    }


def _command(plan: Plan, cell: Cell) -> list[str]:
    """Return the command that trains as the search did, but for what a real run decides."""
    own_tokenizer = ("tokenizer",) if plan.shared.get("tokenizer") is None else ()
    leave_out = (*_OF_THE_SEARCH, *own_tokenizer)
    return ["adarankgrad", "train", *flags_of(plan.config(cell), leave_out)]


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")
