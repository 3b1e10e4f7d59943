"""Small networks and trainings for the tests of this folder."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def mlp(seed: int = 0, sizes: tuple[int, ...] = (12, 20, 16, 6)) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for num_in, num_out in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(num_in, num_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def tied_mlp() -> nn.Sequential:
    """Layers of which the first two share their weight."""
    model = mlp(sizes=(12, 12, 12, 6))
    model[2].weight = model[0].weight
    return model


def batch(seed: int, num_rows: int = 8) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, 12, generator=source), torch.randint(
        6, (num_rows,), generator=source
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int, start: int = 0):
    for step in range(start, start + num_steps):
        inputs, labels = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()


def values(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]
