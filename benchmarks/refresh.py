"""Cost and quality of finding a basis at 1024 x 1024 and rank 128, against torch.linalg.svd.

    python benchmarks/refresh.py
    python benchmarks/refresh.py --gap 50 --repeats 15

Two kinds of matrices. *Gradients*: of the attention weights of a LLaMA (hidden 1024, two layers)
that reads Python's standard library as bytes, at a first step and ``--gap`` steps later; 128
directions hold nearly all of their energy. *Slow*: singular values falling as 1/i, then the same
with noise of a tenth of its norm. Cold finds a basis of the later matrix from nothing; warm starts
from the later matrix's projection on the earlier basis, which a step has computed by then. A
refresh returns basis, energies and the projection on the new basis, so warm is what a step with a
refresh costs more than one without. The SVD is reduced, of the same matrix, in the same run;
energies are shares of what its first 128 directions capture.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adarankgrad import AdaRankGrad, param_groups
from adarankgrad.core.projection import project
from adarankgrad.core.range_finder import find_range
from harness import finish, median, print_table, seconds, spread

RANK, HIDDEN = 128, 1024


def real_gradients(gap: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs (first, ``gap`` steps later) of gradients of the square attention weights."""
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
    optimizer = AdaRankGrad(param_groups(model, max_rank=RANK), lr=1e-3)
    weights = [p for name, p in model.named_parameters() if "self_attn" in name]
    source = Path(sysconfig.get_path("stdlib"), "argparse.py").read_bytes()
    blocks = torch.tensor(list(source[: len(source) // 128 * 128])).view(-1, 128)
    snapshots = []
    for step in range(gap + 1):
        batch = blocks[torch.randint(len(blocks), (8,))]
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        if step in (0, gap):
            snapshots.append([weight.grad.clone() for weight in weights])
        optimizer.step()
    return list(zip(*snapshots, strict=True))


def slow_matrices(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs (matrix, the same with noise) whose singular values fall as 1/i."""
    pairs = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        left, right, noise = torch.randn(3, HIDDEN, HIDDEN, generator=generator).unbind()
        values = 1.0 / torch.arange(1, HIDDEN + 1)
        matrix = (torch.linalg.qr(left).Q * values) @ torch.linalg.qr(right).Q
        pairs.append((matrix, matrix + 0.1 * matrix.norm() / noise.norm() * noise))
    return pairs


def measure(first: torch.Tensor, later: torch.Tensor, repeats: int) -> dict[str, float]:
    """Times and captured energies for one pair of gradients."""
    start_basis = find_range(first, RANK).basis
    start = project(later, start_basis)

    def cold() -> torch.Tensor:
        return find_range(later, RANK).energies

    def warm() -> torch.Tensor:
        return find_range(later, RANK, start=start).energies

    best = torch.linalg.svdvals(later)[:RANK].square().sum()
    svd_s = median(seconds(lambda: torch.linalg.svd(later, full_matrices=False), 3))
    cold_s, warm_s = median(seconds(cold, repeats)), median(seconds(warm, repeats))
    return {
        "svd_s": svd_s,
        "cold_s": cold_s,
        "warm_s": warm_s,
        "cold_speedup": svd_s / cold_s,
        "warm_speedup": svd_s / warm_s,
        "cold_energy": float(cold().sum() / best),
        "warm_energy": float(warm().sum() / best),
        "rank_128_share_of_all_energy": float(best / later.square().sum()),
    }


def main() -> None:
    """Measure, print a table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gap", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=11)
    arguments = parser.parse_args()
    kinds = {"gradients": real_gradients(arguments.gap), "slow": slow_matrices(3)}
    results = {}
    for kind, pairs in kinds.items():
        measured = [measure(*pair, arguments.repeats) for pair in pairs]
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
