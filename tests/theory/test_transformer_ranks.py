"""T5: ranks of gradients in a small transformer over training, recorded as they are.

The paper expects ranks to fall during training. Asserted here is what is certain (bounds between
the measures) and, with a wide margin, what was observed: no fall to rank one, neither under plain
full-batch descent, the setting of its lemma, nor under the method with minibatches. The recorded
numbers stand in docs/theory.md; ``pytest -s`` prints them anew.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from adarankgrad import AdaRankGrad, param_groups

from .spectra import energy_rank, stable_rank
from .tiny_transformer import TinyTransformer, markov_text

ENERGY = 0.9
REFRESH_GAP = 10


@dataclass
class Measurement:
    """Means over the twelve projected matrices."""

    step: int
    loss: float
    full_stable_rank: float
    full_energy_rank: float
    batch_stable_rank: float
    batch_energy_rank: float
    optimizer_rank: float


def block_gradients(model: TinyTransformer, text: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(text).backward()
    gradients = [
        param.grad.clone()
        for name, param in model.named_parameters()
        if name.startswith("blocks") and param.dim() == 2
    ]
    model.zero_grad()
    return gradients


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def assert_certain_bounds(gradients: list[Tensor]) -> None:
    """Stable rank <= rank; and r directions hold at most r σ₁², so r >= energy · stable rank."""
    for grad in gradients:
        stable, needed = stable_rank(grad), energy_rank(grad, ENERGY)
        assert 1.0 <= stable <= int(torch.linalg.matrix_rank(grad)) + 1e-9
        assert ENERGY * stable - 1e-9 <= needed <= min(grad.shape)


def measure(
    model: TinyTransformer, text: Tensor, step: int, optimizer: torch.optim.Optimizer
) -> Measurement:
    generator = torch.Generator().manual_seed(step)
    full = block_gradients(model, text)
    batch = block_gradients(model, text[torch.randperm(len(text), generator=generator)[:8]])
    assert_certain_bounds(full)
    assert_certain_bounds(batch)
    is_ours = isinstance(optimizer, AdaRankGrad)
    return Measurement(
        step=step,
        loss=model(text).item(),
        full_stable_rank=mean([stable_rank(grad) for grad in full]),
        full_energy_rank=mean([energy_rank(grad, ENERGY) for grad in full]),
        batch_stable_rank=mean([stable_rank(grad) for grad in batch]),
        batch_energy_rank=mean([energy_rank(grad, ENERGY) for grad in batch]),
        optimizer_rank=optimizer.report().mean_rank if is_ours else float("nan"),
    )


def adaptive(model: TinyTransformer) -> AdaRankGrad:
    return AdaRankGrad(
        param_groups(model),
        lr=3e-3,
        betas=(0.9, 0.999),
        max_rank=1.0,
        min_rank=1,
        energy=ENERGY,
        basis="randomized",
        power_iterations=1,
        oversampling=8,
        refresh_max_gap=REFRESH_GAP,
        refresh_min_gap=1,
        carry="squared",
        residual="none",
    )


def plain_descent(model: TinyTransformer) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.5)


def train(build, *, num_sequences: int, batch_size: int | None, num_steps: int, every: int):
    torch.manual_seed(0)
    model = TinyTransformer().double()
    text = markov_text(num_sequences)
    optimizer = build(model)
    generator = torch.Generator().manual_seed(1)
    measurements = []
    for step in range(num_steps + 1):
        if step % every == 0:
            measurements.append(measure(model, text, step, optimizer))
            print(_line(measurements[-1]))
        batch = text
        if batch_size is not None:
            batch = text[torch.randint(0, num_sequences, (batch_size,), generator=generator)]
        optimizer.zero_grad()
        model(batch).backward()
        optimizer.step()
    return measurements, optimizer


def _line(measured: Measurement) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in vars(measured).items())


def test_minibatch_training_keeps_the_adaptive_rank_where_it_was():
    """Batches of 8 of 256 sequences: ranks of 7 to 8 of 32 at energy 0.9, first to last."""
    measurements, _ = train(adaptive, num_sequences=256, batch_size=8, num_steps=150, every=50)
    first, last = measurements[1], measurements[-1]
    assert last.loss < measurements[0].loss - 0.2
    assert 0.7 * first.optimizer_rank < last.optimizer_rank < 1.3 * first.optimizer_rank
    assert last.batch_stable_rank > 2.0


def test_full_batch_training_raises_the_adaptive_rank():
    """All of 32 sequences, learned by heart: the rank follows the full gradient's."""
    measurements, _ = train(adaptive, num_sequences=32, batch_size=None, num_steps=120, every=30)
    ranks = [measured.optimizer_rank for measured in measurements[1:]]
    assert measurements[-1].loss < 0.5 * measurements[0].loss
    assert max(ranks) > 1.2 * measurements[0].full_energy_rank
    assert ranks[-1] > ranks[0]


def test_plain_full_batch_descent_does_not_approach_rank_one():
    """The lemma's own algorithm, on a network that is not reversible: the stable rank rises."""
    measurements, _ = train(
        plain_descent, num_sequences=32, batch_size=None, num_steps=100, every=25
    )
    stable_ranks = [measured.full_stable_rank for measured in measurements]
    assert measurements[-1].loss < measurements[0].loss
    assert stable_ranks[-1] > 1.1 * stable_ranks[0]


@pytest.mark.parametrize("basis", ["randomized", "exact"])
def test_the_rank_chosen_is_what_the_gradient_needs(basis):
    """A sketch captures at most what the best basis does, so it never needs fewer directions."""
    torch.manual_seed(0)
    model = TinyTransformer().double()
    optimizer = adaptive(model)
    optimizer.param_groups[0]["basis"] = basis
    model(markov_text(8)).backward()
    optimizer.step()
    report = optimizer.report()
    assert len(report.layers) == 12
    gradients = dict(model.named_parameters())
    for layer in report.layers:
        needed = energy_rank(gradients[layer.name].grad, ENERGY)
        assert needed <= layer.rank <= (needed if basis == "exact" else needed + 2)
        assert layer.captured_energy >= ENERGY * (1 - 1e-9)
