"""How little memory training in bfloat16 needs beside weights and activations.

    .venv/bin/python benchmarks/memory_targets.py                      # 350m to 7b, two minutes
    .venv/bin/python benchmarks/memory_targets.py --measure            # and 350m run, half an hour
    .venv/bin/python benchmarks/memory_targets.py --models 350m --batch 8

By prediction, as `adarankgrad plan` makes it; with ``--measure`` also the peak of two steps of the
recommended setting on random weights and tokens, the second of which holds the most: it finds the
first bases. Gradients are projected in the backward pass, over several micro-batches, so that what
is accumulated is there at the peak. State and basis are 8-bit, weights are rounded at random or
held exact by an 8-bit correction. Published numbers beside: AdamW in mixed precision 16 bytes a
parameter, FlashOptim 7, or 5 with gradient release.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import Any

import torch

from adarankgrad import AdaRankGrad, param_groups
from adarankgrad.memory_plan.costs import adamw_costs, subspace_costs
from adarankgrad.memory_plan.methods import TracedModel, trace_model
from adarankgrad.memory_plan.predict import Prediction, Training
from adarankgrad.train.config import TrainConfig
from adarankgrad.train.presets import build_model, checkpoint_activations, plan_model
from allocations import peak_bytes
from harness import finish, print_table

MODELS = ("350m", "1b", "3b", "7b")
MEASURED = "350m"
SEQ_LEN = 1024
LARGEST_SHARE = 0.15
LARGEST_BYTES = {"stochastic": 2.5, "corrected": 3.5}
FLOAT32 = {"state_dtype": "float32", "basis_dtype": "float32"}


@dataclass(frozen=True)
class Setting:
    """A way to train in little memory, as it differs from `AdaRankGrad.low_memory`.

    Attributes:
        name: In the table.
        options: Of the optimizer.
        projects_embeddings: False leaves embeddings and head to AdamW.
    """

    name: str
    options: dict[str, Any]
    projects_embeddings: bool = True


RECOMMENDED = Setting("recommended: 8-bit, all matrices, rank 12", {})
SETTINGS = (
    Setting("float32 state, blocks, quarter rank", {**FLOAT32, "max_rank": 0.25}, False),
    Setting("float32 state, blocks, rank 32", {**FLOAT32, "max_rank": 32}, False),
    Setting("8-bit, blocks, rank 32", {"max_rank": 32}, False),
    Setting("8-bit, all matrices, rank 64", {"max_rank": 64}),
    Setting("8-bit, all matrices, rank 32", {"max_rank": 32}),
    Setting("8-bit, all matrices, rank 16", {"max_rank": 16}),
    RECOMMENDED,
)


def build_optimizer(model: torch.nn.Module, setting: Setting, rounding: str) -> AdaRankGrad:
    """Build the optimizer of a setting, with ranks at their ceiling."""
    groups = param_groups(model, embeddings={} if setting.projects_embeddings else None)
    options = {**setting.options, "weight_rounding": rounding, "energy": 1.0}
    return AdaRankGrad.low_memory(groups, **options)


def main() -> None:
    """Print each setting's bytes beside the targets."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help="Names, with commas between.")
    parser.add_argument("--batch", type=int, default=4, help="Sequences of a micro-batch.")
    parser.add_argument("--micro-batches", type=int, default=4, help="Backward passes of a step.")
    parser.add_argument("--measure", action="store_true", help=f"Run {MEASURED} as well.")
    arguments = parser.parse_args()
    rows = [
        row
        for model in arguments.models.split(",")
        for row in _rows_of(model, arguments.batch, arguments.micro_batches)
    ]
    header = ("model", "setting", "rounding", "beside/weights", "bytes/parameter", "met")
    print_table(
        header,
        [
            [
                row["model"],
                row["setting"],
                row["rounding"],
                f"{row['share']:.3f}",
                f"{row['bytes_per_parameter']:.2f}",
                "yes" if row["is_met"] else "no",
            ]
            for row in rows
        ],
    )
    measured = [measure(rounding) for rounding in LARGEST_BYTES] if arguments.measure else []
    for row in measured:
        print(
            f"{row['model']}, {row['rounding']}: peak {row['peak'] / 2**20:.1f} MiB, predicted "
            f"{row['predicted_peak'] / 2**20:.1f}; beside {row['share']:.3f}, "
            f"{row['bytes_per_parameter']:.2f} bytes a parameter"
        )
    finish(
        "memory_targets",
        {
            "seq_len": SEQ_LEN,
            "batch_size": arguments.batch,
            "micro_batches": arguments.micro_batches,
            "activation_checkpointing": True,
            "rows": rows,
            "measured": measured,
        },
    )


def _rows_of(model: str, batch_size: int, micro_batches: int) -> list[dict[str, Any]]:
    config = TrainConfig(data="-", output="-", model=model, seq_len=SEQ_LEN, precision="bfloat16")
    traced = trace_model(config)
    rows = [_adamw_row(model, batch_size, micro_batches)]
    for setting in SETTINGS:
        for rounding in LARGEST_BYTES:
            optimizer = build_optimizer(traced.model, setting, rounding)
            costs = subspace_costs(optimizer, "cuda", accumulates=True)
            training = Training(traced.weight_bytes, _checkpointed(traced), costs, micro_batches)
            predicted = training.predict(batch_size)
            names = {"setting": setting.name, "rounding": rounding}
            rows.append({"model": model, **names, **_numbers(predicted, traced, rounding)})
    return rows


def _adamw_row(model: str, batch_size: int, micro_batches: int) -> dict[str, Any]:
    config = TrainConfig(
        data="-", output="-", model=model, seq_len=SEQ_LEN, precision="mixed-bfloat16"
    )
    traced = trace_model(config)
    costs = adamw_costs(traced.model, "cuda")
    training = Training(traced.weight_bytes, _checkpointed(traced), costs, micro_batches)
    names = {"setting": "AdamW, mixed precision", "rounding": "float32"}
    return {"model": model, **names, **_numbers(training.predict(batch_size), traced, "float32")}


def _checkpointed(traced: TracedModel) -> Any:
    trace = traced.traces[1]
    assert trace is not None
    return trace


def _numbers(predicted: Prediction, traced: TracedModel, rounding: str) -> dict[str, Any]:
    num_weights = sum(weight.numel() for weight in traced.model.parameters())
    beside = predicted.peak - predicted.activations
    # The correction belongs to the weights: with it they have 24 bits.
    correction = num_weights if rounding == "corrected" else 0
    share = (beside - predicted.weights - correction) / predicted.weights
    allowed = LARGEST_BYTES.get(rounding, 0.0)
    return {
        **predicted.as_dict(),
        "share": share,
        "bytes_per_parameter": beside / num_weights,
        "is_met": share <= LARGEST_SHARE and beside / num_weights <= allowed,
    }


def measure(rounding: str, *, batch_size: int = 1, micro_batches: int = 2) -> dict[str, Any]:
    """Run two steps of the recommended setting, and compare the most that was held.

    Activations are the predicted ones, which `memory.py` compares with measured peaks.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = TrainConfig(
        data="-", output="-", model=MEASURED, seq_len=SEQ_LEN, precision="bfloat16"
    )
    traced = trace_model(config)
    costs = subspace_costs(
        build_optimizer(traced.model, RECOMMENDED, rounding), device.type, accumulates=True
    )
    training = Training(traced.weight_bytes, _checkpointed(traced), costs, micro_batches)
    predicted = training.predict(batch_size)

    model: Any = build_model(plan_model(config, None), config.seed).to(torch.bfloat16).to(device)
    model.train()
    model.config.use_cache = False
    checkpoint_activations(model)
    optimizer = build_optimizer(model, RECOMMENDED, rounding)
    optimizer.accumulate_in_backward(model, num_micro_batches=micro_batches)
    tokens = torch.randint(model.config.vocab_size, (batch_size, SEQ_LEN), device=device)

    def train() -> None:
        for _ in range(2):
            for _ in range(micro_batches):
                (model(input_ids=tokens, labels=tokens).loss / micro_batches).backward()
            optimizer.step()
            optimizer.zero_grad()

    peak = predicted.weights + peak_bytes(train, device)
    return {
        "model": MEASURED,
        "setting": RECOMMENDED.name,
        "rounding": rounding,
        "batch_size": batch_size,
        "micro_batches": micro_batches,
        "state": optimizer.report().state_bytes,
        "predicted_peak": predicted.peak,
        "error": predicted.peak / peak - 1.0,
        **_numbers(replace(predicted, peak=peak), traced, rounding),
    }


if __name__ == "__main__":
    main()
