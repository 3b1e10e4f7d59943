"""What each option of AdaRankGrad changes, one at a time: validation loss and state.

    python benchmarks/defaults.py
    python benchmarks/defaults.py --only carry bias_correction --seeds 0 1 2
    python benchmarks/defaults.py --only state_dtype --steps 400 --result state_dtype

The model, text and batches of ``pretrain_small.py``, at one pair of learning rates. Every row
differs from the defaults in what its name says. "Against defaults" is the median over seeds of the
difference on the same seed, with the smallest and the largest one.
"""

from __future__ import annotations

from typing import Any

from harness import finish, median, print_table, spread
from pretrain_small import base_parser, common_settings, run_cells

VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "bias_correction=global": {"bias_correction": "global"},
    "carry=ldadam": {"carry": "ldadam"},
    "carry=published": {"carry": "published"},
    "carry=keep": {"carry": "keep"},
    "carry=reset": {"carry": "reset"},
    "warm_start=False": {"warm_start": False},
    "basis=exact": {"basis": "exact"},
    "refresh_max_gap=20": {"refresh_max_gap": 20},
    "refresh_max_gap=200": {"refresh_max_gap": 200},
    "refresh_relative_norm=0.5, gap 200": {"refresh_relative_norm": 0.5, "refresh_max_gap": 200},
    "refresh_energy=0.5, gap 200": {"refresh_energy": 0.5, "refresh_max_gap": 200},
    "energy=0.5": {"energy": 0.5},
    "energy=0.9": {"energy": 0.9},
    "side=long": {"side": "long"},
    "update=orthogonalized": {"update": "orthogonalized"},
    "update=orthogonalized, beta1 0.95": {"update": "orthogonalized", "betas": (0.95, 0.999)},
    "update=orthogonalized, residual=none, energy 0.9": {
        "update": "orthogonalized",
        "residual": "none",
        "energy": 0.9,
    },
    "state_dtype=bfloat16": {"state_dtype": "bfloat16"},
    "state_dtype=int8": {"state_dtype": "int8"},
    "state_dtype=int8, basis bfloat16": {"state_dtype": "int8", "basis_dtype": "bfloat16"},
    "state_dtype=int8, basis int8": {"state_dtype": "int8", "basis_dtype": "int8"},
    "residual_scale=1": {"residual_scale": 1.0},
    "residual_scale=4": {"residual_scale": 4.0},
    "residual=normalized": {"residual": "normalized"},
    "residual=fira, energy 0.9": {"residual": "fira", "energy": 0.9},
    "residual=none, energy 0.9": {"residual": "none", "energy": 0.9},
}


def main() -> None:
    """Run what is missing, print a table, write the result."""
    parser = base_parser(__doc__.splitlines()[0])
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--plain-lr", type=float, default=8e-3)
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of rows to run")
    parser.add_argument("--result", help="name of the result; default: defaults or defaults_partly")
    arguments = parser.parse_args()
    names = ["defaults"] + [
        name for name in VARIANTS if name != "defaults" and name.startswith(tuple(arguments.only))
    ]
    rates = {"lr": arguments.lr, "plain_lr": arguments.plain_lr}
    common = {**common_settings(arguments), "optimizer": "adarankgrad", **rates}
    cells = [
        {**common, "options": VARIANTS[name], "seed": seed}
        for seed in arguments.seeds
        for name in names
    ]
    results = run_cells(cells, arguments.cells / "cells.jsonl", arguments.workers)
    summary = {}
    for name in names:
        runs = [run for run in results if run["options"] == VARIANTS[name]]
        losses = [run["val_loss"] for run in runs]
        references = [run["val_loss"] for run in results if run["options"] == {}]
        differences = [loss - base for loss, base in zip(losses, references, strict=True)]
        summary[name] = {
            "val_loss": {"median": median(losses), "spread": spread(losses)},
            "against_defaults": {"median": median(differences), "spread": spread(differences)},
            "mean_state_share": median([run["mean_state_share"] for run in runs]),
            "optimizer_ms_per_step": 1e3 * median([run["optimizer_s_per_step"] for run in runs]),
        }
    print_table(
        ["differs by", "val loss", "against defaults", "state", "ms/step"],
        [
            [
                name,
                f"{row['val_loss']['median']:.4f}",
                "{:+.4f} [{:+.4f}, {:+.4f}]".format(
                    row["against_defaults"]["median"], *row["against_defaults"]["spread"]
                ),
                f"{row['mean_state_share']:.3f}",
                f"{row['optimizer_ms_per_step']:.1f}",
            ]
            for name, row in summary.items()
        ],
    )
    settings = {
        key: getattr(arguments, key) for key in ("steps", "batch_size", "lr", "plain_lr", "seeds")
    }
    commits = sorted({run["commit"] for run in results})
    whole_or_part = "defaults" if len(names) == len(VARIANTS) else "defaults_partly"
    name = arguments.result or whole_or_part
    finish(name, {**settings, "commits_of_runs": commits, "variants": summary})


if __name__ == "__main__":
    main()
