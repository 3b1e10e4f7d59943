"""What methods that change the loop of a run do around its steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Step:
    """A step whose data are at hand.

    Attributes:
        model: What is trained.
        micro_batches: Inputs, on the device of the model.
        share: From a function to call as the model, and inputs, to their share in the step's loss:
            shares of all samples add up to it.
        num_steps_before: Steps taken before it.
        num_tokens_before: Tokens seen before it, without padding.
    """

    model: nn.Module
    micro_batches: list[Batch]
    share: Callable[[Callable[..., Any], Batch], Tensor]
    num_steps_before: int
    num_tokens_before: int

    @property
    def num_samples(self) -> int:
        """Samples of all micro-batches."""
        return sum(map(count_samples, self.micro_batches))


class Method:
    """One method of a run; every hook does nothing unless it is overridden.

    What a method holds is saved in checkpoints, as the file ``{name}.pt``.
    """

    name: ClassVar[str]

    def num_micro_batches(self, usual: int) -> int:
        """Return how many micro-batches the next step takes, given how many it would."""
        return usual

    @property
    def is_whole(self) -> bool:
        """Whether the model is one that a run may leave."""
        return True

    def begin_step(self, step: Step) -> None:
        """Act before the first forward pass of a step."""

    def end_backward(self, step: Step) -> None:
        """Act when all gradients of a step are added up, and not clipped yet."""

    def abandon_step(self) -> None:
        """Undo `begin_step` where an error ended the step before `end_backward`."""

    def metrics(self) -> dict[str, float | None]:
        """Return what to add to the line of a logged step; called once a line."""
        return {}

    def summary(self) -> dict[str, float | None]:
        """Return what to add to summary.json."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""


def count_samples(inputs: Batch) -> int:
    """Return the samples of a batch."""
    return len(inputs["input_ids"])
