"""The methods that a plan sets side by side, each as costs on a model without data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from adarankgrad.core.residual import STATELESS_RESIDUALS
from adarankgrad.memory_plan.costs import (
    Costs,
    adamw_costs,
    quantized_adamw_costs,
    subspace_costs,
)
from adarankgrad.memory_plan.lora import add_adapters
from adarankgrad.memory_plan.request import LORA, QUANTIZED_ADAMW, PlanRequest
from adarankgrad.memory_plan.trace import (
    Trace,
    fake_tensors,
    materialize,
    trace_training,
)
from adarankgrad.train.config import TrainConfig
from adarankgrad.train.errors import UserError
from adarankgrad.train.optimizers import OPTIMIZERS, build_optimizer, group_parameters
from adarankgrad.train.presets import (
    build_model,
    checkpoint_activations,
    first_line,
    plan_model,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LORA_RANK = 16
LOW_MEMORY = "adarankgrad-low-memory"
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "mixed-bfloat16": torch.float32,
}


@dataclass(frozen=True)
class TracedModel:
    """A model on fake tensors, and what its training passes hold.

    Attributes:
        model: Its weights have shapes and dtypes only.
        weight_bytes: Weights and buffers.
        traces: Without and with activation checkpointing; the latter None where the model has none.
    """

    model: PreTrainedModel
    weight_bytes: int
    traces: tuple[Trace, Trace | None]


@dataclass(frozen=True)
class Method:
    """One way to train the model.

    Attributes:
        name: In tables.
        switches: What it turns on: ``accumulate_in_backward``, ``int8_state``.
        traced: The model, adapters included.
        costs: Besides weights and activations.
    """

    name: str
    switches: tuple[str, ...]
    traced: TracedModel
    costs: Costs


def trace_model(config: TrainConfig, *, lora_rank: int | None = None) -> TracedModel:
    """Build the configured model without data and trace its training passes.

    Args:
        config: Model, sequence length and precision are read.
        lora_rank: Freeze the model and train adapters of this rank instead.

    Raises:
        UserError: The model is unknown or unreadable, or cannot be traced.
    """
    model = build_model(plan_model(config, None), config.seed, meta=True)
    is_mixed = config.precision == "mixed-bfloat16"
    # Frozen weights need no float32 beside the bfloat16 that they are multiplied in.
    is_half = config.precision == "bfloat16" or (is_mixed and lora_rank is not None)
    if is_half:
        model.to(torch.bfloat16)  # type: ignore[arg-type]
    with fake_tensors():
        materialize(model)
        if lora_rank is not None:
            add_adapters(model, lora_rank, _DTYPES[config.precision])
        try:
            plain = trace_training(model, config.seq_len, is_mixed=is_mixed)
            checkpointed = None
            if model.supports_gradient_checkpointing:
                # Fake tensors have no random state to preserve.
                checkpoint_activations(model, preserve_rng_state=False)
                checkpointed = trace_training(model, config.seq_len, is_mixed=is_mixed)
        except Exception as error:  # whatever a model's own code raises on fake tensors
            raise UserError(
                f"the forward pass of {config.model} cannot be traced: {first_line(error)}"
            ) from error
        held = [*model.parameters(), *model.buffers()]
        weight_bytes = sum(tensor.numel() * tensor.element_size() for tensor in held)
    return TracedModel(model, weight_bytes, (plain, checkpointed))


def methods_of(request: PlanRequest) -> list[Method]:
    """Trace the model and work out what each method holds, the requested optimizer's last.

    Raises:
        UserError: The model or an optimizer's argument is refused.
    """
    config = request.config
    full = trace_model(config)
    adapted = trace_model(config, lora_rank=LORA_RANK)
    methods = [
        Method("AdamW", (), full, adamw_costs(full.model, request.device)),
        Method("8-bit AdamW", (), full, quantized_adamw_costs(full.model)),
        Method(f"LoRA r={LORA_RANK}", (), adapted, adamw_costs(adapted.model, request.device)),
    ]
    # The arguments are of the requested optimizer.
    plain = replace(config, optimizer_args={}, max_rank=None, min_rank=None, energy=None)
    if config.optimizer != "galore":
        methods += _of_optimizer(replace(plain, optimizer="galore"), full, request.device)
    methods += _of_optimizer(_subspace_config(config), full, request.device)
    if config.optimizer != LOW_MEMORY:
        methods += _of_optimizer(replace(plain, optimizer=LOW_MEMORY), full, request.device)
    return methods


def _subspace_config(config: TrainConfig) -> TrainConfig:
    """The requested optimizer, or ours where another method's row is there anyway."""
    if config.optimizer in ("adamw", QUANTIZED_ADAMW, LORA):
        return replace(config, optimizer="adarankgrad", optimizer_args={})
    return config


def _of_optimizer(config: TrainConfig, traced: TracedModel, device: str) -> list[Method]:
    """An optimizer of ours as it is asked for, and with each of its switches."""
    groups = group_parameters(traced.model, config)
    rate = config.lr or OPTIMIZERS[config.optimizer].default_lr
    optimizer = build_optimizer(groups, replace(config, lr=rate))
    name = config.optimizer

    def method(*switches: str, **changes: Any) -> Method:
        accumulates = "accumulate_in_backward" in switches
        costs = subspace_costs(optimizer, device, accumulates=accumulates, **changes)
        return Method(name, switches, traced, costs)

    methods = [method()]
    options = optimizer.defaults
    may_accumulate = options["residual"] in ("none", *STATELESS_RESIDUALS)
    if name == LOW_MEMORY and may_accumulate and options["basis"] == "sketched":
        methods.append(method("accumulate_in_backward"))
    if name == "adarankgrad":
        methods.append(method("int8_state", **_small_state(optimizer.defaults["basis"])))
        if may_accumulate:
            methods.append(method("accumulate_in_backward", basis="sketched"))
            changes = {"basis": "sketched", **_small_state("sketched")}
            methods.append(method("accumulate_in_backward", "int8_state", **changes))
    return methods


def _small_state(basis: str) -> dict[str, Any]:
    return {"state_dtype": "int8", "basis_dtype": "float32" if basis == "none" else "int8"}
