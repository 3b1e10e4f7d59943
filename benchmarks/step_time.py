"""Time of one optimizer step for the matrices of a LLaMA with hidden size 1024, refreshes included.

    python benchmarks/step_time.py                       # one layer's matrices, ranks 16 to 256
    python benchmarks/step_time.py --layers 2 --cycles 2

The amortised step is the mean over whole refresh cycles. Its arithmetic floor is 4·m·n·r
operations at the matrix-product rate measured in the same run for the same shapes (no bookkeeping,
no Adam), plus streaming every gradient and weight once at the copy rate measured in the same run.
AdamW is measured on the same weights. The rows are of ``residual="none"``; what the default, an
orthogonalised residual, adds to each of them is measured once, without refreshes. As a share of
training it falls with the batch (docs/method.md, "The residual"). Ratios are within one run; set
the glibc variables of the Makefile, without which page faults dominate on CPU.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import nn

from adarankgrad import AdaRankGrad
from harness import finish, median, print_table, seconds, spread

HIDDEN, INTERMEDIATE = 1024, 2736
SHAPES = [(HIDDEN, HIDDEN)] * 4 + [(INTERMEDIATE, HIDDEN)] * 2 + [(HIDDEN, INTERMEDIATE)]


def make_parameters(num_layers: int) -> list[nn.Parameter]:
    """Weights and gradients of the layers' matrices; gradients have a decaying spectrum."""
    generator = torch.Generator().manual_seed(0)
    parameters = []
    for rows, cols in SHAPES * num_layers:
        parameter = nn.Parameter(torch.randn(rows, cols, generator=generator) * 0.02)
        strength = torch.arange(1, 257).float() ** -0.7
        left = torch.randn(rows, 256, generator=generator) * strength
        right = torch.randn(256, cols, generator=generator)
        noise = torch.randn(rows, cols, generator=generator)
        parameter.grad = (left @ right / 16 + 0.1 * noise) * 1e-3
        parameters.append(parameter)
    return parameters


def build(parameters: list[nn.Parameter], rank: int, **options: Any) -> AdaRankGrad:
    """The optimizer at one rank."""
    return AdaRankGrad(parameters, lr=1e-5, min_rank=rank, max_rank=rank, **options)


def step_seconds(optimizer: torch.optim.Optimizer, cycle: int, cycles: int) -> list[float]:
    """Mean step time of each refresh cycle, after one cycle that does not count."""
    means = []
    for _ in range(cycles + 1):
        start = time.perf_counter()
        for _ in range(cycle):
            optimizer.step()
        means.append((time.perf_counter() - start) / cycle)
    return means[1:]


def floor_seconds(parameters: list[nn.Parameter], rank: int) -> float:
    """Two thin products for every matrix at their best time, and one pass over both tensors."""
    total = 0.0
    for parameter in parameters:
        short, long = sorted(parameter.shape)
        matrix, basis, coords = (
            torch.randn(shape) for shape in [(short, long), (short, rank), (long, rank)]
        )
        products = [(matrix.mT, basis), (basis, coords.mT)]
        for left, right in products:
            total += min(seconds(lambda a=left, b=right: a @ b, 9, 2))
    return total + stream_seconds(parameters)


def stream_seconds(parameters: list[nn.Parameter]) -> float:
    """Read the gradients, read and write the weights: once, at the rate of an in-place add."""
    weights = [parameter.detach().clone() for parameter in parameters]
    grads = [parameter.grad for parameter in parameters]
    return min(seconds(lambda: torch._foreach_add_(weights, grads, alpha=1e-9), 7, 2))


def residual_seconds(parameters: list[nn.Parameter]) -> list[float]:
    """What an orthogonalised residual adds to a step that refreshes nothing."""
    with_residual, without = (
        step_seconds(build(parameters, 32, residual=kind), 2, 3)
        for kind in ("orthogonalized", "none")
    )
    return [longer - shorter for longer, shorter in zip(with_residual, without, strict=True)]


def main() -> None:
    """Measure, print a table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--cycles", type=int, default=3)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    arguments = parser.parse_args()

    parameters = make_parameters(arguments.layers)
    adamw = {}
    for kind in ("foreach", "fused"):
        optimizer = torch.optim.AdamW(parameters, lr=1e-5, **{kind: True})
        adamw[kind] = step_seconds(optimizer, 10, arguments.cycles)
        del optimizer

    rows, results = [], []
    for rank in arguments.ranks:
        floor = floor_seconds(parameters, rank)
        optimizer = build(parameters, rank, residual="none")
        cycle = optimizer.defaults["refresh_max_gap"]
        times = step_seconds(optimizer, cycle, arguments.cycles)
        ratios = {
            "to_floor": median(times) / floor,
            "to_adamw_foreach": median(times) / median(adamw["foreach"]),
            "to_adamw_fused": median(times) / median(adamw["fused"]),
        }
        results.append({"rank": rank, "step_s": times, "floor_s": floor, **ratios})
        figures = [median(times) * 1e3, floor * 1e3, *ratios.values()]
        rows.append([str(rank), *(f"{figure:.2f}" for figure in figures)])
        del optimizer

    residual = residual_seconds(parameters)

    header = ["rank", "step ms", "floor ms", "/ floor", "/ AdamW foreach", "/ AdamW fused"]
    print_table(header, rows)
    for kind, times in adamw.items():
        print(f"AdamW {kind}: {median(times) * 1e3:.2f} ms")
    print(f"an orthogonalised residual adds {median(residual) * 1e3:.0f} ms")
    finish(
        "step_time",
        {
            "shapes": SHAPES,
            "num_layers": arguments.layers,
            "refresh_max_gap": cycle,
            "adamw": {
                kind: {"step_s": times, "spread_s": spread(times)} for kind, times in adamw.items()
            },
            "adarankgrad": results,
            "orthogonalized_residual": {"added_s": residual, "spread_s": spread(residual)},
        },
    )


if __name__ == "__main__":
    main()
