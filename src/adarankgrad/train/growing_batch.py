"""``--adadagrad``: from the setting to a batch that grows by its gradient's noise."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from adarankgrad.core.gradient_noise import (
    GradientNoise,
    SampleSums,
    noise_of_samples,
    pool,
    squared_norm_of_grads,
)
from adarankgrad.core.measurement import Measured
from adarankgrad.optim.engine import SubspaceOptimizer
from adarankgrad.schedules.adadagrad import (
    AdAdaGradConfig,
    BatchSizeController,
    MicroBatchNorms,
    SampleNorms,
    per_sample_sums,
)
from adarankgrad.train.errors import TrainingError
from adarankgrad.train.method_settings import errors_of, read_method
from adarankgrad.train.methods import Method, Step
from adarankgrad.train.presets import first_line

if TYPE_CHECKING:
    from adarankgrad.train.run_config import RunConfig

_FLAG = "--adadagrad"


def adadagrad_settings(config: RunConfig) -> AdAdaGradConfig | None:
    """Return how the batch grows, or None where it does not.

    Raises:
        UserError: A setting is unknown, missing or out of range, or the batch at the start is.
    """
    settings = read_method(
        AdAdaGradConfig,
        config.adadagrad,
        _FLAG,
        needs="max_batch_size",
        advice="the largest batch in samples, such as --adadagrad max_batch_size=512",
    )
    if settings is not None:
        with errors_of(_FLAG):
            _controller(settings, config)
    return settings


def growing_batch(config: RunConfig, model: nn.Module, optimizer: Optimizer) -> GrowingBatch | None:
    """Return the method that lets the batch grow, where the settings ask for it.

    Raises:
        UserError: It cannot: the model's samples cannot be told apart.
    """
    settings = adadagrad_settings(config)
    if settings is None:
        return None
    with errors_of(_FLAG):
        return GrowingBatch(_controller(settings, config), model, optimizer)


def _controller(settings: AdAdaGradConfig, config: RunConfig) -> BatchSizeController:
    return BatchSizeController(
        settings,
        micro_batch_size=config.batch_size,
        num_micro_batches=config.gradient_accumulation,
    )


class GrowingBatch(Method):
    """Measures the noise of a step's gradient, and lets the next steps' batches grow by it.

    Where gradients are projected in the backward pass, micro-batches and mean are compared by
    what is measured of them: coordinates in the basis, and random combinations of the rest,
    whose squared norms are right on average.

    Args:
        controller: Decides on the batch.
        model: What is trained.
        optimizer: Of its weights.

    Raises:
        ValueError: The model's samples cannot be told apart.
    """

    name = "adadagrad"

    def __init__(
        self, controller: BatchSizeController, model: nn.Module, optimizer: Optimizer
    ) -> None:
        self.controller = controller
        self._accumulations = (
            optimizer.accumulations if isinstance(optimizer, SubspaceOptimizer) else ()
        )
        self._norms = self._reader(model)
        self._reading = ExitStack()
        self._is_testing = False
        self._batch_size = 0
        self._variance_sum = 0.0
        self._signal_sum = 0.0

    def num_micro_batches(self, usual: int) -> int:
        """Return what the tests so far ask for."""
        return self.controller.num_micro_batches

    def begin_step(self, step: Step) -> None:
        """Watch gradients, where a test is due; what is left of the data at the end has none."""
        for accumulation in self._accumulations:
            accumulation.num_micro_batches = len(step.micro_batches)
        is_whole = len(step.micro_batches) == self.controller.num_micro_batches
        self._is_testing = is_whole and self.controller.is_test_due
        if self._is_testing and self._norms is not None:
            self._reading.enter_context(self._norms)
            for accumulation in self._accumulations:
                self._reading.enter_context(accumulation.watch(self._add))

    def end_backward(self, step: Step) -> None:
        """Test, and decide on the next step."""
        self._reading.close()
        self._batch_size = max(self._batch_size, step.num_samples)
        noise = self._noise(step) if self._is_testing else None
        self.controller.end_step(noise)
        if noise is not None and math.isfinite(noise.variance + noise.squared_mean):
            self._variance_sum += noise.variance
            self._signal_sum += noise.squared_mean - noise.variance / noise.num_samples

    def abandon_step(self) -> None:
        """Stop watching."""
        self._reading.close()

    def metrics(self) -> dict[str, float | None]:
        """Return the batch, and the noise scale (`noise_scale`) of the tests since the last line.

        The noise scale is S over the squared norm of the true gradient, both averaged first
        (McCandlish et al. 2018); None without a test, or where noise hides the gradient.
        """
        variance, signal = self._variance_sum, self._signal_sum
        self._variance_sum = self._signal_sum = 0.0
        return {
            "batch_size": self._batch_size,
            "noise_scale": variance / signal if signal > 0 else None,
        }

    def summary(self) -> dict[str, float | None]:
        """Return the last batch."""
        return {"batch_size": self._batch_size}

    def state_dict(self) -> dict[str, Any]:
        """Return the controller's state and open sums, as plain numbers."""
        return self.controller.state_dict() | {
            "batch_size": self._batch_size,
            "variance_sum": self._variance_sum,
            "signal_sum": self._signal_sum,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.controller.load_state_dict(state)
        self._batch_size = state["batch_size"]
        self._variance_sum = state["variance_sum"]
        self._signal_sum = state["signal_sum"]

    def _reader(self, model: nn.Module) -> MicroBatchNorms | SampleNorms | None:
        statistics = self.controller.config.statistics
        if statistics == "per-sample":
            return None
        if statistics == "norms":
            return SampleNorms(model)
        projected = {param for each in self._accumulations for param in each.params}
        return MicroBatchNorms(param for param in model.parameters() if param not in projected)

    def _add(self, measured: Measured) -> None:
        assert isinstance(self._norms, MicroBatchNorms)
        self._norms.add(measured.squared_norm().double().sum())

    def _noise(self, step: Step) -> GradientNoise:
        squared_mean = squared_norm_of_grads(step.model.parameters())
        try:
            if self._norms is None:
                return noise_of_samples(self._sums(step), squared_mean)
            return self._norms.noise(len(step.micro_batches), step.num_samples, squared_mean)
        except ValueError as error:
            statistics = self.controller.config.statistics
            raise TrainingError(
                f"--adadagrad statistics={statistics} does not do for this model: "
                f"{first_line(error)}."
            ) from error

    def _sums(self, step: Step) -> SampleSums:
        grads = {
            name: param.grad
            for name, param in step.model.named_parameters()
            if param.grad is not None
        }
        total = SampleSums(0, 0.0, 0.0, 0.0)
        for batch in step.micro_batches:
            sums = per_sample_sums(
                step.model,
                step.share,
                batch,
                grads,
                num_samples=step.num_samples,
                chunk_size=self.controller.config.chunk_size,
            )
            total = pool(total, sums)
        return total
