"""A plain training loop that is killed by SIGKILL, saving as docs/checkpoints.md says."""

from __future__ import annotations

import io
import os

import pytest
import torch
from torch import nn

import killed
from adarankgrad import AdaRankGrad
from same_values import assert_same_values
from state_forms import STATE_FORMS

from .cases import CASES, FREQUENT
from .problems import make_params, random_tensor, train

STEPS = 6
NUM_KILLS = 5  # in each part
NUM_PARTS = 4
MICRO_BATCHES = 2


class ObservedFile(io.FileIO):
    """A file that notes every write half-way."""

    def __init__(self, path, events):
        super().__init__(path, "wb")
        self.events = events

    def write(self, data):
        half = len(data) // 2
        super().write(data[:half])
        self.events.note()
        return half + super().write(data[half:])


def save(content, path, events):
    """Write beside, flush, rename: the file is the old one or the new one."""
    with ObservedFile(f"{path}.partial", events) as file:
        torch.save(content, file)
        events.note()
        os.fsync(file.fileno())
    events.note()
    os.replace(f"{path}.partial", path)


def step_of_case(case):
    """Weights and optimizer of a contract case, and what takes one step of them."""
    is_rounded = "weight_rounding" in case.options
    params = make_params(torch.bfloat16 if is_rounded else torch.float32)
    optimizer = case.build(params)
    return params, optimizer, lambda step: train(optimizer, params, [step])


def step_in_backward():
    """The same of a network whose gradients are projected in the backward pass."""
    form = STATE_FORMS["int8, accumulated in backward"]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 12)).to(form.dtype)
    params = list(model.named_parameters())
    optimizer = AdaRankGrad(params, **{**FREQUENT, **form.options})
    optimizer.accumulate_in_backward(model, num_micro_batches=MICRO_BATCHES)

    def take(step):
        for part in range(MICRO_BATCHES):
            inputs = random_tensor((8, 16), "inputs", step, part).to(form.dtype)
            (model(inputs).square().mean() / MICRO_BATCHES).backward()
        optimizer.step()
        optimizer.zero_grad()

    return params, optimizer, take


def run(path, part, events):
    """Train with some of the optimizers at once; save all after each step."""
    runs = {case.name: step_of_case(case) for case in CASES[part::NUM_PARTS]}
    runs["in backward"] = step_in_backward()
    first = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        first = saved["step"]
        for name, (params, optimizer, _) in runs.items():
            optimizer.load_state_dict(saved[name]["optimizer"])
            for (_, param), value in zip(params, saved[name]["weights"], strict=True):
                param.data.copy_(value)
    for step in range(first, STEPS):
        events.begin(step)
        content = {"step": step + 1}
        for name, (params, optimizer, take) in runs.items():
            take(step)
            weights = [param.detach() for _, param in params]
            content[name] = {"optimizer": optimizer.state_dict(), "weights": weights}
        save(content, path, events)


@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_every_optimizer_goes_on_bit_for_bit_after_each_kill(part, tmp_path):
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    killed.kill_again_and_again(run, whole, parts, part, num_kills=NUM_KILLS, seed=f"part {part}")
    assert_same_values(torch.load(whole), torch.load(parts))
