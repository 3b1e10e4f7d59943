"""From gates to a plain LoRA: dead ranks left out, the others' gates folded into B."""

from __future__ import annotations

from dataclasses import fields
from os import PathLike
from typing import Any

from peft import LoraConfig
from torch import Tensor, nn

from ..lora import ADAPTER_NAME, PEFT_PREFIX, exact_pattern, exact_targets
from .gates import gated_layers, surviving_ranks


def export_plain_lora(model: nn.Module, folder: str | PathLike[str]) -> None:
    """Write an adapter without gates, equal to the model's but for rounding.

    Layers whose gates are all zero are left out.

    Raises:
        ValueError: if the model has no gates, or none that is not zero.
    """
    ranks = {name: rank for name, rank in surviving_ranks(model).items() if rank > 0}
    if not ranks:
        raise ValueError(
            "every gate is zero: nothing is left to export; train with a smaller shrinkage"
        )
    adapted: Any = model
    gated_config = adapted.peft_config[ADAPTER_NAME]
    # peft writes what its configuration and the given state say, with all else that it knows.
    adapted.peft_config[ADAPTER_NAME] = _plain_config(gated_config, model, ranks)
    try:
        adapted.save_pretrained(str(folder), state_dict=_plain_state(model, ranks))
    finally:
        adapted.peft_config[ADAPTER_NAME] = gated_config


def _plain_config(gated: LoraConfig, model: nn.Module, ranks: dict[str, int]) -> LoraConfig:
    settings = {
        field.name: getattr(gated, field.name) for field in fields(LoraConfig) if field.init
    }
    layers = gated_layers(model)
    return LoraConfig(
        **settings
        | {
            "target_modules": exact_targets(model, list(ranks)),
            "rank_pattern": {exact_pattern(name): rank for name, rank in ranks.items()},
            "alpha_pattern": {
                exact_pattern(name): layers[name].scaling[ADAPTER_NAME] * rank
                for name, rank in ranks.items()
            },
        }
    )


def _plain_state(model: nn.Module, ranks: dict[str, int]) -> dict[str, Tensor]:
    """The model's state dict with A and B of the surviving ranks alone, under peft's names."""
    state = dict(model.state_dict())
    for name in gated_layers(model):
        a_key = f"{PEFT_PREFIX}{name}.lora_A.{ADAPTER_NAME}.weight"
        b_key = f"{PEFT_PREFIX}{name}.lora_B.{ADAPTER_NAME}.weight"
        gate = state.pop(f"{PEFT_PREFIX}{name}.lora_A.{ADAPTER_NAME}.lora_gate").squeeze(0)
        weight_a, weight_b = state.pop(a_key), state.pop(b_key)
        if name in ranks:
            is_alive = gate != 0
            state[a_key] = weight_a[is_alive]
            state[b_key] = (weight_b * gate)[:, is_alive].to(weight_b.dtype)
    return state
