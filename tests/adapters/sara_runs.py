"""Runs of SaRA on tiny models."""

from __future__ import annotations

import copy

import torch
from torch import nn

from adarankgrad.adapters import SaRAConfig, sara

from .models import tiny_llama
from .training import Run

# Weights of the tiny models are drawn with a deviation of 0.02: a third of them is below this.
THRESHOLD = 0.008


def tiny_run(*, num_steps=8, model=None, lr=1e-3, weight_decay=0.0, batch_loss=None, **settings):
    config = SaRAConfig(
        **{"threshold": THRESHOLD, "rank_loss_weight": 0.0, "reselect_at": None} | settings
    )
    return Run(
        "sara",
        model or tiny_llama(),
        config,
        num_steps=num_steps,
        lr=lr,
        weight_decay=weight_decay,
        batch_loss=batch_loss,
    )


def image_loss(model, step):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(2, 3, 5, 5, generator=generator)
    return nn.functional.cross_entropy(model(images), torch.tensor([0, 1]))


def weights(model):
    """Present weights of the base model, by its own names."""
    return {name: param.detach().clone() for name, param in merged(model).named_parameters()}


def merged(model):
    return sara.merge(copy.deepcopy(model))


def trained_run(**settings):
    return tiny_run(**{"reselect_at": 0.5} | settings).train(range(1, 9))
