"""Cost and quality of finding a basis at 1024 x 1024 and rank 128, against torch.linalg.svd.

    python benchmarks/refresh.py
    python benchmarks/refresh.py --gap 50 --repeats 15

Two kinds of matrices. *Gradients*: of the attention weights of a LLaMA (hidden 1024, two layers)
that reads Python's standard library as bytes, at a step of AdaRankGrad with a basis
``--gap`` steps old; 128 directions hold nearly all of their energy, so that sketches of them are
nearly rank-deficient, the hard case. *Slow*: singular values falling as 1/i, then the same with
noise of a tenth of its norm.

Cold finds a basis from nothing; warm starts from the first moment in the old basis (gradients) or
from the earlier matrix in its own basis (slow). Either returns basis, energies of every rank and
the matrix's projection on the basis, which a step without a refresh computes too: what a refresh
adds to a step is the whole less that projection, and "added" compares this with the SVD. "Plain
sketch" is one warm power iteration and a Householder QR, the least that finds a basis: no energies,
no projection. The SVD is reduced, of the same matrix, in the same run. Energies are shares of what
its first 128 directions capture.
"""

from __future__ import annotations

import argparse
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adarankgrad import AdaRankGrad, param_groups
from adarankgrad.core.projection import project
from adarankgrad.core.range_finder import Subspace, find_range
from harness import finish, median, print_table, seconds, spread

RANK, HIDDEN = 128, 1024


def real_gradients(gap: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Basis, first moment in it, and the gradient ``gap`` steps after the basis was found."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=HIDDEN,
        intermediate_size=2736,
        num_hidden_layers=2,
        num_attention_heads=16,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    options = {"max_rank": RANK, "min_rank": RANK, "refresh_max_gap": gap + 1}
    optimizer = AdaRankGrad(param_groups(model, **options), lr=1e-3)
    weights = [p for name, p in model.named_parameters() if "self_attn" in name]
    source = Path(sysconfig.get_path("stdlib"), "argparse.py").read_bytes()
    blocks = torch.tensor(list(source[: len(source) // 128 * 128])).view(-1, 128)
    for step in range(gap + 1):
        batch = blocks[torch.randint(len(blocks), (8,))]
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        if step < gap:
            optimizer.step()
    states = [optimizer.state[weight] for weight in weights]
    return [
        # The basis of a square weight spans its right side.
        (state["basis"], state["exp_avg"], weight.grad.mT)
        for state, weight in zip(states, weights, strict=True)
    ]


def slow_matrices(count: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Basis and projection of matrices whose singular values fall as 1/i, and them with noise."""
    cases = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        left, right, noise = torch.randn(3, HIDDEN, HIDDEN, generator=generator).unbind()
        values = 1.0 / torch.arange(1, HIDDEN + 1)
        matrix = (torch.linalg.qr(left).Q * values) @ torch.linalg.qr(right).Q
        subspace = find_range(matrix, RANK)
        later = matrix + 0.1 * matrix.norm() / noise.norm() * noise
        cases.append((subspace.basis, subspace.coords, later))
    return cases


def measure(
    basis: torch.Tensor, start: torch.Tensor, matrix: torch.Tensor, repeats: int
) -> dict[str, float]:
    """Times and captured energies for one matrix."""
    finders: dict[str, Callable[[], Subspace]] = {
        "cold": lambda: find_range(matrix, RANK),
        "warm": lambda: find_range(matrix, RANK, start=start),
        "warm_without_oversampling": lambda: find_range(matrix, RANK, start=start, oversampling=0),
    }
    best = torch.linalg.svdvals(matrix)[:RANK].square().sum()
    svd_s = median(seconds(lambda: torch.linalg.svd(matrix, full_matrices=False), 3))
    projection_s = median(seconds(lambda: project(matrix, basis), repeats))
    plain = median(seconds(lambda: torch.linalg.qr(matrix @ (matrix.mT @ basis)), repeats))
    figures = {
        "svd_s": svd_s,
        "projection_s": projection_s,
        "plain_sketch_speedup": svd_s / plain,
        "rank_128_share_of_all_energy": float(best / matrix.square().sum()),
    }
    for name, find in finders.items():
        whole_s = median(seconds(find, repeats))
        figures[f"{name}_s"] = whole_s
        figures[f"{name}_speedup"] = svd_s / whole_s
        figures[f"{name}_speedup_of_what_is_added"] = svd_s / (whole_s - projection_s)
        figures[f"{name}_energy"] = float(find().energies.sum() / best)
    return figures


def main() -> None:
    """Measure, print a table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gap", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=11)
    arguments = parser.parse_args()
    kinds = {"gradients": real_gradients(arguments.gap), "slow": slow_matrices(3)}
    results = {}
    for kind, cases in kinds.items():
        measured = [measure(*case, arguments.repeats) for case in cases]
        results[kind] = {
            name: {"median": median(values), "spread": spread(values)}
            for name in measured[0]
            for values in [[result[name] for result in measured]]
        }
    print_table(
        ["matrices", "figure", "median", "lowest", "highest"],
        [
            [kind, name, *(f"{value:.4f}" for value in (figure["median"], *figure["spread"]))]
            for kind, summary in results.items()
            for name, figure in summary.items()
        ],
    )
    finish("refresh", {"rank": RANK, "size": HIDDEN, "gap": arguments.gap, **results})


if __name__ == "__main__":
    main()
