"""Memory of a training step: predicted by ``adarankgrad plan``, and measured.

    .venv/bin/python benchmarks/memory.py                       # all models, about five minutes
    .venv/bin/python benchmarks/memory.py --models small-llama  # one of them

Random weights and tokens; the machine's CUDA device, else the CPU. Ranks are held at their
ceiling (energy 1) and refreshed every other step, so that one of the four steps holds the most.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from adarankgrad.memory_plan.costs import Costs, adamw_costs, subspace_costs
from adarankgrad.memory_plan.methods import TracedModel, trace_model
from adarankgrad.memory_plan.predict import Prediction, Training
from adarankgrad.optim import param_groups
from adarankgrad.optim.projected_grad import ProjectedGrad
from adarankgrad.train.config import TrainConfig
from adarankgrad.train.optimizers import build_optimizer, group_parameters, held_bytes
from adarankgrad.train.presets import build_model, plan_model
from allocations import peak_bytes
from harness import finish, print_table

NUM_STEPS = 4
SEQ_LEN = 128
GPT2 = {
    "model_type": "gpt2",
    "n_embd": 256,
    "n_layer": 6,
    "n_head": 8,
    "vocab_size": 4000,
    "n_positions": 512,
}
BERT = {
    "model_type": "bert",
    "is_decoder": True,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "vocab_size": 4000,
    "max_position_embeddings": 512,
}
WIDE_LLAMA = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2736,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "vocab_size": 8192,
    "max_position_embeddings": 512,
}
CONFIGS = {"gpt2-6m": GPT2, "bert-6m": BERT, "wide-42m": WIDE_LLAMA}
MODELS = {  # name: sequences of a batch
    "small-llama": 8,
    "20m": 4,
    "gpt2-6m": 4,
    "bert-6m": 4,
    "wide-42m": 2,
}
PRECISIONS = {"20m": ("float32", "bfloat16"), "wide-42m": ("bfloat16",)}
EVERY_OTHER_STEP = {"refresh_max_gap": 2}
IN_BACKWARD = {**EVERY_OTHER_STEP, "basis": "sketched", "residual": "normalized"}
EIGHT_BITS = {"state_dtype": "int8", "basis_dtype": "int8"}


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        optimizer: As for ``adarankgrad train``.
        arguments: Of the optimizer.
        accumulates: Whether gradients are projected in the backward pass.
        max_rank: Ceiling of the ranks; None is the optimizer's own.
        include: Which weights to project; None leaves embeddings and head to AdamW.
    """

    optimizer: str
    arguments: dict[str, Any]
    accumulates: bool = False
    max_rank: int | None = None
    include: str | None = None


def _all_matrices(**state: str) -> Method:
    """Project embeddings and head too, at a low rank and in the backward pass."""
    arguments = {**IN_BACKWARD, **state}
    return Method("adarankgrad", arguments, accumulates=True, max_rank=16, include="weight")


METHODS = {
    "adamw": Method("adamw", {}),
    "galore": Method("galore", {"refresh_every": 2}),
    "adarankgrad": Method("adarankgrad", EVERY_OTHER_STEP),
    "adarankgrad, normalized": Method(
        "adarankgrad", {**EVERY_OTHER_STEP, "residual": "normalized"}
    ),
    "adarankgrad, in backward": Method(
        "adarankgrad", {**EVERY_OTHER_STEP, "basis": "sketched"}, accumulates=True
    ),
    "adarankgrad, in backward, all matrices at rank 16": _all_matrices(),
    "the same in 8 bits, rounded at random": _all_matrices(
        **EIGHT_BITS, weight_rounding="stochastic"
    ),
    "the same in 8 bits, corrected": _all_matrices(**EIGHT_BITS, weight_rounding="corrected"),
}


def main() -> None:
    """Print predicted beside measured, and keep both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help="Names, with commas between.")
    parser.add_argument("--methods", default=";".join(METHODS), help="Names, with ; between.")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for model in arguments.models.split(","):
        for precision in PRECISIONS.get(model, ("float32",)):
            rows += _rows_of(model, precision, arguments.methods.split(";"), device)
    parts = ("state", "gradients", "peak")
    print_table(
        ("model", "precision", "method", *(f"{part} MiB (measured)" for part in parts)),
        [[row["model"], row["precision"], row["method"], *map(_cell(row), parts)] for row in rows],
    )
    worst = {part: max(abs(row[part]["error"]) for row in rows) for part in parts}
    print("largest error:", ", ".join(f"{part} {error:.1%}" for part, error in worst.items()))
    finish("memory", {"seq_len": SEQ_LEN, "largest_error": worst, "rows": rows})


def _cell(row: dict[str, Any]) -> Any:
    def cell(part: str) -> str:
        predicted, measured = row[part]["predicted"], row[part]["measured"]
        error = row[part]["error"]
        return f"{predicted / 2**20:.1f} ({measured / 2**20:.1f}, {error:+.1%})"

    return cell


def _rows_of(
    model: str, precision: str, methods: list[str], device: torch.device
) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        source = model
        if model in CONFIGS:
            source = str(Path(folder) / "config.json")
            Path(source).write_text(json.dumps(CONFIGS[model]))
        config = TrainConfig(
            data="-",
            output="-",
            model=source,
            batch_size=MODELS[model],
            seq_len=SEQ_LEN,
            precision=precision,
            lr=1e-3,
        )
        traced = trace_model(config)
        rows = []
        for name in methods:
            method = METHODS[name]
            if "weight_rounding" in method.arguments and precision == "float32":
                continue  # nothing is rounded there
            asked = replace(config, optimizer=method.optimizer, optimizer_args=method.arguments)
            if method.optimizer == "adarankgrad":
                asked = replace(asked, energy=1.0, max_rank=method.max_rank)
            predicted = predict(asked, method, traced, device)
            measured = measure(asked, method, device)
            rows.append(
                {
                    "model": model,
                    "precision": precision,
                    "batch_size": config.batch_size,
                    "method": name,
                    "activations": {"predicted": predicted.activations},
                    "peak_phase": predicted.peak_phase,
                }
                | {
                    part: _compared(getattr(predicted, part), measured[part])
                    for part in ("state", "gradients", "peak")
                }
            )
        return rows


def _compared(predicted: int, measured: int) -> dict[str, Any]:
    return {"predicted": predicted, "measured": measured, "error": predicted / measured - 1.0}


def predict(
    config: TrainConfig, method: Method, traced: TracedModel, device: torch.device
) -> Prediction:
    """Predict a step as `adarankgrad plan` does."""
    costs: Costs
    if method.optimizer == "adamw":
        costs = adamw_costs(traced.model, device.type)
    else:
        optimizer = _optimizer_of(traced.model, config, method)
        costs = subspace_costs(optimizer, device.type, accumulates=method.accumulates)
    return Training(traced.weight_bytes, traced.traces[0], costs).predict(config.batch_size)


def measure(config: TrainConfig, method: Method, device: torch.device) -> dict[str, int]:
    """Run a few steps, and return the most that was held, in bytes."""
    model = build_model(plan_model(config, None), config.seed).to(device)
    if config.precision == "bfloat16":
        model.to(torch.bfloat16)
    model.train()
    model.config.use_cache = False
    optimizer: Any = _optimizer_of(model, config, method)
    if method.accumulates:
        optimizer.accumulate_in_backward(model, num_micro_batches=1)
    tokens = torch.randint(
        model.config.vocab_size, (config.batch_size, config.seq_len), device=device
    )
    most = {"state": 0, "gradients": 0}

    def train() -> None:
        for _ in range(NUM_STEPS):
            model(input_ids=tokens, labels=tokens).loss.backward()
            most["gradients"] = max(most["gradients"], _gradient_bytes(model, optimizer))
            optimizer.step()
            optimizer.zero_grad()
            held = sum(held_bytes(state) for state in optimizer.state.values())
            most["state"] = max(most["state"], held)

    beyond = peak_bytes(train, device)
    tensors = [*model.parameters(), *model.buffers()]
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return {**most, "peak": weights + beyond}


def _optimizer_of(model: torch.nn.Module, config: TrainConfig, method: Method) -> Any:
    if method.include is None:
        return build_optimizer(group_parameters(model, config), config)
    return build_optimizer(param_groups(model, include=method.include), config)


def _gradient_bytes(model: torch.nn.Module, optimizer: Any) -> int:
    """What gradients hold now, and the largest dense one where they are projected."""
    total = dense = 0
    for weight in model.parameters():
        grad = weight.grad
        if isinstance(grad, ProjectedGrad):
            basis, probes, columns = grad.measurement
            is_own = basis is not optimizer.state[weight]["basis"]
            held = [*grad.measured, probes, columns, *([basis] if is_own else [])]
            total += sum(tensor.numel() * tensor.element_size() for tensor in held)
            dense = max(dense, weight.numel() * weight.element_size())
        elif grad is not None:
            total += grad.numel() * grad.element_size()
    return total + dense


if __name__ == "__main__":
    main()
