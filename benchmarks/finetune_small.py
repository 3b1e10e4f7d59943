"""Fine-tuning small pretrained models: every weight by four optimizers, and four adapters.

    adarankgrad fetch-model minilm --output models/minilm   # and antiberty, smollm2
    python benchmarks/finetune_small.py --models models --data ../shared/data --workers 2

MiniLM on SST-2, MRPC and STS-B, AntiBERTy on which variants of an antibody bind HER2, SmolLM2 on
the answers of GSM8K: subsets, in `finetune_small_cases.py`. Rates are tried on seed 0, three of
them and more outwards while the best is at an edge, and judged on the validation examples like
everything else; then come the other seeds. Peak memory is that of the first run's process, Python
and torch included. A few hours on two cores; stopped, it goes on when started again.
``--tasks SST-2`` runs some and keeps the others' results.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adarankgrad.finetune.config import FinetuneConfig
from adarankgrad.finetune.run import finetune
from adarankgrad.train.errors import DivergedError
from fetched_models import AFTER_LOOP, BEFORE_LOOP, loops
from finetune_small_cases import METHODS, SHARED, TASKS, Task
from finetune_small_figure import draw
from harness import RESULTS, environment, median, print_table, spread

NAME = "finetune_small"
MOST_RATES = 6


def main() -> None:
    """Run what is missing, print a table for each task, write the result and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/finetune_small"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    antibody_table(arguments.data / "antibody", arguments.output / "antibody.csv")

    path = RESULTS / f"{NAME}.json"
    results = json.loads(path.read_text()) if path.exists() else {"benchmark": NAME, "tasks": {}}
    for name in arguments.tasks:
        labels = list(TASKS[name].methods or METHODS)
        benches = [
            Bench(name, label, arguments.models, arguments.data, arguments.output)
            for label in labels
        ]
        methods = dict(zip(labels, in_processes(benches, arguments.workers), strict=True))
        results["tasks"][name] = {
            "settings": SHARED | TASKS[name].settings,
            "metric": TASKS[name].metric,
            "methods": methods,
            "environment": environment(),
        }
        print_task(name, methods)
        path.write_text(json.dumps(results, indent=1) + "\n")
        (RESULTS / f"{NAME}.png").write_bytes(draw(results["tasks"]))
    print(json.dumps(results))


@dataclass(frozen=True)
class Bench:
    """One method on one task: its runs, each in a folder of its own.

    Attributes:
        task_name: Key of `TASKS`.
        label: Key of `METHODS`.
        models: Folder of the models.
        data: Folder of the data.
        output: Folder of all runs.
    """

    task_name: str
    label: str
    models: Path
    data: Path
    output: Path

    def measure(self) -> dict[str, Any]:
        """Run what is missing, and return the method's figures."""
        grid = self.search()
        lr, first = self.best(grid), grid[METHODS[self.label].lrs[0]]
        runs = [grid[lr], *(self.run(lr, seed) for seed in range(1, self.task.num_seeds))]
        done = [run for run in runs if run is not None]
        values = [run["metrics"][self.task.metric] for run in done]
        return {
            "lr": lr,
            "is_at_edge_of_grid": lr in (min(grid), max(grid)),
            "grid": {f"{rate:g}": run and run["metrics"] for rate, run in sorted(grid.items())},
            "values": values,
            "median": median(values),
            "spread": spread(values),
            "val_losses": [run["metrics"]["loss"] for run in done],
            "num_diverged": len(runs) - len(done),
            "trainable_parameters": runs[0]["trainable_parameters"],
            "state_bytes": runs[0]["state_bytes"],
            "projected_state_bytes": runs[0]["projected_state_bytes"] if self.is_full else None,
            "peak_bytes": first and first["peak_bytes"],
            "mean_rank": runs[0]["mean_rank"],
            "optimizer_s": median([run["optimizer_s"] for run in done]),
            "training_s": median([run["tokens"] / run["tokens_per_second"] for run in done]),
            "commits": sorted({run["commit"] for run in done}),
        }

    @property
    def is_full(self) -> bool:
        """Whether every weight is trained, by an optimizer that may project gradients."""
        return "method" not in METHODS[self.label].settings

    @property
    def task(self) -> Task:
        """What is learnt."""
        return TASKS[self.task_name]

    def search(self) -> dict[float, dict[str, Any] | None]:
        """Run seed 0 at rate after rate, until the best has worse ones on both sides."""
        rates = METHODS[self.label].lrs
        grid = {rate: self.run(rate, 0) for rate in rates}
        factor = rates[1] / rates[0]
        while len(grid) < MOST_RATES:
            best = self.best(grid)
            if best not in (min(grid), max(grid)):
                break
            rate = float(f"{best * factor if best == max(grid) else best / factor:.3g}")
            grid[rate] = self.run(rate, 0)
        return grid

    def best(self, grid: dict[float, dict[str, Any] | None]) -> float:
        """Rate of the best metric, of equal ones that of the lower loss."""

        def rank(rate: float) -> tuple[float, float]:
            run = grid[rate]
            if run is None:
                return (-float("inf"), 0.0)
            metrics = run["metrics"]
            return (self.task.sign * metrics[self.task.metric], -metrics["loss"])

        return max(grid, key=rank)

    def run(self, lr: float, seed: int) -> dict[str, Any] | None:
        """Return a run's summary, from its folder if it is there; None where it diverged."""
        folder = self.output / self.task_name / self.label / f"lr-{lr:g}_seed-{seed}"
        result = folder.with_name(f"{folder.name}.json")
        if not result.exists():
            commit = environment()["commit"]
            try:
                summary = finetune(self.config(folder, lr, seed), overwrite=folder.exists())
                summary["commit"] = commit
            except DivergedError:
                summary = None
            result.write_text(json.dumps(summary) + "\n")
            shutil.rmtree(folder)  # weights of hundreds of runs
            print(
                time.strftime("%H:%M:%S"),
                self.task_name,
                self.label,
                f"{lr:g}",
                seed,
                *([] if summary is None else [summary["metrics"], f"{summary['elapsed_s']:.0f} s"]),
                flush=True,
            )
        found = json.loads(result.read_text())
        return None if found is None else dict(found)

    def config(self, folder: Path, lr: float, seed: int) -> FinetuneConfig:
        """Return the settings of a run; only the last weights are judged."""
        settings = SHARED | self.task.settings | METHODS[self.label].settings
        settings |= {"output": str(folder), "lr": lr, "seed": seed, "metric": self.task.metric}
        settings["model"] = str(self.models / settings["model"])
        for key in ("data", "validation"):
            if key in settings:
                found = [root / settings[key] for root in (self.data, self.output)]
                settings[key] = str(next(path for path in found if path.exists()))
        settings |= {"eval_every": settings["steps"], "save_every": settings["steps"]}
        return FinetuneConfig.from_settings(settings)


def in_processes(benches: list[Bench], workers: int) -> list[dict[str, Any]]:
    """Measure each in a process of its own, on one thread."""
    with ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
        max_tasks_per_child=1,
    ) as pool:
        return list(pool.map(Bench.measure, benches))


def antibody_table(folder: Path, path: Path) -> None:
    """Write heavy chains and whether they bind; loops found in both files are left out."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    binding, others = loops(folder, "AgPos"), loops(folder, "AgNeg")
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sequence", "label"])
        for label, found in (("binds", binding - others), ("does not", others - binding)):
            writer.writerows([BEFORE_LOOP + loop + AFTER_LOOP, label] for loop in sorted(found))


def print_task(name: str, methods: dict[str, dict[str, Any]]) -> None:
    """Print one row a method."""
    rows = [
        [
            label,
            f"{row['median']:.4f} [{row['spread'][0]:.4f}, {row['spread'][1]:.4f}]",
            f"{row['lr']:g}" + " (edge)" * row["is_at_edge_of_grid"],
            f"{row['trainable_parameters'] / 1e6:.2f} M",
            *(
                "-" if row[key] is None else f"{row[key] / 2**20:.1f}"
                for key in ("projected_state_bytes", "state_bytes", "peak_bytes")
            ),
            f"{row['training_s']:.0f}",
        ]
        for label, row in methods.items()
    ]
    print(f"\n{name}: {TASKS[name].metric}")
    header = ["method", "median [spread]", "lr", "trained", "projected MiB", "state MiB"]
    print_table([*header, "peak MiB", "s"], rows)


if __name__ == "__main__":
    main()
