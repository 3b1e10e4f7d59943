"""Activations of a forward and backward pass: predicted by ``adarankgrad plan``, and measured.

    .venv/bin/python benchmarks/activations.py                  # three minutes on two cores
    .venv/bin/python benchmarks/activations.py --models 350m

No optimizer; each gradient is freed as it becomes final, so that what is measured beyond the
weights is what the passes hold. Bfloat16, random weights and tokens.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from adarankgrad.memory_plan.methods import trace_model
from adarankgrad.train.config import TrainConfig
from adarankgrad.train.presets import build_model, checkpoint_activations, plan_model
from allocations import peak_bytes
from harness import finish, print_table

MODELS = {"small-llama": (8, 256), "20m": (4, 256), "350m": (1, 1024)}  # batch, tokens


def main() -> None:
    """Print predicted beside measured, and keep both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help="Names, with commas between.")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [row for model in arguments.models.split(",") for row in _rows_of(model, device)]
    print_table(
        ("model", "batch", "checkpointing", "MiB", "measured", "error"),
        [
            [
                row["model"],
                f"{row['batch_size']} x {row['seq_len']}",
                row["checkpointing"],
                f"{row['predicted'] / 2**20:.1f}",
                f"{row['measured'] / 2**20:.1f}",
                f"{row['error']:+.1%}",
            ]
            for row in rows
        ],
    )
    finish("activations", {"rows": rows})


def _rows_of(name: str, device: torch.device) -> list[dict[str, Any]]:
    batch_size, seq_len = MODELS[name]
    config = TrainConfig(data="-", output="-", model=name, seq_len=seq_len, precision="bfloat16")
    rows = []
    for is_checkpointed, trace in enumerate(trace_model(config).traces):
        assert trace is not None
        predicted = int(trace.live(batch_size).max())
        measured = _measure(config, batch_size, device, is_checkpointed=bool(is_checkpointed))
        rows.append(
            {
                "model": name,
                "batch_size": batch_size,
                "seq_len": seq_len,
                "checkpointing": bool(is_checkpointed),
                "predicted": predicted,
                "measured": measured,
                "error": predicted / measured - 1.0,
            }
        )
    return rows


def _measure(
    config: TrainConfig, batch_size: int, device: torch.device, *, is_checkpointed: bool
) -> int:
    model: Any = build_model(plan_model(config, None), config.seed).to(torch.bfloat16).to(device)
    model.train()
    model.config.use_cache = False
    if is_checkpointed:
        checkpoint_activations(model)
    for weight in model.parameters():
        weight.register_post_accumulate_grad_hook(_free)
    tokens = torch.randint(model.config.vocab_size, (batch_size, config.seq_len), device=device)
    return peak_bytes(lambda: model(input_ids=tokens, labels=tokens).loss.backward(), device)


def _free(weight: torch.Tensor) -> None:
    weight.grad = None


if __name__ == "__main__":
    main()
