"""AdAdaGrad: steps and samples to a loss, with batches that grow and with constant ones.

The loss to reach is the higher of the last losses of the small and the large constant batch, at the
same seed, so that both reach it; and a loss that is easier by `EASIER`, since rates fall with the
samples seen, so that a last loss takes most of a run. The norm test compares micro-batches of 4.
With the default eta of 0.1 it asks for the largest batch at once, which is the constant one.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from adarankgrad.schedules.adadagrad import AdAdaGradConfig, BatchSizeController, MicroBatchNorms
from adarankgrad.train.record import count_to_loss
from harness import print_table
from small_schedules.language_model import Blocks, Plain, train
from small_schedules.study import (
    Result,
    Run,
    Store,
    Study,
    as_text,
    over_seeds,
    rate_text,
)

NAME = "adadagrad"
SMALL, LARGE = "constant 8", "constant 64"
RATES, HIGHER_RATES = (4e-3, 8e-3, 16e-3), (8e-3, 16e-3, 32e-3)
SAMPLES, LAYERS, EVALUATIONS = 4096, 2, 32
EASIER = 0.5  # nats a token
RUNS: dict[str, tuple[Run, Sequence[float]]] = {
    SMALL: ({"micro_batch": 8, "num_micro_batches": 1}, RATES),
    LARGE: ({"micro_batch": 64, "num_micro_batches": 1}, HIGHER_RATES),
    "8 to 64, eta 1": ({"micro_batch": 4, "num_micro_batches": 2, "eta": 1.0}, RATES),
    "8 to 64, eta 0.5": ({"micro_batch": 4, "num_micro_batches": 2, "eta": 0.5}, HIGHER_RATES),
}


class Growing(Plain):
    """Lets the batch grow by the norm test, at every step."""

    def __init__(self, run: Run, model: nn.Module, optimizer: Optimizer) -> None:
        self._control = BatchSizeController(
            AdAdaGradConfig(max_batch_size=64, eta=run["eta"]),
            micro_batch_size=run["micro_batch"],
            num_micro_batches=run["num_micro_batches"],
        )
        self._norms = MicroBatchNorms(model.parameters())

    @property
    def num_micro_batches(self) -> int:
        """What the tests so far ask for."""
        return self._control.num_micro_batches

    def passes(self) -> AbstractContextManager[Any]:
        """Watch the gradients of micro-batches, where a test is due."""
        return self._norms if self._control.is_test_due else nullcontext()

    def end_step(self, num_samples: int) -> None:
        """Test, unless the samples ended within the step."""
        is_tested = self._control.is_test_due and num_samples == self._control.batch_size
        count = self.num_micro_batches
        self._control.end_step(self._norms.noise(count, num_samples) if is_tested else None)


def work(run: Run, blocks: Blocks) -> Result:
    """Train once."""
    return train(run, blocks, Growing if "eta" in run else Plain)


def measure(blocks: Blocks, store: Store, seeds: list[int], scale: float) -> dict[str, Any]:
    """Train with each batch; return steps and samples to the loss."""
    study = Study(NAME, store, seeds, partial(work, blocks=blocks))
    samples = max(128, round(SAMPLES * scale) // 64 * 64)
    shared = {"samples": samples, "layers": LAYERS, "evaluations": EVALUATIONS}
    found = {
        label: study.search({"label": label, **shared, **run}, rates)
        for label, (run, rates) in RUNS.items()
    }
    ends = zip(found[SMALL]["runs"], found[LARGE]["runs"], strict=True)
    targets = [max(small["score"], large["score"]) for small, large in ends]
    methods = {label: _figures(each, targets) for label, each in found.items()}
    return {"settings": shared, "targets": targets, "methods": methods}


def _figures(found: dict[str, Any], targets: list[float]) -> dict[str, Any]:
    runs = found.pop("runs")
    pairs = list(zip(runs, targets, strict=True))
    return {
        **found,
        "val_loss": over_seeds([run["score"] for run in runs]),
        "steps": over_seeds([run["rows"][-1]["step"] for run in runs]),
        **_to_loss("loss", pairs),
        **_to_loss("easier", [(run, loss + EASIER) for run, loss in pairs]),
        "curves": [run["rows"] for run in runs],
    }


def _to_loss(name: str, pairs: list[tuple[Result, float]]) -> dict[str, Any]:
    return {
        f"{what}_to_{name}": over_seeds(
            [count_to_loss(run["rows"], loss, key) for run, loss in pairs]
        )
        for what, key in (("steps", "step"), ("samples", "samples"))
    }


def show(result: dict[str, Any]) -> None:
    """Print a row a batch."""
    keys = [f"{what}_to_{name}" for name in ("loss", "easier") for what in ("steps", "samples")]
    rows = [
        [
            label,
            rate_text(m),
            as_text(m["val_loss"]),
            *(as_text(m[key], 0) for key in ("steps", *keys)),
        ]
        for label, m in result["methods"].items()
    ]
    names = [key.replace("_", " ") for key in keys]
    print_table(["batch", "lr", "val loss", "steps", *names], rows)
