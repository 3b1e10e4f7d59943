"""Powerpropagation: accuracy of a pruned network, by the power that its weights were trained by.

Which loops of an antibody bind HER2, from their ten residues: as many of those that do as of those
that do not. A multilayer perceptron of the sizes and start of the authors' notebook, SGD with
momentum 0.9, cosine decay. Pruned by magnitude in each layer, without retraining; the output layer
keeps twice the share. A rate is chosen by the accuracy on validation examples, averaged over the
densities of the table; the table is of test examples.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adarankgrad.reparam import PowerpropConfig, export_plain, powerpropagate, sparsify
from fetched_models import loops
from harness import print_table
from small_schedules.study import Result, Run, Store, Study, as_text, over_seeds, rate_text

NAME = "powerprop"
ALPHAS = (1, 2, 3, 4)
DENSITIES = (1.0, 0.1, 0.05, 0.03)
CURVE = (1.0, 0.5, 0.3, 0.2, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01)
RATES = (0.03, 0.1, 0.3)
STEPS, BATCH_SIZE = 2000, 64
RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
NUM_HELD_OUT = {"validation": 2000, "test": 4000}

Split = tuple[Tensor, Tensor]  # features (n, 200), labels (n,)


@dataclass(frozen=True)
class Examples:
    """The data, the same for every seed."""

    train: Split
    validation: Split
    test: Split


def measure(data: Path, store: Store, seeds: list[int], scale: float) -> dict[str, Any]:
    """Train with every power; return accuracy by density."""
    examples = load_examples(data / "antibody")
    study = Study(NAME, store, seeds, partial(train, examples=examples))
    steps = max(1, round(STEPS * scale))
    methods = {}
    for alpha in ALPHAS:
        run = {"label": f"alpha {alpha}", "alpha": alpha, "steps": steps, "batch": BATCH_SIZE}
        found = study.search(run, RATES)
        runs = found.pop("runs")
        accuracy = {str(d): over_seeds([r["test"][str(d)] for r in runs]) for d in CURVE}
        methods[run["label"]] = {**found, "accuracy": accuracy}
    settings = {
        "steps": steps,
        "batch_size": BATCH_SIZE,
        "num_training_examples": len(examples.train[1]),
    }
    return {"settings": settings, "methods": methods}


def show(result: dict[str, Any]) -> None:
    """Print accuracy by density, a row a power."""
    rows = [
        [label, rate_text(m), *(as_text(m["accuracy"][str(d)]) for d in DENSITIES)]
        for label, m in result["methods"].items()
    ]
    print_table(["accuracy at density", "lr", *(f"{100 * d:g} %" for d in DENSITIES)], rows)


def train(run: Run, examples: Examples) -> Result:
    """Train once, dense, and judge the network at every density."""
    start_s = time.process_time()
    model = make_network(run["seed"])
    if run["alpha"] > 1:
        powerpropagate(model, PowerpropConfig(alpha=run["alpha"]))
    optimizer = torch.optim.SGD(model.parameters(), lr=run["lr"], momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, run["steps"])
    features, labels = examples.train
    generator = torch.Generator().manual_seed(run["seed"])
    for _ in range(run["steps"]):
        rows = torch.randint(len(labels), (run["batch"],), generator=generator)
        nn.functional.cross_entropy(model(features[rows]), labels[rows]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    export_plain(model)
    pruned = {str(density): _pruned(model, density) for density in CURVE}
    validation = {d: accuracy(each, examples.validation) for d, each in pruned.items()}
    test = {d: accuracy(each, examples.test) for d, each in pruned.items()}
    score = -sum(validation[str(d)] for d in DENSITIES) / len(DENSITIES)
    cpu_s = time.process_time() - start_s
    return {"score": score, "validation": validation, "test": test, "cpu_s": cpu_s}


def make_network(seed: int) -> nn.Sequential:
    """Build the network, its weights normal, truncated, of variance 1 / fan-in."""
    torch.manual_seed(seed)
    sizes = (10 * len(RESIDUES), 300, 100, 2)
    linear = [nn.Linear(*pair) for pair in zip(sizes, sizes[1:], strict=False)]
    for layer in linear:
        std = 1 / math.sqrt(layer.in_features)
        nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(linear[0], nn.ReLU(), linear[1], nn.ReLU(), linear[2])


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """Share of examples that are classified rightly."""
    features, labels = split
    return float((model(features).argmax(1) == labels).float().mean())


def load_examples(folder: Path) -> Examples:
    """Read the loops, take as many of either kind, and divide them at random."""
    binding, others = loops(folder, "AgPos"), loops(folder, "AgNeg")
    generator = torch.Generator().manual_seed(0)
    kinds = [_drawn(binding - others, generator), _drawn(others - binding, generator)]
    smaller = min(map(len, kinds))
    labels = torch.arange(2).repeat_interleave(smaller)
    names = [loop for kind in kinds for loop in kind[:smaller]]
    letters = torch.tensor([[RESIDUES.index(residue) for residue in loop] for loop in names])
    features = nn.functional.one_hot(letters, len(RESIDUES)).flatten(1).float()
    order = torch.randperm(len(labels), generator=generator)
    sizes = [len(order) - sum(NUM_HELD_OUT.values()), *NUM_HELD_OUT.values()]
    return Examples(*((features[rows], labels[rows]) for rows in order.split(sizes)))


def _drawn(loops_of_kind: set[str], generator: torch.Generator) -> list[str]:
    """All loops of a kind, in random order."""
    ordered = sorted(loops_of_kind)
    return [ordered[i] for i in torch.randperm(len(ordered), generator=generator)]


def _pruned(model: nn.Sequential, density: float) -> nn.Sequential:
    pruned = copy.deepcopy(model)
    sparsify(pruned, density, output_layer=str(len(pruned) - 1))
    return pruned
