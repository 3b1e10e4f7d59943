"""The norm of every micro-batch's gradient, read in the backward pass before it is added up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...core.gradient_noise import (
    GradientNoise,
    noise_of_shares,
    squared_norm,
    squared_norm_of_grads,
)
from .workers import add_over_workers


class MicroBatchNorms:
    """Adds up the squared norms of the gradients of a step's micro-batches (DDP-Norm's statistic).

    A context around the backward passes of a step. A weight's gradient is read by a hook as it
    becomes final, before autograd adds it to ``.grad`` and before data parallel training averages
    it over workers; the mean's norm is read from ``.grad`` afterwards. Nothing is changed, and no
    gradient is kept.

    Args:
        params: weights to watch, those that are trained; whole tensors, not shards.
        group: process group of the workers; None: the default one, if there is any.

    Raises:
        ValueError: a weight is sharded (FSDP).

    Memory: one number a device. Time: every gradient is read once more, and the step's once.
    Traffic: three numbers a step.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(4, 1)
        >>> norms = MicroBatchNorms(layer.parameters())
        >>> with norms:
        ...     for part in torch.randn(8, 4).split(2):
        ...         (layer(part).square().mean() / 4).backward()
        >>> noise = norms.noise(num_micro_batches=4, num_samples=8)
    """

    def __init__(
        self, params: Iterable[nn.Parameter], group: dist.ProcessGroup | None = None
    ) -> None:
        self.params = [param for param in params if param.requires_grad]
        self.group = group
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._sums: dict[torch.device, Tensor] = {}
        self._num_reads: Counter[int] = Counter()
        if any(hasattr(param, "placements") for param in self.params):
            raise ValueError(
                "a weight is sharded, and each worker sees a part of its gradient only; the noise "
                "of micro-batches is measured under DDP or on one worker"
            )

    def __enter__(self) -> MicroBatchNorms:
        """Start to read, from zero."""
        self._sums.clear()
        self._num_reads.clear()
        self._handles = [
            param.register_hook(self._reader(index))  # type: ignore[no-untyped-call]
            for index, param in enumerate(self.params)
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave gradients alone from now on."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def add(self, squared: Tensor) -> None:
        """Add the squared norm, no axes, of a gradient that a hook cannot see."""
        held = self._sums.get(squared.device)
        self._sums[squared.device] = squared if held is None else held + squared

    def noise(
        self,
        num_micro_batches: int,
        num_samples: int,
        squared_mean: float | None = None,
    ) -> GradientNoise:
        """Return mean and spread of the gradients that were read; synchronises the device.

        Call it after the last backward pass and before gradients are clipped or unscaled. All
        gradients may have a common factor, such as a loss scale.

        Args:
            num_micro_batches: of this worker, which share the loss of a step evenly; over all
                workers at least 2.
            num_samples: in the batch, over all workers.
            squared_mean: ‖ḡ‖²; None: read from ``.grad``, which is the sum of this worker's
                shares, or under DDP the mean over workers of these.

        Raises:
            ValueError: a weight's gradient came in more parts than there are micro-batches, workers
                have different numbers of them, or there is but one.
        """
        if self._num_reads and max(self._num_reads.values()) > num_micro_batches:
            raise ValueError(
                f"a weight got {max(self._num_reads.values())} gradients in {num_micro_batches} "
                "micro-batches: reentrant checkpointing brings a gradient in parts; use it with "
                "use_reentrant=False"
            )
        total = sum(float(each) for each in self._sums.values())
        total, num_workers = add_over_workers(
            total, num_micro_batches, self.params[0].device, self.group
        )
        if squared_mean is None:
            squared_mean = squared_norm_of_grads(self.params)
        num_parts = num_micro_batches * num_workers
        if num_parts < 2:
            raise ValueError("one micro-batch has no spread: accumulate at least two")
        return noise_of_shares(total, squared_mean, num_parts, num_samples)

    def _reader(self, index: int) -> Callable[[Tensor], None]:
        def read(grad: Tensor) -> None:
            self._num_reads[index] += 1
            self.add(squared_norm([grad.detach()]))

        return read
