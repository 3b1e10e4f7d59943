"""Powerpropagation, AdAdaGrad, progressive depth and extrapolation, each against its baseline.

    python benchmarks/schedules_small.py --data ../shared/data
    python benchmarks/schedules_small.py --data ../shared/data --parts powerprop extrapolation

A network on antibody loops, and LLaMAs of hidden size 64 on novels, in float32; what each part
measures is said in its file under `small_schedules/`. Every method has a learning rate of its own,
chosen on the first seed from three, and more outwards while the best is at an edge. Losses are
validation losses in nats a token. Nothing is timed.

The parts run in this order, one after another, in about 75 minutes on one slow core. Finished runs
are kept in ``--output``, and not repeated: after a change of the code, name another folder.
``--parts`` runs some and keeps the others' results. ``--scale 0.05 --seeds 0 --no-save`` tries that
everything works, in a folder of its own.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from harness import RESULTS, finish
from small_schedules import adadagrad, extrapolation, powerprop, progressive_depth
from small_schedules.language_model import load_blocks
from small_schedules.plots import draw
from small_schedules.study import Store

NAME = "schedules_small"
PARTS: dict[str, Any] = {
    part.NAME: part for part in (powerprop, adadagrad, progressive_depth, extrapolation)
}


def main() -> None:
    """Run what is missing, print a table for each part, write result and plots."""
    arguments = parse_arguments()
    parts = known_parts()
    for name in (name for name in PARTS if name in arguments.parts):
        parts[name] = run_part(name, arguments)
        print(f"\n{name}")
        PARTS[name].show(parts[name])
        plot = draw(name, parts[name], f"benchmarks/{NAME}.py --parts {name}")
        folder = arguments.output if arguments.no_save else RESULTS
        (folder / f"{NAME}_{name}.png").write_bytes(plot)
    if not arguments.no_save:
        finish(NAME, {"parts": parts})


def run_part(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Make a part's runs; return its figures."""
    needs_text = name != powerprop.NAME
    data = load_blocks(arguments.data, arguments.output) if needs_text else arguments.data
    store = Store(arguments.output)
    found = PARTS[name].measure(data, store, arguments.seeds, arguments.scale)
    return {**found, "seeds": arguments.seeds, "commits": sorted(store.commits)}


def known_parts() -> dict[str, Any]:
    """What the committed result says of each part."""
    path = RESULTS / f"{NAME}.json"
    return dict(json.loads(path.read_text())["parts"]) if path.exists() else {}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--output", type=Path, default=Path("runs/schedules_small"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scale", type=float, default=1.0, help="of the length of every run")
    parser.add_argument("--no-save", action="store_true", help="leave the committed result alone")
    return parser.parse_args()


if __name__ == "__main__":
    main()
