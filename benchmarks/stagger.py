"""How much longer the longest step is than the median one, with and without staggered refreshes.

    python benchmarks/stagger.py                  # matrices of a LLaMA, hidden size 512, 8 layers
    python benchmarks/stagger.py --layers 16 --rank 64

Steps are timed one by one over whole refresh periods, after the first step, which finds a basis for
every matrix whatever the setting. Each step is repeated at the same place of ``--periods`` periods
and takes its median there, so that what else the machine does is not taken for a refresh. The rows
are of ``residual="none"``: with the default's orthogonalised residual every step is longer, and the
ratio smaller.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import nn

from adarankgrad import AdaRankGrad
from harness import finish, median, print_table

HIDDEN, INTERMEDIATE = 512, 1376
SHAPES = [(HIDDEN, HIDDEN)] * 4 + [(INTERMEDIATE, HIDDEN)] * 2 + [(HIDDEN, INTERMEDIATE)]


def make_parameters(num_layers: int) -> list[nn.Parameter]:
    """Weights and gradients of the layers' matrices; gradients have a decaying spectrum."""
    generator = torch.Generator().manual_seed(0)
    parameters = []
    for rows, cols in SHAPES * num_layers:
        parameter = nn.Parameter(torch.randn(rows, cols, generator=generator) * 0.02)
        strength = torch.arange(1, 129).float() ** -0.7
        left = torch.randn(rows, 128, generator=generator) * strength
        noise = torch.randn(rows, cols, generator=generator)
        right = torch.randn(128, cols, generator=generator)
        parameter.grad = (left @ right / 11 + 0.1 * noise) * 1e-3
        parameters.append(parameter)
    return parameters


def step_seconds(optimizer: torch.optim.Optimizer, gap: int, periods: int) -> list[float]:
    """Median time of each step of a period."""
    optimizer.step()
    for _ in range(gap):  # the first period, which staggering shortens
        optimizer.step()
    times = []
    for _ in range(gap * periods):
        start = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return [median(times[place::gap]) for place in range(gap)]


def main() -> None:
    """Measure, print a table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--gap", type=int, default=50)
    parser.add_argument("--periods", type=int, default=5)
    arguments = parser.parse_args()

    results: dict[str, Any] = {}
    rows = []
    for stagger in (False, True):
        optimizer = AdaRankGrad(
            make_parameters(arguments.layers),
            lr=1e-5,
            min_rank=arguments.rank,
            max_rank=arguments.rank,
            refresh_max_gap=arguments.gap,
            residual="none",
            stagger=stagger,
        )
        times = step_seconds(optimizer, arguments.gap, arguments.periods)
        name = "staggered" if stagger else "all at once"
        ratio = max(times) / median(times)
        results[name] = {"step_s": times, "longest_to_median": ratio}
        figures = (1e3 * median(times), 1e3 * max(times), ratio)
        rows.append([name, *(f"{figure:.2f}" for figure in figures)])
    print_table(["refreshes", "median step, ms", "longest, ms", "ratio"], rows)
    finish("stagger", {**vars(arguments), "shapes": SHAPES, "refreshes": results})


if __name__ == "__main__":
    main()
