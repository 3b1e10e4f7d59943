"""A LLaMA in float64, and sequences for it."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adarankgrad import AdaRankGrad, param_groups

CONFIG = LlamaConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    vocab_size=64,
    max_position_embeddings=16,
    attention_dropout=0.1,
)
OPTIONS = {"lr": 1e-2, "max_rank": 6, "basis": "sketched", "refresh_max_gap": 3}


@pytest.fixture
def pair():
    """Builds the same model each time, and an optimizer of it."""

    def build(**options):
        torch.manual_seed(0)
        model = LlamaForCausalLM(CONFIG).double()
        groups = param_groups(model, smallest_side=2)
        return model, AdaRankGrad(groups, **{**OPTIONS, "residual": "none", **options})

    return build


@pytest.fixture(scope="session")
def sequences():
    tokens = torch.randint(64, (26, 12), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]
