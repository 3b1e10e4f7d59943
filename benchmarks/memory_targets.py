"""How little memory training in bfloat16 needs beside weights and activations, by prediction.

    .venv/bin/python benchmarks/memory_targets.py                      # 350m to 7b, two minutes
    .venv/bin/python benchmarks/memory_targets.py --models 350m --batch 8

The settings project gradients in the backward pass, over several micro-batches, so that what is
accumulated is there at the peak. State and basis are 8-bit, weights are rounded at random or held
exact by an 8-bit correction. Published numbers beside: AdamW in mixed precision 16 bytes a
parameter, FlashOptim 7, or 5 with gradient release.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from adarankgrad import AdaRankGrad, param_groups
from adarankgrad.memory_plan.costs import adamw_costs, subspace_costs
from adarankgrad.memory_plan.methods import TracedModel, trace_model
from adarankgrad.memory_plan.predict import Prediction, Training
from adarankgrad.train.config import TrainConfig
from harness import finish, print_table

MODELS = ("350m", "1b", "3b", "7b")
SEQ_LEN = 1024
LARGEST_SHARE = 0.15
LARGEST_BYTES = {"stochastic": 2.5, "corrected": 3.5}
EIGHT_BITS = {"state_dtype": "int8", "basis_dtype": "int8"}


@dataclass(frozen=True)
class Setting:
    """A way to train in little memory.

    Attributes:
        name: In the table.
        options: Of the optimizer.
        state: Options of how state is kept.
        include: Weights to project; None leaves embeddings and head to AdamW.
    """

    name: str
    options: dict[str, Any]
    state: dict[str, Any]
    include: str | None = None


_SKETCHED = {"basis": "sketched", "residual": "normalized"}
SETTINGS = (
    Setting("float32 state, blocks, quarter rank", {**_SKETCHED, "max_rank": 0.25}, {}),
    Setting("float32 state, blocks, rank 32", {**_SKETCHED, "max_rank": 32}, {}),
    Setting("8-bit, blocks, rank 32", {**_SKETCHED, "max_rank": 32}, EIGHT_BITS),
    Setting("8-bit, all matrices, rank 64", {**_SKETCHED, "max_rank": 64}, EIGHT_BITS, "weight"),
    Setting("8-bit, all matrices, rank 32", {**_SKETCHED, "max_rank": 32}, EIGHT_BITS, "weight"),
    Setting("8-bit, all matrices, rank 16", {**_SKETCHED, "max_rank": 16}, EIGHT_BITS, "weight"),
    Setting("8-bit, all matrices, rank 12", {**_SKETCHED, "max_rank": 12}, EIGHT_BITS, "weight"),
)


def main() -> None:
    """Print each setting's bytes beside the targets."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help="Names, with commas between.")
    parser.add_argument("--batch", type=int, default=4, help="Sequences of a micro-batch.")
    parser.add_argument("--micro-batches", type=int, default=4, help="Backward passes of a step.")
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
    finish(
        "memory_targets",
        {
            "seq_len": SEQ_LEN,
            "batch_size": arguments.batch,
            "micro_batches": arguments.micro_batches,
            "activation_checkpointing": True,
            "rows": rows,
        },
    )


def _rows_of(model: str, batch_size: int, micro_batches: int) -> list[dict[str, Any]]:
    config = TrainConfig(data="-", output="-", model=model, seq_len=SEQ_LEN, precision="bfloat16")
    traced = trace_model(config)
    rows = [_adamw_row(model, batch_size, micro_batches)]
    for setting in SETTINGS:
        groups = param_groups(traced.model, include=setting.include)
        optimizer = AdaRankGrad(groups, **setting.options)
        for rounding in LARGEST_BYTES:
            costs = subspace_costs(
                optimizer, "cuda", accumulates=True, weight_rounding=rounding, **setting.state
            )
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


if __name__ == "__main__":
    main()
