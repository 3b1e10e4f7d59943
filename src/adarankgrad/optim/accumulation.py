"""Gradients that are projected in the backward pass and never pile up."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..core.measurement import Measured, Measurement
from ..core.residual import STATELESS_RESIDUALS
from .basis_refresh import Turn
from .matrix_state import layout_for
from .matrix_step import step_outside
from .projected_grad import ProjectedGrad
from .report import named_parameters
from .sketched_refresh import plan_measurement
from .stored_state import as_computed
from .wrappers import check_is_unwrapped

if TYPE_CHECKING:
    from .engine import SubspaceOptimizer


class BackwardAccumulation:
    """Hooks that replace each projected weight's gradient by measurements as it becomes final.

    Made by `SubspaceOptimizer.accumulate_in_backward`; ``remove()`` takes the hooks away.

    Args:
        optimizer: whose weights, and whose state the measurements depend on.
        model: only its weights get hooks.
        num_micro_batches: backward passes of a step, for residuals; None without one.

    Attributes:
        optimizer: as given.
        num_micro_batches: may be set between two steps, where one has more or fewer of them.

    Raises:
        ValueError: if an option of a group needs whole gradients, the model has no projected
            weight of the optimizer, or it is one of several copies or shards.
    """

    def __init__(
        self, optimizer: SubspaceOptimizer, model: nn.Module, num_micro_batches: int | None
    ) -> None:
        _check_count(num_micro_batches)
        self.num_micro_batches = num_micro_batches
        self.check_groups(optimizer.param_groups)
        check_is_unwrapped(model)
        self.optimizer = optimizer
        self._on_measured: Callable[[Measured], None] | None = None
        members = _projected_members(optimizer)
        self._handles: dict[nn.Parameter, RemovableHandle] = {}
        for param in model.parameters():
            if param in members:
                hold = _Hook(weakref.ref(self), weakref.ref(param), *members[param])
                handle = param.register_post_accumulate_grad_hook(hold)  # type: ignore[no-untyped-call]
                self._handles[param] = handle
        if not self._handles:
            raise ValueError(
                "the model has no projected weight of this optimizer that needs a gradient; build "
                "the optimizer from the same model, after it was moved and wrapped"
            )

    @property
    def params(self) -> Iterable[nn.Parameter]:
        """The weights that have hooks."""
        return self._handles.keys()

    def remove(self) -> None:
        """Leave gradients alone from now on."""
        self.release(tuple(self._handles))

    def release(self, params: Iterable[nn.Parameter]) -> None:
        """Leave the gradients of some weights alone from now on."""
        for param in params:
            handle = self._handles.pop(param, None)
            if handle is not None:
                handle.remove()

    @contextmanager
    def watch(self, on_measured: Callable[[Measured], None]) -> Iterator[None]:
        """Be told what is measured of each gradient by itself, as it is added; one at a time.

        Args:
            on_measured: called with the measurements of one weight's gradient in one backward pass.
        """
        self._on_measured = on_measured
        try:
            yield
        finally:
            self._on_measured = None

    def tell(self, measured: Measured) -> None:
        """Pass on what was measured of a gradient, where someone watches."""
        if self._on_measured is not None:
            self._on_measured(measured)

    def check_groups(self, groups: Iterable[Mapping[str, Any]]) -> None:
        """See that no group has an option that needs whole gradients.

        Raises:
            ValueError: naming the option and what to do.
        """
        for group in groups:
            if group["project"]:
                _check_options(group, self.num_micro_batches)


class _Hook(NamedTuple):
    """What happens to the gradients of one weight.

    References are weak: what a weight's gradient refers to is hidden from the garbage collector, so
    that a circle through it would never be freed.
    """

    accumulation: weakref.ref[BackwardAccumulation]
    param: weakref.ref[nn.Parameter]
    group_index: int  # by number, since loading a state replaces the groups
    turn: Turn

    @torch.no_grad()
    def __call__(self, param: nn.Parameter) -> None:
        """Put measurements in the place of a dense gradient; later ones are added by autograd."""
        grad = param.grad
        if grad is None or isinstance(grad, ProjectedGrad) or grad.layout is not torch.strided:
            return
        accumulation = self.accumulation()
        if accumulation is None:  # its optimizer has gone
            return
        group = accumulation.optimizer.param_groups[self.group_index]
        held = ProjectedGrad(grad, layout_for(param, group), self._plan)
        held.on_measured = self._tell
        if group["residual"] != "none":
            held.on_dense = self._step_outside
        param.grad = None
        held.add_dense(grad)
        param.grad = held

    def _plan(self) -> Measurement:
        _, optimizer, param, group = self._referents()
        state = as_computed(optimizer.state_of(param, group), group)
        return plan_measurement(state, group, layout_for(param, group), self.turn)

    def _tell(self, measured: Measured) -> None:
        accumulation = self.accumulation()
        if accumulation is not None:
            accumulation.tell(measured)

    def _step_outside(self, held: ProjectedGrad, grad: Tensor) -> None:
        accumulation, optimizer, param, group = self._referents()
        count = accumulation.num_micro_batches or 1
        if held.num_added > count:
            raise ValueError(
                f"{self.turn.name} got {held.num_added} gradients since zero_grad, but its "
                f"residual is taken apart for num_micro_batches={count}: give the number of "
                "backward passes of a step. Reentrant checkpointing brings the gradient of a "
                "shared weight in parts: use it with use_reentrant=False"
            )
        state = optimizer.state_of(param, group)
        step_outside(param, state, group, self.turn.name, 1.0 / count, held, grad)

    def _referents(
        self,
    ) -> tuple[BackwardAccumulation, SubspaceOptimizer, nn.Parameter, dict[str, Any]]:
        accumulation, param = self.accumulation(), self.param()
        if accumulation is None or param is None:
            raise RuntimeError(
                f"the optimizer that {self.turn.name} holds a gradient for has gone; set its "
                ".grad to None before the next backward pass"
            )
        optimizer = accumulation.optimizer
        return accumulation, optimizer, param, optimizer.param_groups[self.group_index]


def _projected_members(optimizer: SubspaceOptimizer) -> dict[Tensor, tuple[int, Turn]]:
    """Projected weights that need a gradient, each with its group's number and its turn."""
    members: dict[Tensor, tuple[int, Turn]] = {}
    position = 0
    for group_index, group in enumerate(optimizer.param_groups):
        for name, param in named_parameters(group, optimizer.param_groups):
            if param.requires_grad and optimizer.is_projected(param, group):
                members[param] = group_index, Turn(name, position)
            position += 1
    return members


def _check_count(num_micro_batches: int | None) -> None:
    is_count = isinstance(num_micro_batches, int) and not isinstance(num_micro_batches, bool)
    if num_micro_batches is not None and not (is_count and num_micro_batches >= 1):
        raise ValueError(
            f"num_micro_batches must be an int of at least 1, got {num_micro_batches!r}"
        )


def _check_options(group: Mapping[str, Any], num_micro_batches: int | None) -> None:
    if group["basis"] != "sketched":
        raise ValueError(
            f"accumulate_in_backward needs basis='sketched', got {group['basis']!r}: every "
            "other search for a basis needs whole gradients"
        )
    residual = group["residual"]
    if residual != "none" and residual not in STATELESS_RESIDUALS:
        raise ValueError(
            f"residual={residual!r} needs the whole gradient and Adam's step at once, which "
            "accumulate_in_backward does not keep; use residual='none' or one of "
            f"{', '.join(STATELESS_RESIDUALS)}"
        )
    if residual != "none" and num_micro_batches is None:
        raise ValueError(
            f"residual={residual!r} is of whole gradients; with accumulate_in_backward each "
            "micro-batch takes its share of that step in its own backward pass. Say how many "
            "make a step with num_micro_batches=..., or use residual='none'"
        )
