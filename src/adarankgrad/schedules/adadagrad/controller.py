"""When the batch grows, and by how much: the loop of AdAdaGrad around its tests."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ...core.checks import as_number, check_choice, check_count
from ...core.gradient_noise import (
    GradientNoise,
    inner_product_test_size,
    norm_test_size,
    orthogonality_test_size,
)

Test = Literal["norm", "inner-product", "augmented"]
Statistics = Literal["micro-batches", "per-sample", "norms"]


@dataclass(frozen=True)
class AdAdaGradConfig:
    """How the batch grows.

    Attributes:
        max_batch_size: the largest batch, in samples.
        eta: tolerance of the norm test (η) and of the inner-product test (θ), above 0; infinite:
            the batch stays as it is, and only its noise is measured.
        nu: tolerance of the orthogonality test; None: ``eta``.
        test: ``"norm"``; ``"inner-product"``; or ``"augmented"``, inner-product and orthogonality.
        statistics: what tests are computed from: ``"micro-batches"``, the norms of their gradients
            (DDP-Norm); ``"norms"``, of each sample's gradient; ``"per-sample"``, norms and
            inner products of each sample's gradient. All but the norm test need ``"per-sample"``.
        test_every: steps between two tests.
        chunk_size: samples whose gradients are held at once, with ``"per-sample"``.

    Raises:
        ValueError: a setting is out of range, unknown, or of no use to the test.
    """

    max_batch_size: int
    eta: float = 0.1
    nu: float | None = None
    test: Test = "norm"
    statistics: Statistics = "micro-batches"
    test_every: int = 1
    chunk_size: int = 1

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "test_every", "chunk_size"):
            check_count(name, getattr(self, name), low=1)
        _check_tolerance("eta", self.eta)
        check_choice("test", self.test, get_args(Test))
        check_choice("statistics", self.statistics, get_args(Statistics))
        if self.nu is not None:
            _check_tolerance("nu", self.nu)
            if self.test != "augmented":
                raise ValueError(
                    f"nu is of test='augmented', and test is {self.test!r}: leave it out"
                )
        if self.test != "norm" and self.statistics != "per-sample":
            raise ValueError(
                f"test={self.test!r} needs each sample's inner product with the mean gradient: use "
                f"statistics='per-sample', not {self.statistics!r}"
            )

    def requested_batch_size(self, noise: GradientNoise) -> float:
        """Return the smallest batch that passes the test, in samples, not rounded."""
        if self.test == "norm":
            return norm_test_size(noise, self.eta)
        size = inner_product_test_size(noise, self.eta)
        if self.test == "augmented":
            nu = self.eta if self.nu is None else self.nu
            size = max(size, orthogonality_test_size(noise, nu))
        return size


class BatchSizeController:
    """Decides how many micro-batches a step accumulates. Their number never falls.

    Differs from the paper: a micro-batch keeps its size, and the batch is a whole number of them,
    rounded up, where the authors' code grows the micro-batch first.

    Args:
        config: how the batch grows.
        micro_batch_size: samples in a micro-batch, over all workers.
        num_micro_batches: with which a run starts.

    Attributes:
        num_micro_batches: of the next step.
        num_steps: steps taken.

    Raises:
        ValueError: the cap is below the start, or the start is too small for the statistics.

    Example:
        >>> from adarankgrad.core.gradient_noise import GradientNoise
        >>> config = AdAdaGradConfig(max_batch_size=64, eta=0.5)
        >>> controller = BatchSizeController(config, micro_batch_size=4, num_micro_batches=2)
        >>> controller.end_step(GradientNoise(8, squared_mean=1.0, variance=4.5))
        >>> controller.batch_size  # 4.5 / 0.5² = 18 samples, in fours
        20
    """

    def __init__(
        self, config: AdAdaGradConfig, *, micro_batch_size: int, num_micro_batches: int
    ) -> None:
        self.config = config
        self.micro_batch_size = micro_batch_size
        self.num_micro_batches = num_micro_batches
        self.num_steps = 0
        self._max_micro_batches = config.max_batch_size // micro_batch_size
        if self._max_micro_batches < num_micro_batches:
            raise ValueError(
                f"max_batch_size = {config.max_batch_size} is below the batch at the start, "
                f"{num_micro_batches} x {micro_batch_size} samples"
            )
        if config.statistics == "micro-batches" and num_micro_batches < 2:
            raise ValueError(
                "statistics='micro-batches' compares the micro-batches of a step, and there is "
                "one: accumulate at least two, or use statistics='norms' or 'per-sample'"
            )
        if self.batch_size < 2:
            raise ValueError("a batch of one sample has no spread: start with at least two")

    @property
    def batch_size(self) -> int:
        """Samples in the next step."""
        return self.num_micro_batches * self.micro_batch_size

    @property
    def is_test_due(self) -> bool:
        """Whether to measure the noise of the next step; never again once the cap is reached."""
        is_capped = self.num_micro_batches >= self._max_micro_batches
        return not is_capped and (self.num_steps + 1) % self.config.test_every == 0

    def end_step(self, noise: GradientNoise | None = None) -> None:
        """Count a step, and let the batch grow where its noise asks for it.

        Args:
            noise: measured at the weights before the step; None without a test. Noise that is not
                finite, as of a step that overflowed, changes nothing.
        """
        self.num_steps += 1
        if noise is None or not math.isfinite(noise.variance + noise.squared_mean):
            return
        request = self.config.requested_batch_size(noise)
        wanted = min(request / self.micro_batch_size, float(self._max_micro_batches))
        self.num_micro_batches = max(self.num_micro_batches, math.ceil(wanted))

    def state_dict(self) -> dict[str, int]:
        """Return what a checkpoint must hold, as plain numbers."""
        return {"num_micro_batches": self.num_micro_batches, "num_steps": self.num_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            ValueError: it is of a run with a higher cap.
        """
        if state["num_micro_batches"] > self._max_micro_batches:
            raise ValueError(
                f"the saved batch of {state['num_micro_batches']} micro-batches is above "
                f"max_batch_size = {self.config.max_batch_size}"
            )
        self.num_micro_batches = int(state["num_micro_batches"])
        self.num_steps = int(state["num_steps"])


def _check_tolerance(name: str, value: Any) -> None:
    if not as_number(value) > 0:
        raise ValueError(f"{name} must be above 0, inf included, got {value!r}")
