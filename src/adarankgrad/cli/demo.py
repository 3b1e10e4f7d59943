"""``adarankgrad demo``: AdamW and AdaRankGrad side by side, in minutes, on text that is there."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer


def demo(
    output: Annotated[
        Path,
        typer.Option(
            help="Folder for data, runs, plots and comparison. One that an earlier demo wrote is "
            "written again; other folders must be empty."
        ),
    ] = Path("runs/demo"),
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps of each run. Default: a few minutes' worth.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, data order and optimizer.")] = 0,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Use the output folder although it holds files that no demo wrote; files with "
            "the demo's names are replaced.",
        ),
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print one JSON object as the last line of standard output."),
    ] = False,
) -> None:
    """Train a small LLaMA on Python's standard library, with AdamW and with AdaRankGrad.

    Same text, seed and initial weights. Prints a comparison and says where the plots are. Needs
    no network.
    """
    from rich.console import Console

    from adarankgrad.train.comparison import comparison_table
    from adarankgrad.train.demo import DEFAULT_STEPS, DEMO_RUNS, PLAIN_LR, Demo
    from adarankgrad.train.units import format_seconds

    # With --json, standard output belongs to the JSON object alone.
    console = Console(stderr=as_json)

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    started = time.perf_counter()
    plan = Demo(output, DEFAULT_STEPS if steps is None else steps, seed, overwrite)
    result = plan.run(say, child_stdout=sys.stderr if as_json else None)
    result["elapsed_s"] = time.perf_counter() - started
    console.print(comparison_table(plan.run_dirs()))
    rates = ", ".join(f"{run.label} {run.lr:g}" for run in DEMO_RUNS)
    say(
        f"Each at the best learning rate of a grid ({rates}; {PLAIN_LR:g} for embeddings, head and "
        "norms), but one seed: a demonstration. Several seeds: benchmarks/pretrain_small.py."
    )
    say(f"Done in {format_seconds(result['elapsed_s'])}. Open in a browser:")
    say(f"  {result['comparison']}  (both runs)")
    for label, folder in plan.run_dirs().items():
        say(f"  {folder / 'report.html'}  ({label})")
    say(f"Plots as PNG: {output / 'plots'} and plots/ in each run's folder.")
    if as_json:
        print(json.dumps(result))
