"""Small transformers that keep their layers in three different places."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 40


def build(kind: str, num_layers: int = 6, **options) -> nn.Module:
    """Make a LLaMA, GPT-2 or BERT without dropout, ready to train."""
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    shared = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    if kind == "llama":
        config = transformers.LlamaConfig(
            num_hidden_layers=num_layers, max_position_embeddings=32, **shared, **sizes, **options
        )
        return transformers.LlamaForCausalLM(config).train()
    if kind == "gpt2":
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        config = transformers.GPT2Config(
            n_layer=num_layers, n_embd=16, n_head=2, n_positions=32, **shared, **dropout, **options
        )
        return transformers.GPT2LMHeadModel(config).train()
    config = transformers.BertConfig(
        num_hidden_layers=num_layers,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **shared,
        **sizes,
        **options,
    )
    return transformers.BertForMaskedLM(config).train()


LISTS = {"llama": "model.layers", "gpt2": "transformer.h", "bert": "bert.encoder.layer"}


def layers_of(model: nn.Module) -> list[nn.Module]:
    return list(model.get_submodule(LISTS[model.config.model_type]))


def batch(seed: int = 0, num_rows: int = 2) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (num_rows, 8), generator=source)
    return {"input_ids": ids, "labels": ids}


def with_layers(model: nn.Module, numbers: Iterable[int]) -> nn.Module:
    """Build the deeper model that has these layers of a model, physically."""
    numbers = list(numbers)
    kind = model.config.model_type
    deep = build(kind, len(numbers)).to(next(model.parameters()).dtype)
    prefix = f"{LISTS[kind]}."
    saved = model.state_dict()
    outside = {name: value for name, value in saved.items() if not name.startswith(prefix)}
    for place, number in enumerate(numbers):
        of_layer = f"{prefix}{number}."
        outside |= {
            f"{prefix}{place}.{name.removeprefix(of_layer)}": value
            for name, value in saved.items()
            if name.startswith(of_layer)
        }
    deep.load_state_dict(outside)
    return deep


def checkpoint_layers(model: nn.Module) -> nn.Module:
    """Recompute layers in the backward pass; transformers 5.23 renamed how that is asked for."""
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})
    return model


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    model(**batch(seed)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
