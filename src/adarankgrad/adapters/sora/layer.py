"""A LoRA layer with a gate on each of its ranks: W₀ x + s B (g ⊙ A x)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from peft.utils.other import transpose
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

GATE_INITS = ("normal", "ones")


class GatedLinear(nn.Linear):
    """LoRA's A with the gate on its outputs.

    Attributes:
        lora_gate: (1, r), float32 or wider, since steps of 1e-4 would be lost in half precision.
            Not (r,), which peft takes for a broken shard where it saves A.
    """

    def __init__(self, linear: nn.Linear, gate: Tensor) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.lora_gate = nn.Parameter(gate)

    def forward(self, inputs: Tensor) -> Tensor:  # noqa: D102
        hidden = super().forward(inputs)
        return (hidden * self.lora_gate.squeeze(0)).to(hidden.dtype)


class SoraLinear(LoraLinear):
    """peft's LoRA on a linear layer, with `GatedLinear` for A."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any
    ) -> None:
        is_conv1d = isinstance(base_layer, Conv1D)
        super().__init__(
            base_layer, adapter_name, config, is_target_conv_1d_layer=is_conv1d, **kwargs
        )
        self.fan_in_fan_out = is_conv1d

    def update_layer(self, adapter_name: str, r: int, *args: Any, **kwargs: Any) -> None:
        """Add the adapter, then its gates."""
        super().update_layer(adapter_name, r, *args, **kwargs)
        config = kwargs["config"]
        linear: Any = self.lora_A[adapter_name]
        draw = torch.randn if config.sora_gate_init == "normal" else torch.ones
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        gate = draw(1, r, device=linear.weight.device, dtype=dtype)
        self.lora_A[adapter_name] = GatedLinear(linear, gate)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return what a merge adds to the base weight."""
        gated: Any = self.lora_A[adapter]
        weight_b: Any = self.lora_B[adapter].weight
        delta = (weight_b * gated.lora_gate) @ gated.weight.to(gated.lora_gate.dtype)
        delta = transpose(delta * self.scaling[adapter], self.fan_in_fan_out)
        merged: Tensor = delta.to(weight_b.dtype)
        return merged


@dataclass
class GatedLoraConfig(LoraConfig):
    """A configuration whose linear layers get gates.

    Attributes:
        sora_gate_init: one of `GATE_INITS`.
    """

    sora_gate_init: str = "normal"

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self._register_custom_module({nn.Linear: SoraLinear, Conv1D: SoraLinear})

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save as peft does, and warn: peft's loader would drop the gates."""
        warnings.warn(
            "this folder holds SoRA's gates, which peft ignores when it loads an adapter: it "
            "serves only to resume this run. Write the adapter itself with "
            "adarankgrad.adapters.sora.export(model, folder)",
            UserWarning,
            stacklevel=3,
        )
        super().save_pretrained(save_directory, **kwargs)
