"""Fine-tuning small pretrained models: every weight by four optimizers, and four adapters.

    adarankgrad fetch-model minilm --output models/minilm   # and antiberty, smollm2
    python benchmarks/finetune_small.py --models models --data ../shared/data --workers 2

MiniLM on SST-2, MRPC and STS-B, AntiBERTy on which variants of an antibody bind HER2, from the ten
residues that vary and two on each side, SmolLM2 on the answers of GSM8K: subsets, listed in
`finetune_small.toml`, by `adarankgrad compare`. Rates are tried on the first seed, three of them
and more outwards while the best is at an edge, and judged on the validation examples like
everything else. Six hours of one core; stopped, it goes on when started again. ``--tasks SST-2``
runs some and keeps the others' results. Projected state is that of the matrices which a method
works on, a new head left out. Peak memory is that of a run's process, Python and torch included.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from adarankgrad.compare.plan import PLAN_NAME, make_plan
from adarankgrad.compare.run import compare
from adarankgrad.train.values import read_toml_table
from fetched_models import AFTER_LOOP, BEFORE_LOOP, loops
from finetune_small_figure import draw
from harness import RESULTS, finish, median, print_table, spread

NAME = "finetune_small"
MOST_RATES = 6
NUM_NEIGHBOURS = 2  # residues on each side of the loop that an antibody's model sees


def main() -> None:
    """Run what is missing, print a table for each task, write the result and the plot."""
    table = read_toml_table(Path(__file__).with_suffix(".toml"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/finetune_small"))
    parser.add_argument("--tasks", nargs="+", choices=table["tasks"], default=list(table["tasks"]))
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    antibody_table(arguments.data / "antibody", arguments.output / "antibody.csv")

    tasks = known_tasks()
    for name in arguments.tasks:
        settings = table["shared"] | {"seeds": [0, 1, 2]} | table["tasks"][name]
        tasks[name] = run_task(name, settings, table["methods"], arguments)
        print_task(name, tasks[name])
    tasks = {name: tasks[name] for name in table["tasks"] if name in tasks}
    (RESULTS / f"{NAME}.png").write_bytes(draw(tasks))
    finish(NAME, {"tasks": tasks})


def known_tasks() -> dict[str, Any]:
    """What the committed result says of each task."""
    path = RESULTS / f"{NAME}.json"
    return dict(json.loads(path.read_text())["tasks"]) if path.exists() else {}


def run_task(
    name: str,
    settings: dict[str, Any],
    methods: dict[str, dict[str, Any]],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Search every method's rate on the first seed, run the others, and return the figures."""
    labels = settings.get("optimizers", list(methods))
    tables = {label: methods[label] for label in labels}
    shared = with_paths(settings, arguments)

    def run(seeds: list[int]) -> dict[str, Any]:
        output = arguments.output / name
        plan = make_plan(output, {**shared, "seeds": seeds, "methods": tables})
        results = compare(
            plan,
            resume=(output / PLAN_NAME).exists(),
            workers=arguments.workers,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
        for folder in output.glob("cells/*/*/model"):
            shutil.rmtree(folder)  # hundreds of models
        return results

    results = run(settings["seeds"][:1])
    while (wider := widened(tables, results)) != tables:
        tables = wider
        results = run(settings["seeds"][:1])
    results = run(settings["seeds"])
    figures = {
        method["label"]: summarize(method, results["metric"]) for method in results["methods"]
    }
    return {"settings": settings, "metric": results["metric"], "methods": figures}


def with_paths(settings: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Return settings of a run whose models and data are found from here."""
    found = {**settings, "model": str(arguments.models / settings["model"])}
    for key in ("data", "validation"):
        if key in settings:
            places = [root / settings[key] for root in (arguments.data, arguments.output)]
            found[key] = str(next(path for path in places if path.exists()))
    return found | {"eval_every": settings["steps"], "save_every": settings["steps"]}


def widened(
    tables: dict[str, dict[str, Any]], results: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return the methods with one rate more where the best one is the lowest or the highest."""
    wider = dict(tables)
    for method in results["methods"]:
        rates = sorted({entry["lr"] for entry in method["grid"]})
        if len(rates) < MOST_RATES and method["lr"] in (rates[0], rates[-1]):
            factor = rates[1] / rates[0]
            beyond = rates[0] / factor if method["lr"] == rates[0] else rates[-1] * factor
            rates = sorted([*rates, float(f"{beyond:.3g}")])
        wider[method["label"]] = {**tables[method["label"]], "lrs": rates}
    return wider


def summarize(method: dict[str, Any], metric: str) -> dict[str, Any]:
    """Figures of one method at its chosen rate."""
    values = list(method["metrics"].get(metric, {"by_seed": {}})["by_seed"].values())
    kept = (
        *("lr", "plain_lr", "is_at_edge_of_grid", "grid", "lost", "metrics", "commits"),
        *("trainable_parameters", "projected_state_bytes", "state_bytes", "peak_bytes"),
        *("optimizer_s", "elapsed_s"),
    )
    return {
        "values": values,
        "median": median(values) if values else None,
        "spread": spread(values) if values else None,
        "mean_rank": method["mean_rank_last"],
        **{key: method[key] for key in kept},
    }


def antibody_table(folder: Path, path: Path) -> None:
    """Write loops with neighbours and whether they bind; those in both files are left out."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    binding, others = loops(folder, "AgPos"), loops(folder, "AgNeg")
    before, after = BEFORE_LOOP[-NUM_NEIGHBOURS:], AFTER_LOOP[:NUM_NEIGHBOURS]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sequence", "label"])
        for label, found in (("binds", binding - others), ("does not", others - binding)):
            writer.writerows([before + loop + after, label] for loop in sorted(found))


def print_task(name: str, task: dict[str, Any]) -> None:
    """Print one row a method."""
    print(f"\n{name}: {task['metric']}")
    rows = [
        [
            label,
            f"{row['median']:.4f} [{row['spread'][0]:.4f}, {row['spread'][1]:.4f}]",
            f"{row['lr']:g}" + " (edge)" * row["is_at_edge_of_grid"],
            f"{row['trainable_parameters'] / 1e6:.2f} M",
            *(
                f"{row[key] / 2**20:.2f}"
                for key in ("projected_state_bytes", "state_bytes", "peak_bytes")
            ),
            f"{row['elapsed_s']:.0f}",
        ]
        for label, row in task["methods"].items()
        if row["values"]
    ]
    header = ["method", "median [spread]", "lr", "trained", "projected MiB", "state MiB"]
    print_table([*header, "peak MiB", "s"], rows)


if __name__ == "__main__":
    main()
