"""What the low-memory preset costs in loss: bfloat16 weights, 8-bit state, every matrix projected.

    python benchmarks/low_memory.py --output runs/low_memory

Trains what `low_memory.toml` lists by `adarankgrad compare`: 16 runs of one to three minutes on two
cores. Stopped, it goes on when started again. Losses are validation losses at the end, in nats a
token; distances are taken seed by seed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from adarankgrad.compare.plan import PLAN_NAME, make_plan
from adarankgrad.compare.run import compare
from adarankgrad.train.values import read_toml_table
from compare_pretrain import BASELINE, differences, print_summary, summarize
from harness import finish

CONFIG = Path(__file__).with_suffix(".toml")


def main() -> None:
    """Run what is missing, print a table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/low_memory"))
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    plan = make_plan(arguments.output, read_toml_table(CONFIG))
    results = compare(
        plan,
        resume=(arguments.output / PLAN_NAME).exists(),
        workers=arguments.workers,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    methods = {method["label"]: summarize(method) for method in results["methods"]}
    for method in results["methods"]:
        summary = methods[method["label"]]
        summary["ahead_of_adamw"] = differences(methods[BASELINE], summary)
        summary["state_bytes"] = method["projected_state_bytes"] + method["plain_state_bytes"]
    print_summary(methods)
    finish("low_memory", {"settings": plan.shared, "seeds": list(plan.seeds), "methods": methods})


if __name__ == "__main__":
    main()
