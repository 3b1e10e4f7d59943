"""Runs of SoRA on tiny models."""

from __future__ import annotations

import torch

from adarankgrad.adapters import SoRAConfig
from adarankgrad.adapters.sora.gates import gates_of

from .models import tiny_llama
from .training import Run


def tiny_run(*, num_steps=20, model=None, lr=1e-2, **settings):
    config = SoRAConfig(**{"rank": 4} | settings)
    base = model or tiny_llama()
    torch.manual_seed(1)
    return Run("sora", base, config, num_steps=num_steps, lr=lr)


def all_gates(model):
    return torch.cat([gate.detach().flatten() for gate in gates_of(model).values()])


def kill(model, name, kept=0):
    """Set all gates of a layer to zero but the first few."""
    with torch.no_grad():
        gates_of(model)[name][:, kept:] = 0.0
