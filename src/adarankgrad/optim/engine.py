"""The optimizer that every gradient-subspace method here is: projected matrices, plain AdamW else.

A method is a subclass that fixes a signature and defaults. Everything a step reads stands in the
parameter groups and in the state, as tensors and plain values, so that copying, pickling and
resuming need no more than torch's own optimizers do.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import math
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any, cast, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .accumulation import BackwardAccumulation
from .basis_refresh import Turn
from .budget import RankBudget, budget_bytes, claimant_of
from .gradient_checks import (
    NamedGrad,
    check_usable,
    clip_to,
    describe_broken,
    norms_of,
    total_norm,
)
from .matrix_state import is_matrix_to_project, layout_for, new_state
from .matrix_step import step_matrix
from .options import COMMON_OPTIONS, ENGINE_DEFAULTS, check_options
from .plain_step import step_plain
from .projected_grad import ProjectedGrad
from .report import OptimizerReport, build_report, named_parameters
from .saved_state import check_saved_groups, check_state_fits, copied_to
from .weight_rounding import check_can_be_rounded, master_weights

Group = dict[str, Any]

_NOT_OPTIONS = {"params", "param_names", "initial_lr"}


class SubspaceOptimizer(Optimizer):
    """Adam in low-rank gradient subspaces for matrices, AdamW for everything else.

    Nothing is bound at construction: layouts, ranks and state come from the parameter when it is
    first stepped, so that wrappers may swap parameters in between.

    Args:
        params: parameters, named parameters, or groups of either. Names, where given, identify a
            parameter to its random generator and in reports; otherwise its position does.
        options: of the method, as its constructor takes them; `engine_options` translates them.

    Raises:
        ValueError: if an option is out of range.
    """

    def __init__(self, params: Any, options: Group) -> None:
        defaults = {**ENGINE_DEFAULTS, **self.engine_options(options), "method": self._method}
        check_options(defaults)
        super().__init__(params, defaults)

    _last_grad_norm: float | None = None
    _accumulations: tuple[BackwardAccumulation, ...] = ()

    @property
    def _method(self) -> str:
        return type(self).__name__

    @staticmethod
    def chosen_options(arguments: dict[str, Any]) -> Group:
        """Select a method's options from the ``locals()`` of its constructor."""
        return {
            name: value
            for name, value in arguments.items()
            if name not in ("self", "params", "__class__")
        }

    @staticmethod
    def engine_options(options: Group) -> Group:
        """Express a method's options, all or some, in those of the engine.

        Raises:
            ValueError: if an option that the engine does not have is out of range.
        """
        return options

    def add_param_group(self, param_group: Group) -> None:
        """Add a group; options that it does not set come from the constructor.

        Raises:
            ValueError: if an option is out of range or unknown.
        """
        own_words = self._option_names() - set(self.defaults)
        is_of_an_optimizer = set(self.defaults) <= set(param_group)
        if not is_of_an_optimizer or own_words & set(param_group):
            self._check_names(param_group)
            param_group = self.engine_options(param_group)
        check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        try:
            for param in self.param_groups[-1]["params"]:
                check_can_be_rounded(param, self.param_groups[-1])
            self._check_common_options()
        except ValueError:
            self.param_groups.pop()
            raise

    def _option_names(self) -> set[str]:
        return set(inspect.signature(type(self)).parameters) - {"params"}

    def _check_names(self, param_group: Group) -> None:
        known = self._option_names()
        unknown = sorted(set(param_group) - known - _NOT_OPTIONS)
        if unknown:
            raise ValueError(
                f"unknown option {', '.join(unknown)} in a parameter group; "
                f"known are {', '.join(sorted(known))}"
            )

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            The closure's loss, or None without one.

        Raises:
            ValueError: if a gradient is sparse, or of a dtype that cannot be trained in.
            FloatingPointError: with ``nonfinite="raise"``, if their norm is not finite. The step
                changed nothing; residuals of `accumulate_in_backward` had theirs before.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._are_gradients_usable():
            self._step_all()
        return loss

    def accumulate_in_backward(
        self, model: nn.Module, *, num_micro_batches: int | None = None
    ) -> BackwardAccumulation:
        """Project gradients in the backward pass, so that they never pile up.

        As each projected weight's gradient becomes final, its measurements (coordinates in the
        basis, a few probes outside it, and the sketch for the next basis where one is due) are
        added up, and it is freed: at most one of them is alive. ``weight.grad`` then is a
        `ProjectedGrad`, which accumulation over micro-batches, gradient clipping
        (``torch.nn.utils.clip_grad_norm_``), ``torch.amp.GradScaler`` and ``zero_grad`` treat as
        any gradient. Its norm is exact inside the basis and estimated outside (`core.measurement`).

        A residual needs whole gradients. ``orthogonalized`` and ``normalized`` depend on their
        direction only, so each micro-batch takes its share of the residual step **within its own
        backward pass**: the steps of an average of directions in place of the average's direction,
        which loss scaling and clipping do not touch, and which a skipped step does not undo.
        Weights then change during backward, so one graph cannot be run through twice.

        Call it again after adding a group, or after parameters were replaced or unfrozen: for the
        weights of the model, the later call counts. ``zero_grad`` has to follow every step.

        Args:
            model: whose weights to watch; those that are not projected (embeddings, head, norms)
                keep dense gradients.
            num_micro_batches: backward passes that make a step; needed with a residual only, and
                the handle's attribute of that name may be set where a step has fewer.

        Returns:
            A handle whose ``remove()`` ends it.

        Raises:
            ValueError: if a group has another basis than ``sketched`` or a residual that cannot be
                taken apart, the model has no projected weight of this optimizer, or other processes
                have a part in its gradients. In a backward pass: with a residual, if there are more
                passes than ``num_micro_batches``.
            RuntimeError: in a backward pass or step, if a step was not followed by ``zero_grad``.

        Memory: between backward and step, (k + 8)·n elements a matrix at rank k; at the two steps
        of a refresh, k is the ceiling plus oversampling, and m of them more. A basis in a compact
        form is held in float32 for as long.
        """
        accumulation = BackwardAccumulation(self, model, num_micro_batches)
        for earlier in self._accumulations:
            earlier.release(accumulation.params)
        still_used = [earlier for earlier in self._accumulations if earlier.params]
        self._accumulations = (*still_used, accumulation)
        return accumulation

    @property
    def accumulations(self) -> tuple[BackwardAccumulation, ...]:
        """The handles of `accumulate_in_backward` that still have weights."""
        return self._accumulations

    def master_weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's state dict with the weights as the optimizer sees them.

        With ``weight_rounding="corrected"`` a bfloat16 weight and its correction together are a
        float32 number of 16 significant bits; it is returned as such, for saving. A weight that was
        changed since the last step, by loading a model without its optimizer for example, is off by
        half a unit in its last place at most. Everything else is as in ``model.state_dict()``.

        Args:
            model: whose weights are this optimizer's.

        Memory: four bytes for each weight with a correction.
        """
        return master_weights(model, self.state)

    def state_of(self, param: Tensor, group: Group) -> Group:
        """State of a projected weight, made if there is none yet."""
        state: Group = self.state[param]
        if not state:
            state.update(new_state(param, layout_for(param, group), group))
        return state

    @staticmethod
    def is_projected(param: Tensor, group: Group) -> bool:
        """Whether a weight is a matrix that its group projects."""
        return is_matrix_to_project(param, group)

    def report(self) -> OptimizerReport:
        """Ranks, captured energy, refreshes and bytes of every layer, and their totals."""
        return build_report(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load options and state saved by ``state_dict()``.

        Unlike torch's, it keeps the dtype of every state tensor (a float32 basis under bfloat16
        weights stays float32) and takes shapes from the saved state, whatever ranks this
        optimizer is at, if it has stepped at all.

        Args:
            state_dict: from `state_dict`; not modified and not referred to afterwards.

        Raises:
            ValueError: if it is of another optimizer or of a newer version, groups differ in number
                or size, or a state is not of this weight: for another shape or side.
        """
        state_dict = dict(state_dict)  # hooks may add to it
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        saved_groups = copy.deepcopy(state_dict["param_groups"])
        groups = self.param_groups
        check_saved_groups(groups, saved_groups)

        state = dict(state_dict["state"])
        restored = {}
        for group, saved in zip(groups, saved_groups, strict=True):
            keys = saved["params"]
            saved.update({key: group[key] for key in ("params", "param_names") if key in group})
            options = {**ENGINE_DEFAULTS, **saved}  # as they will be, if the state is an older one
            members = zip(keys, named_parameters(group, groups), strict=True)
            for key, (name, param) in members:
                if key in state:
                    check_state_fits(state[key], param, options, name)
                    restored[param] = copied_to(state.pop(key), param.device)
        for accumulation in self._accumulations:
            accumulation.check_groups(
                {**group, **saved} for group, saved in zip(groups, saved_groups, strict=True)
            )
        complete = defaultdict(dict, {**state, **restored})
        self.__setstate__({"state": complete, "param_groups": saved_groups})
        self._expire_held_gradients()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, and turn off what an older version did not have."""
        super().__setstate__(state)
        for options in (self.defaults, *self.param_groups):
            for name, value in {**ENGINE_DEFAULTS, "method": self._method}.items():
                options.setdefault(name, value)

    @property
    def last_grad_norm(self) -> float | None:
        """Norm of all gradients at the last step, before clipping; None if it was not needed.

        Of gradients held in projection it is exact inside their bases, estimated outside
        (`accumulate_in_backward`).
        """
        return self._last_grad_norm

    def _are_gradients_usable(self) -> bool:
        """Measure all gradients and clip them; False if the step is to be skipped, and count it."""
        grads = [
            NamedGrad(name, param.grad)
            for group in self.param_groups
            for name, param in named_parameters(group, self.param_groups)
            if param.grad is not None
        ]
        for name, grad in grads:
            check_usable(name, grad)
        self._last_grad_norm = None
        max_norm, nonfinite = (self._common(name) for name in ("max_grad_norm", "nonfinite"))
        if max_norm is None and nonfinite == "ignore":
            return True
        norms = norms_of(grads)
        norm = self._last_grad_norm = total_norm(norms)
        if not math.isfinite(norm) and nonfinite != "ignore":
            if nonfinite == "raise":
                raise FloatingPointError(
                    f"the norm of the gradients is {norm}, from {describe_broken(grads, norms)}; "
                    "nothing was changed. Lower lr, clip with max_grad_norm, or let nonfinite="
                    "'skip' leave such steps out"
                )
            for group in self.param_groups:
                group["num_skipped_steps"] += 1
            return False
        if max_norm is not None:
            clip_to(grads, norm, max_norm)
        return True

    def _step_all(self) -> None:
        plain: list[tuple[Group, list[tuple[str, Tensor]]]] = []
        positions = itertools.count()
        budget = functools.cache(self._divide_budget)
        for group in self.param_groups:
            plain.append((group, []))
            for name, param in named_parameters(group, self.param_groups):
                position = next(positions)
                if param.grad is None:
                    continue
                if self._is_projected(group, name, param):
                    self._step_projected(group, name, param, position, budget)
                else:
                    plain[-1][1].append((name, param))
        for group, named in plain:
            step_plain(group, named, [self.state[param] for _, param in named])

    def _expire_held_gradients(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if isinstance(param.grad, ProjectedGrad):
                    param.grad.expire()

    def _common(self, option: str) -> Any:
        """An option of the whole optimizer, which every group has."""
        return self.param_groups[0][option]

    @property
    def _memory_budget(self) -> Any:
        return self._common("memory_budget")

    def _divide_budget(self) -> RankBudget:
        """Allot ranks to all projected weights, by what is known of their gradients now."""
        claimants = [
            claimant_of(param, self.state, group)
            for group in self.param_groups
            for param in group["params"]
            if is_matrix_to_project(param, group)
        ]
        params = [claimant.param for claimant in claimants]
        return RankBudget(claimants, budget_bytes(self._memory_budget, params))

    def _check_common_options(self) -> None:
        """See that groups agree on them, and that a budget holds every weight's minimum rank."""
        for option in COMMON_OPTIONS:
            values = {group[option] for group in self.param_groups}
            if len(values) > 1:
                raise ValueError(
                    f"{option} is of the whole optimizer, but its groups have {values}; give it "
                    "to the constructor"
                )
        if self._memory_budget is not None:
            self._divide_budget()

    def _is_projected(self, group: Group, name: str, param: Tensor) -> bool:
        if is_matrix_to_project(param, group):
            return True
        if group["project"] and param.dim() >= 2 and not self.state[param]:
            kind = "complex" if param.is_complex() else "a vector in the shape of a matrix"
            warnings.warn(
                f"{name} {tuple(param.shape)} is {kind}; it is trained by plain AdamW",
                stacklevel=3,
            )
        return False

    def _step_projected(
        self,
        group: Group,
        name: str,
        param: Tensor,
        position: int,
        budget: Callable[[], RankBudget],
    ) -> None:
        state = self.state_of(param, group)
        has_budget = self._memory_budget is not None
        turn = Turn(name, position, (lambda: budget().max_rank(param)) if has_budget else None)
        step_matrix(param, cast(Tensor, param.grad), state, group, turn)
        if isinstance(param.grad, ProjectedGrad):
            param.grad.expire()
