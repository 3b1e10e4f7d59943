"""A small network in float64 with all that makes gradients arrive oddly, and how to train it."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from adarankgrad import AdaRankGrad

OPTIONS = {
    "lr": 0.02,
    "basis": "sketched",
    "max_rank": 4,
    "min_rank": 1,
    "energy": 0.7,
    "refresh_max_gap": 4,
    "oversampling": 2,
    "residual": "none",
    "weight_decay": 0.1,
}
NUM_STEPS = 14
MICRO_BATCHES = 4


class Network(nn.Module):
    """Two layers that share one weight, one that is not always used, biases, and a norm."""

    def __init__(self, *, use_checkpoints=None):
        super().__init__()
        self.first = nn.Linear(10, 12)
        self.shared = nn.Linear(12, 12, bias=False)
        self.tied = nn.Linear(12, 12, bias=False)
        self.tied.weight = self.shared.weight
        self.sometimes = nn.Linear(12, 12, bias=False)
        self.norm = nn.LayerNorm(12)
        self.last = nn.Linear(12, 3)
        self.use_checkpoints = use_checkpoints

    def middle(self, hidden):
        return self.tied(torch.tanh(self.shared(hidden)))

    def forward(self, inputs, *, with_extra=True):
        hidden = torch.tanh(self.first(inputs))
        if self.use_checkpoints is None:
            hidden = hidden + self.middle(hidden)
        else:
            hidden = hidden + checkpoint(self.middle, hidden, use_reentrant=self.use_checkpoints)
        if with_extra:
            hidden = hidden + torch.tanh(self.sometimes(hidden))
        return self.last(self.norm(hidden))


def build(*, in_backward, model_options=None, num_micro_batches=None, **options):
    torch.manual_seed(0)
    model = Network(**(model_options or {})).double()
    optimizer = AdaRankGrad(list(model.named_parameters()), **{**OPTIONS, **options})
    if in_backward:
        optimizer.accumulate_in_backward(model, num_micro_batches=num_micro_batches)
    return model, optimizer


def batch(step, size=8):
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(size, 10, generator=generator, dtype=torch.float64)
    return inputs, torch.sin(inputs[:, :3])


def loss_of(model, inputs, targets, **options):
    return (model(inputs, **options) - targets).square().mean()


def train(model, optimizer, *, num_steps=NUM_STEPS, num_micro_batches=1, after_backward=None):
    for step in range(num_steps):
        inputs, targets = batch(step)
        parts = zip(inputs.chunk(num_micro_batches), targets.chunk(num_micro_batches), strict=True)
        for part in parts:
            (loss_of(model, *part) / num_micro_batches).backward()
        if after_backward is not None:
            after_backward(model, optimizer)
        optimizer.step()
        optimizer.zero_grad()
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def assert_equal(left, right, *, atol=0.0):
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=atol, msg=name)


# Roundings of float64 through 14 steps of Adam, whose directions are at worst a millionfold more
# sensitive than the gradient where an entry is nearly zero.
ROUNDING = 14 * 0.02 * 1e6 * 2.2e-16 * 20
