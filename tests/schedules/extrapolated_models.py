"""A small model, optimizers for it, and its steps written out without `Extrapolation`."""

from __future__ import annotations

import copy

import torch
from torch import nn

from adarankgrad import AdaRankGrad, param_groups
from adarankgrad.schedules.extrapolation import Extrapolation, ExtrapolationConfig


class Net(nn.Module):
    """A layer used twice, one never used, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 12)
        self.outer = nn.Linear(12, 3)
        self.unused = nn.Linear(2, 2)
        self.dropout = nn.Dropout(0.2)

    def forward(self, values):
        values = torch.tanh(self.inner(values))
        return self.outer(self.dropout(torch.tanh(self.inner(values))))


OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(
        model.parameters(), lr=0.2, momentum=0.9, nesterov=True, weight_decay=0.01
    ),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.02),
    "adarankgrad": lambda model: AdaRankGrad(
        param_groups(model, max_rank=4, smallest_side=2), lr=0.02, refresh_max_gap=3
    ),
    "bfloat16": lambda model: AdaRankGrad(
        param_groups(model.bfloat16(), max_rank=4, smallest_side=2),
        lr=0.02,
        weight_rounding="corrected",
    ),
}


def net(seed=0):
    torch.manual_seed(seed)
    return Net()


def batches(num_steps, num_parts=1, seed=1):
    data = torch.randn(num_steps, num_parts, 4, 12, generator=torch.Generator().manual_seed(seed))
    return list(data)


def loss_of(model, part):
    dtype = next(model.parameters()).dtype
    return model(part.to(dtype)).square().mean()


def train(model, optimizer, extrapolation, steps):
    """Train; with source fresh by the first part of a step."""
    for parts in steps:

        def fresh(parts=parts):
            state = torch.get_rng_state()
            (loss_of(model, parts[0]) / len(parts)).backward()
            torch.set_rng_state(state)

        is_fresh = extrapolation.config.source == "fresh"
        with extrapolation.extrapolate(fresh if is_fresh else None):
            for part in parts:
                (loss_of(model, part) / len(parts)).backward()
        optimizer.step()
        optimizer.zero_grad()


def train_plainly(model, optimizer, steps):
    for parts in steps:
        for part in parts:
            (loss_of(model, part) / len(parts)).backward()
        optimizer.step()
        optimizer.zero_grad()


def train_by_hand(model, optimizer, source, step, steps):
    """The same rule on copies: gradients of a model that is ahead, given to the real one."""
    params = list(model.parameters())
    past = [None] * len(params)
    for parts in steps:
        if source == "fresh":
            state = torch.get_rng_state()
            past = gradients(copy.deepcopy(model), parts[:1])
            torch.set_rng_state(state)
        ahead = copy.deepcopy(model)
        with torch.no_grad():
            for param, direction in zip(ahead.parameters(), past, strict=True):
                if direction is not None:
                    param.add_(direction, alpha=-step)
        last = None
        for part in parts:
            last = gradients(ahead, [part])
            for param, grad in zip(params, last, strict=True):
                if grad is not None:
                    share = grad / len(parts)
                    param.grad = share if param.grad is None else param.grad + share
        grads = [None if param.grad is None else param.grad.clone() for param in params]
        past = grads if source == "past-global" else last
        optimizer.step()
        optimizer.zero_grad()


def gradients(model, parts):
    model.zero_grad()
    for part in parts:
        loss_of(model, part).backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def same(first, second):
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


SOURCES = {
    "past-local": {"source": "past-local"},
    "fresh": {"source": "fresh"},
    "past-global": {"source": "past-global"},
    "noise": {"source": "noise", "scale": "gradient"},
}


def setup(name="sgd", num_parts=1, step=0.3, **settings):
    model = net()
    optimizer = OPTIMIZERS[name](model)
    config = ExtrapolationConfig(step=step, **settings)
    return model, optimizer, Extrapolation(optimizer, model, config, num_micro_batches=num_parts)


def scalar(value, **options):
    """One weight, float64, with an optimizer of plain gradient steps of 0.1."""
    model = nn.ParameterList([nn.Parameter(torch.tensor([value], dtype=torch.float64))])
    return model, model[0], torch.optim.SGD(model.parameters(), lr=0.1, **options)
