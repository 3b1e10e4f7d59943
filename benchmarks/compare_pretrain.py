"""Every method on a small LLaMA and real text, at tuned rates and over seeds.

    pip install torchao==0.18.0 apollo-torch==1.0.3 bitsandbytes==0.50.2
    python benchmarks/compare_pretrain.py --output runs/compare_pretrain --workers 2

Trains what `compare_pretrain.toml` lists by `adarankgrad compare`: about 50 runs of a few minutes
each on two cores. Stopped, it goes on when started again. ``--only "AdaRankGrad"`` trains some of
the methods, in another folder, and keeps the others' results as they are; each names the commit
that it was run from. Losses are validation losses at the end, in nats a token; distances are taken
seed by seed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from adarankgrad.compare.figures import TradeOff, trade_off_figure
from adarankgrad.compare.plan import PLAN_NAME, make_plan
from adarankgrad.compare.run import compare
from adarankgrad.train.figure_style import caption_from, distinct_colours, to_png
from adarankgrad.train.values import read_toml_table
from harness import RESULTS, finish, median, print_table, spread

HERE = Path(__file__).parent
BASELINE, OURS, REFERENCE = "AdamW", "AdaRankGrad", "Muon"


def main() -> None:
    """Run what is missing, print a table, write the result and the plots."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/compare_pretrain"))
    parser.add_argument("--config", type=Path, default=HERE / "compare_pretrain.toml")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="run these, keep the others")
    arguments = parser.parse_args()

    table = read_toml_table(arguments.config)
    known = known_methods() if arguments.only else {}
    if arguments.only:
        table["methods"] = {label: table["methods"][label] for label in arguments.only}
    plan = make_plan(arguments.output, table)
    results = compare(
        plan,
        resume=(arguments.output / PLAN_NAME).exists(),
        workers=arguments.workers,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    methods = known | {method["label"]: summarize(method) for method in results["methods"]}
    for label, summary in methods.items():
        summary["ahead_of_adamw"] = differences(methods[BASELINE], summary)
        summary["share_of_the_way_to_muon"] = share_of_the_way(methods, label)
    print_summary(methods)
    draw(methods, arguments, is_complete=not arguments.only)
    finish(
        "compare_pretrain",
        {"settings": plan.shared, "seeds": list(plan.seeds), "methods": methods},
    )


def known_methods() -> dict[str, Any]:
    """What the committed result says of each method."""
    return dict(json.loads((RESULTS / "compare_pretrain.json").read_text())["methods"])


def draw(
    methods: dict[str, dict[str, Any]], arguments: argparse.Namespace, *, is_complete: bool
) -> None:
    """Draw loss over state from the result; copy the comparison's plots of single runs."""
    drawn = {label: m for label, m in methods.items() if m["state_share"] is not None}
    points = [
        TradeOff(label, method["state_share"], list(method["val_loss"]["by_seed"].values()), colour)
        for (label, method), colour in zip(
            drawn.items(), distinct_colours(list(drawn)), strict=True
        )
    ]
    caption = caption_from(
        (commit for method in drawn.values() for commit in method["commits"]),
        "benchmarks/compare_pretrain.py, drawn from its result",
    )
    path = RESULTS / "compare_pretrain_trade_off.png"
    path.write_bytes(to_png(trade_off_figure(points, caption), caption))
    shown = ("loss", "ranks_adarankgrad") if is_complete else ("ranks_adarankgrad",)
    for plot in (arguments.output / "plots" / f"{name}.png" for name in shown):
        if plot.exists():  # not where its method was left out
            shutil.copy(plot, RESULTS / f"compare_pretrain_{plot.name}")


def summarize(method: dict[str, Any]) -> dict[str, Any]:
    """Figures of one method at its chosen rates."""
    losses = list(method["val_loss"]["by_seed"].values())
    adamw = method["adamw_projected_state_bytes"]
    kept = (
        *("lr", "plain_lr", "is_at_edge_of_grid", "optimizer_s", "tokens_per_second"),
        *("grid", "commits"),
    )
    return {
        "val_loss": {"by_seed": method["val_loss"]["by_seed"]}
        | ({"median": median(losses), "spread": spread(losses)} if losses else {}),
        "state_share": method["projected_state_bytes"] / adamw if adamw else None,
        "highest_state_share": method["highest_projected_state_bytes"] / adamw if adamw else None,
        "mean_rank": [method["mean_rank_first"], method["mean_rank_last"]],
        "lost": method["lost"],
        **{key: method[key] for key in kept},
    }


def differences(baseline: dict[str, Any], method: dict[str, Any]) -> list[float]:
    """By how much a method's loss is lower, on every seed that both have."""
    base, own = (entry["val_loss"]["by_seed"] for entry in (baseline, method))
    return [base[seed] - own[seed] for seed in base if seed in own]


def share_of_the_way(methods: dict[str, dict[str, Any]], label: str) -> float | None:
    """How much of the median distance from AdamW to Muon a method covers; None if there is none."""
    to_muon = differences(methods[BASELINE], methods[REFERENCE])
    own = differences(methods[BASELINE], methods[label])
    if not to_muon or not own or median(to_muon) <= 0:
        return None
    return median(own) / median(to_muon)


def print_summary(methods: dict[str, dict[str, Any]]) -> None:
    """Print one row a method."""
    rows = []
    for label, figures in methods.items():
        losses = figures["val_loss"]
        if "median" not in losses:
            rows.append([label, "no result", "", "", "", ""])
            continue
        low, high = losses["spread"]
        ahead = figures["ahead_of_adamw"]
        edge = " (edge)" if figures["is_at_edge_of_grid"] else ""
        rows.append(
            [
                label,
                f"{losses['median']:.4f} [{low:.4f}, {high:.4f}]",
                f"{min(ahead):+.3f} to {max(ahead):+.3f}",
                ", ".join(
                    share_text(figures[key]) for key in ("state_share", "highest_state_share")
                ),
                f"{figures['lr']:g}{edge}",
                f"{figures['optimizer_s']:.0f}",
            ]
        )
    losses, ahead = "val loss, median [spread]", "ahead of AdamW"
    print_table(["method", losses, ahead, "state, highest", "lr", "optimizer s"], rows)


def share_text(share: float | None) -> str:
    """A share of AdamW's state, or a dash where it is not known."""
    return "-" if share is None else f"{share:.3f}"


if __name__ == "__main__":
    main()
