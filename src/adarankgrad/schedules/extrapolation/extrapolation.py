"""Gradients of a step taken elsewhere, and the step from where the weights were (x̃ = x − γ̂ζ)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ...core.checks import check_count
from ...core.generators import generator_for
from .ahead import WeightsAhead
from .config import ExtrapolationConfig
from .members import Member, members_of, refuse_closures
from .noise import root_mean_square, scaled_noise


class LossScaler(Protocol):
    """What is used of `torch.amp.GradScaler`."""

    def get_scale(self) -> float:
        """Return the factor on the loss."""
        ...


class Extrapolation:
    """Moves an optimizer's weights ahead for the forward and backward passes of a step.

    The optimizer stays what it is, and so do its schedulers, loss scaling, clipping and saved
    state: it sees gradients that were taken at x̃, and weights at x, bit for bit the ones from
    before. A weight is back as soon as its last gradient of the step is final. ``begin`` and
    ``end``, or `extrapolate`, enclose all passes of a step; clipping and ``optimizer.step()`` come
    after. In between, ``optimizer.step()``, saving, and the model in evaluation raise an error.

    Weights and rates are looked up at every step, so that groups may be added; a group with
    ``maximize`` is moved the other way. The first step has no past gradient and is taken at x, and
    so is one after an exception, or after a gradient that was not finite.

    Differs from the paper, of which no method section was at hand: see ``docs/extrapolation.md``.

    Args:
        optimizer: any whose ``step()`` needs no closure.
        model: whose weights it trains; wrapped for data parallel training or not, but not sharded.
        config: where gradients are taken.
        num_micro_batches: backward passes of a step, each of its share in the mean loss. May be
            set between two steps.
        seed: of the noise.
        scaler: of the loss, where it is scaled: past gradients are kept unscaled.

    Raises:
        ValueError: the optimizer needs a closure, or a weight is sharded.

    Memory: one copy of the trained weights in their dtype, and one weight more for a moment. In
    between steps it is held by past gradients only. Time: gradients and weights are read once or
    twice more, with one wait for the device a step.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> extrapolation = Extrapolation(optimizer, model, ExtrapolationConfig(step=0.1))
        >>> for batch in torch.randn(3, 8, 4):
        ...     with extrapolation.extrapolate():
        ...         model(batch).square().mean().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        config: ExtrapolationConfig,
        *,
        num_micro_batches: int = 1,
        seed: int = 0,
        scaler: LossScaler | None = None,
    ) -> None:
        refuse_closures(optimizer)
        check_count("num_micro_batches", num_micro_batches, low=1)
        self.optimizer = optimizer
        self.model = model.module if isinstance(model, DistributedDataParallel) else model
        self.config = config
        self.num_micro_batches = num_micro_batches
        self.seed = seed
        self.scaler = scaler
        self._num_draws = 0
        self._past: dict[Tensor, Tensor] = {}
        self._ahead = WeightsAhead()
        self._num_passes: Counter[Tensor] = Counter()
        self._handles: list[RemovableHandle] = []
        self._is_ahead = False
        self._grad_factor = 1.0
        self._names = {param: name for name, param in self.model.named_parameters()}
        members_of(optimizer, config)
        self._step_hook: RemovableHandle | None = None

    def remove(self) -> None:
        """Leave the optimizer alone from now on."""
        self._restore()
        if self._step_hook is not None:
            self._step_hook.remove()
            self._step_hook = None

    @contextmanager
    def extrapolate(self, backward: Callable[[], Any] | None = None) -> Iterator[None]:
        """Enclose the forward and backward passes of a step.

        Args:
            backward: as for `begin`.

        Raises:
            ValueError: as `begin` and `end` do.
            RuntimeError: the weights are ahead already, or were changed while they were.
        """
        self.begin(backward)
        try:
            yield
        except BaseException:
            self.abandon()
            raise
        self.end()

    def begin(self, backward: Callable[[], Any] | None = None) -> None:
        """Move the weights ahead.

        Args:
            backward: computes, at x, the gradient of one micro-batch's share; for source
                ``"fresh"`` only, which needs it. Gradients that stand in ``.grad`` are kept.

        Raises:
            ValueError: ``backward`` is missing or of no use.
            RuntimeError: the weights are ahead already.
        """
        if self._is_ahead:
            raise RuntimeError(
                "the weights are at the extrapolated point already; call end() first"
            )
        if (backward is not None) != (self.config.source == "fresh"):
            raise ValueError(
                "source='fresh', and no other, needs extrapolate(backward), which computes the "
                f"gradient of one micro-batch; source is {self.config.source!r}"
            )
        if self._step_hook is None:
            self._step_hook = self.optimizer.register_step_pre_hook(self._check_step)
        if self.config.step == 0:
            return
        scale = 1.0 if self.scaler is None else self.scaler.get_scale()
        self._grad_factor = self.num_micro_batches / scale
        self._is_ahead = True
        try:
            members = members_of(self.optimizer, self.config)
            if backward is not None and any(step != 0 for _, _, step in members):
                self._take_fresh(members, backward)
            self._handles += self._guards()
            self._move(members)
            self._handles += [
                param.register_hook(self._on_grad(param))  # type: ignore[no-untyped-call]
                for _, param, _ in members
            ]
        except BaseException:
            self.abandon()
            raise

    @torch.no_grad()
    def end(self) -> None:
        """Bring all weights back, and keep what the next step needs.

        Raises:
            ValueError: there were fewer backward passes than ``num_micro_batches``.
            RuntimeError: weights were changed while they were ahead. They are back all the same.
        """
        if not self._is_ahead:
            return
        num_passes = max(self._num_passes.values(), default=0)
        self._restore()
        if 0 < num_passes < self.num_micro_batches:
            raise ValueError(
                f"there were {num_passes} backward passes, and num_micro_batches is "
                f"{self.num_micro_batches}: set it to the number of this step"
            )
        if self._ahead.changed:
            raise RuntimeError(
                f"{self._name(self._ahead.changed[0])} was changed at the extrapolated point, and "
                "the change is lost. Load weights outside; an optimizer that steps in the backward "
                "pass can be extrapolated with one micro-batch a step only"
            )
        if self.config.source == "past-global":
            self._keep_global()
        if not _are_finite(self._past.values()):
            self._past.clear()

    def abandon(self) -> None:
        """Bring all weights back after an error; the next step has no past gradient."""
        self._restore()
        self._past.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold: past gradients, by number of the weight, and counts.

        Under data parallel training every worker has its own.

        Raises:
            RuntimeError: the weights are ahead.
        """
        self._check_is_back("save")
        numbers = {param: number for number, param, _ in members_of(self.optimizer, self.config)}
        past = {numbers[param]: held for param, held in self._past.items() if param in numbers}
        return {"source": self.config.source, "num_draws": self._num_draws, "past": past}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state, which is copied.

        Raises:
            ValueError: it is of another source, or of other weights.
            RuntimeError: the weights are ahead.
        """
        self._check_is_back("load")
        if state["source"] != self.config.source:
            raise ValueError(
                f"the saved extrapolation is of source={state['source']!r}, this one of "
                f"{self.config.source!r}"
            )
        params = {number: param for number, param, _ in members_of(self.optimizer, self.config)}
        past = {}
        for number, held in state["past"].items():
            param = params.get(number)
            shape = () if self.config.scale == "gradient" else getattr(param, "shape", None)
            if param is None or tuple(held.shape) != shape:
                raise ValueError(
                    f"the saved gradient of weight {number} {tuple(held.shape)} fits no weight of "
                    "this optimizer"
                )
            past[param] = held.to(param.device, copy=True)
        self._past, self._num_draws = past, int(state["num_draws"])

    def _take_fresh(self, members: list[Member], backward: Callable[[], Any]) -> None:
        grads = [(param, param.grad) for _, param, _ in members]
        for param, _ in grads:
            param.grad = None
        handles = [
            param.register_hook(self._on_fresh(param))  # type: ignore[no-untyped-call]
            for param, _ in grads
        ]
        try:
            backward()
        finally:
            for handle in handles:
                handle.remove()
            for param, grad in grads:
                param.grad = grad
        if not _are_finite(self._past.values()):
            self._past.clear()

    @torch.no_grad()
    def _move(self, members: list[Member]) -> None:
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        self._ahead, self._num_passes = WeightsAhead(), Counter()
        pasts, self._past = self._past, {}
        for number, param, step in members:
            past = pasts.pop(param, None)  # freed as its weight is copied
            if step == 0:
                continue
            direction = past
            if self.config.source == "noise":
                name = f"extrapolation/{rank}/{number}"
                generator = generator_for(param.device, self.seed, name, self._num_draws)
                assert self.config.scale is not None
                direction = scaled_noise(
                    param, self.config.noise, self.config.scale, past, generator
                )
            if direction is not None:
                self._ahead.move(param, direction, step)
        self._num_draws += 1

    def _restore(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._ahead.bring_all_back()
        self._is_ahead = False

    def _on_grad(self, param: Tensor) -> Callable[[Tensor], None]:
        """A hook for this worker's gradient of a micro-batch, before it is added or averaged."""

        @torch.no_grad()
        def hook(grad: Tensor) -> None:
            self._num_passes[param] += 1
            if self._num_passes[param] > self.num_micro_batches:
                raise ValueError(
                    f"{self._name(param)} got more than num_micro_batches="
                    f"{self.num_micro_batches} gradients in a step: give the number of backward "
                    "passes. Reentrant checkpointing brings the gradient of a shared weight in "
                    "parts: use it with use_reentrant=False"
                )
            if self._num_passes[param] == self.num_micro_batches:
                self._ahead.bring_back(param)  # no pass of this step uses the weight any more
                if self.config.needs_local_grad:
                    self._past[param] = self._kept(param, grad)

        return hook

    def _on_fresh(self, param: Tensor) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def hook(grad: Tensor) -> None:
            self._past[param] = self._kept(param, grad)

        return hook

    def _kept(self, param: Tensor, grad: Tensor) -> Tensor:
        if grad.layout is not torch.strided:
            raise ValueError(
                f"{self._name(param)} has a sparse gradient, which cannot be extrapolated by; use "
                "sparse=False, or source='noise' with another scale"
            )
        if self.config.scale == "gradient":
            return root_mean_square(grad) * self._grad_factor
        return (grad * self._grad_factor).to(param.dtype)

    def _keep_global(self) -> None:
        self._grad_factor /= self.num_micro_batches
        for _, param, _ in members_of(self.optimizer, self.config):
            if param.grad is not None:
                self._past[param] = self._kept(param, param.grad)

    def _guards(self) -> list[RemovableHandle]:
        """Hooks that refuse what must only happen at the real point."""

        def on_forward(model: nn.Module, _: Any) -> None:
            if not model.training and not torch.is_grad_enabled():
                self._check_is_back("evaluate")

        def on_state_dict(*_: Any) -> None:
            self._check_is_back("save")

        return [
            self.model.register_forward_pre_hook(on_forward),
            self.model.register_state_dict_pre_hook(on_state_dict),
        ]

    def _check_step(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(each is not None for each in (*args[1:], *kwargs.values())):
            raise ValueError(
                "extrapolation needs gradients before step(), not a closure, which would compute "
                "them at the real point"
            )
        self._check_is_back("step")

    def _check_is_back(self, what: str) -> None:
        if self._is_ahead:
            raise RuntimeError(
                f"cannot {what} while the weights are at the extrapolated point: do so after the "
                "with-block, or after end()"
            )

    def _name(self, param: Tensor) -> str:
        return self._names.get(param, f"a weight {tuple(param.shape)}")


def _are_finite(tensors: Iterable[Tensor]) -> bool:
    # The largest entries, where isfinite() would make a copy.
    largest = [torch.linalg.vector_norm(held, math.inf) for held in tensors if held.numel()]
    checks = [each.isfinite().to(largest[0].device) for each in largest]
    return not checks or bool(torch.stack(checks).all())
