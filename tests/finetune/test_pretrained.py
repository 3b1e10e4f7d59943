"""What is known of a pretrained model before its weights are read."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModel

from adarankgrad.finetune.pretrained import most_tokens

SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
SIZES |= {"intermediate_size": 8, "max_position_embeddings": 12, "pad_token_id": 1}
OWN = {"esm": {"position_embedding_type": "absolute", "mask_token_id": 8}}


@pytest.mark.parametrize(
    ("kind", "expected"), [("bert", 12), ("roberta", 10), ("mpnet", 10), ("esm", 10)]
)
def test_a_model_reads_as_many_tokens_as_are_told_and_no_more(kind, expected):
    config = AutoConfig.for_model(kind, **SIZES, **OWN.get(kind, {}))
    tokenizer = SimpleNamespace(model_max_length=1 << 40)
    longest = most_tokens(config, tokenizer)
    assert longest == expected
    model = AutoModel.from_config(config).eval()
    model(torch.full((1, longest), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, longest + 1), 5))
