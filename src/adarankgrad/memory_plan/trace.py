"""One forward and backward pass of a model that holds no data, and what is alive at each moment.

The model's tensors are fake: meta tensors that say they are on the CPU, so that the operators a CPU
would run are chosen (flash attention within ``scaled_dot_product_attention``), under autocast too.
Nothing is computed, and each storage's size is counted from its birth to its death.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from adarankgrad.memory_plan.live_bytes import LiveBytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IntArray = NDArray[np.int64]

_NUM_SEQUENCES = 65537
"""Sequences of the traced pass: a prime that no other size has as a factor, so that a storage whose
bytes it divides is one that grows with the batch."""


@dataclass(frozen=True)
class Gradient:
    """A weight's gradient, at the moment when it becomes final.

    Attributes:
        moment: Index into the trace.
        name: The weight's.
        num_bytes: Of the dense gradient, which is alive at that moment.
    """

    moment: int
    name: str
    num_bytes: int


@dataclass(frozen=True)
class Trace:
    """What a forward and backward pass holds besides weights, at each change.

    A gradient is alive until its moment and freed there; who keeps it adds it from there on.

    Attributes:
        constant: Bytes that do not depend on the batch, (moments,) int64.
        per_sequence: Bytes for each sequence of a batch, (moments,) int64.
        gradients: In the order in which they become final.
    """

    constant: IntArray
    per_sequence: IntArray
    gradients: tuple[Gradient, ...]

    def live(self, batch_size: int) -> IntArray:
        """Bytes alive at each moment for a batch of this many sequences."""
        return self.constant + batch_size * self.per_sequence


class _BytesOverTime(LiveBytes):  # type: ignore[no-untyped-call]
    """Keeps what is alive after every change, apart by what the batch multiplies."""

    def __init__(self, known: Iterator[Tensor]) -> None:
        super().__init__(known)
        self._alive = [0, 0]
        self.moments: list[tuple[int, int]] = []

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator; the fake attention lays its result out as its query, no kernel does."""
        result = func(*args, **kwargs)
        if func is not torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            return result
        attention, *rest = result
        batch, heads, length, width = attention.shape
        return attention.new_empty(batch, length, heads, width).transpose(1, 2), *rest

    def change(self, num_bytes: int) -> None:
        """Count a storage, and note what is alive now."""
        grows_with_batch = num_bytes % _NUM_SEQUENCES == 0
        self._alive[grows_with_batch] += num_bytes
        self.moments.append((self._alive[0], self._alive[1] // _NUM_SEQUENCES))


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Make every tensor that is created within this context a fake one."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def materialize(model: PreTrainedModel) -> None:
    """Turn a model on the meta device into a fake one on the CPU, within `fake_tensors`."""
    model.to_empty(device=torch.device("cpu"))
    model.tie_weights()
    model.config.use_cache = False
    model.train()


@contextlib.contextmanager
def _unpacked_sequences() -> Iterator[None]:
    """Keep transformers from building masks because it cannot see whether sequences are packed.

    It reads that from the positions' values, which fake ones do not have.
    """
    from transformers import masking_utils

    finder = "find_packed_sequence_indices"
    original = getattr(masking_utils, finder, None)
    if original is None:
        yield
        return
    setattr(masking_utils, finder, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masking_utils, finder, original)


def trace_training(model: nn.Module, seq_len: int, *, is_mixed: bool = False) -> Trace:
    """Trace the loss of a causal language model and its backward pass.

    Args:
        model: Of transformers, on fake tensors, within `fake_tensors`; left without gradients.
        seq_len: Tokens of a sequence.
        is_mixed: Run under bfloat16 autocast.
    """
    counter = _BytesOverTime(iter([*model.parameters(), *model.buffers()]))
    gradients: list[Gradient] = []

    def note(name: str, weight: nn.Parameter) -> None:
        assert weight.grad is not None
        num_bytes = weight.grad.untyped_storage().nbytes()
        gradients.append(Gradient(len(counter.moments) - 1, name, num_bytes))
        weight.grad = None

    handles = [
        weight.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            functools.partial(note, name)
        )
        for name, weight in model.named_parameters()
        if weight.requires_grad
    ]
    with counter, _unpacked_sequences():
        tokens = torch.zeros(_NUM_SEQUENCES, seq_len, dtype=torch.long)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
    for handle in handles:
        handle.remove()
    constant, per_sequence = np.array(counter.moments, dtype=np.int64).T
    return Trace(constant, per_sequence, tuple(gradients))
