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
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any, cast, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from ..core.adam import corrected_eps, weight_factors
from .accumulation import BackwardAccumulation
from .basis_refresh import Turn
from .budget import RankBudget, budget_bytes, claimant_of
from .matrix_state import KEPT_ON_CPU, fits_matrix, layout_for, new_state
from .matrix_step import step_matrix
from .options import ENGINE_DEFAULTS, check_options
from .report import OptimizerReport, build_report, named_parameters

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
        defaults = {**ENGINE_DEFAULTS, **self.engine_options(options)}
        check_options(defaults)
        super().__init__(params, defaults)

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
            self._check_budget()
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
            ValueError: if a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        plain: list[tuple[Group, list[Tensor]]] = []
        positions = itertools.count()
        budget = functools.cache(self._divide_budget)
        for group in self.param_groups:
            plain.append((group, []))
            for name, param in named_parameters(group, self.param_groups):
                position = next(positions)
                if param.grad is None:
                    continue
                _check_gradient(name, param)
                if self._is_projected(group, name, param):
                    self._step_projected(group, name, param, position, budget)
                else:
                    plain[-1][1].append(param)
        for group, params in plain:
            self._step_plain(group, params)
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

        Call it again after adding a group, or after parameters were replaced.

        Args:
            model: whose weights to watch; the others keep dense gradients.
            num_micro_batches: backward passes that make a step; needed with a residual only.

        Returns:
            A handle whose ``remove()`` ends it.

        Raises:
            ValueError: if a group has another basis than ``sketched`` or a residual that cannot be
                taken apart, or the model has no projected weight of this optimizer.

        Memory: between backward and step, (k + 8)·n elements a matrix at rank k; at the two steps
        of a refresh, k is the ceiling plus oversampling, and m of them more.
        """
        return BackwardAccumulation(self, model, num_micro_batches)

    def state_of(self, param: Tensor, group: Group) -> Group:
        """State of a projected weight, made if there is none yet."""
        state: Group = self.state[param]
        if not state:
            state.update(new_state(param, layout_for(param, group), group))
        return state

    @staticmethod
    def is_projected(param: Tensor, group: Group) -> bool:
        """Whether a weight is a matrix that its group projects."""
        return _is_matrix_to_project(param, group)

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
            ValueError: if groups differ in number or size, or a state is not of this weight: made
                by another optimizer, or for another shape or side.
        """
        state_dict = dict(state_dict)  # hooks may add to it
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        saved_groups = copy.deepcopy(state_dict["param_groups"])
        groups = self.param_groups
        _check_same_groups(groups, saved_groups)

        state = dict(state_dict["state"])
        restored = {}
        for group, saved in zip(groups, saved_groups, strict=True):
            keys = saved["params"]
            saved.update({key: group[key] for key in ("params", "param_names") if key in group})
            options = {**group, **saved}
            members = zip(keys, named_parameters(group, groups), strict=True)
            for key, (name, param) in members:
                if key in state:
                    _check_state_fits(state[key], param, options, name)
                    restored[param] = _copied_to(state.pop(key), param.device)
        complete = defaultdict(dict, {**state, **restored})
        self.__setstate__({"state": complete, "param_groups": saved_groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, and turn off what an older version did not have."""
        super().__setstate__(state)
        for options in (self.defaults, *self.param_groups):
            for name, value in ENGINE_DEFAULTS.items():
                options.setdefault(name, value)

    @property
    def _memory_budget(self) -> Any:
        return self.param_groups[0]["memory_budget"]

    def _divide_budget(self) -> RankBudget:
        """Allot ranks to all projected weights, by what is known of their gradients now."""
        claimants = [
            claimant_of(param, self.state.get(param, {}), group)
            for group in self.param_groups
            for param in group["params"]
            if _is_matrix_to_project(param, group)
        ]
        params = [claimant.param for claimant in claimants]
        return RankBudget(claimants, budget_bytes(self._memory_budget, params))

    def _check_budget(self) -> None:
        """See that there is one budget, and that it holds every weight's minimum rank."""
        budgets = {group["memory_budget"] for group in self.param_groups}
        if len(budgets) > 1:
            raise ValueError(
                f"memory_budget is of the whole optimizer, but its groups have {budgets}; give it "
                "to the constructor"
            )
        if budgets != {None}:
            self._divide_budget()

    def _is_projected(self, group: Group, name: str, param: Tensor) -> bool:
        if _is_matrix_to_project(param, group):
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

    def _step_plain(self, group: Group, params: list[Tensor]) -> None:
        if not params:
            return
        states = [self.state[param] for param in params]
        for param, state in zip(params, states, strict=True):
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        if group["adam_convention"] == "torch":
            _adamw(group, params, states, eps=group["eps"], weight_decay=group["weight_decay"])
            return
        _, beta2 = group["betas"]
        of_step: dict[int, list[int]] = defaultdict(list)
        for index, state in enumerate(states):
            of_step[int(state["step"]) + 1].append(index)
        for step, members in of_step.items():
            eps = corrected_eps(group["eps"], "transformers", step=step, beta2=beta2)
            _adamw(group, [params[i] for i in members], [states[i] for i in members], eps=eps)
        factor, _ = weight_factors(float(group["lr"]), group["weight_decay"], "transformers")
        if factor != 1.0:
            torch._foreach_mul_(params, factor)


def _adamw(
    group: Group,
    params: list[Tensor],
    states: list[Group],
    *,
    eps: float,
    weight_decay: float = 0.0,
) -> None:
    """Torch's own AdamW on a list of parameters."""
    beta1, beta2 = group["betas"]
    adamw(
        params,
        [cast(Tensor, param.grad) for param in params],
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        has_complex=any(param.is_complex() for param in params),
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )


def _check_gradient(name: str, param: Tensor) -> None:
    grad = cast(Tensor, param.grad)
    if grad.layout is not torch.strided:
        raise ValueError(
            f"the gradient of {name} {tuple(param.shape)} is sparse; only dense gradients are "
            "supported: build the embedding with sparse=False, or give it to torch.optim.SparseAdam"
        )


def _check_same_groups(groups: list[Group], saved_groups: list[Group]) -> None:
    sizes = [len(group["params"]) for group in groups]
    saved_sizes = [len(group["params"]) for group in saved_groups]
    if sizes != saved_sizes:
        raise ValueError(
            "the saved optimizer has parameter groups of other sizes: "
            f"saved {saved_sizes}, here {sizes}; build the groups as they were when it was saved"
        )


def _is_matrix_to_project(param: Tensor, group: Group) -> bool:
    if not group["project"] or param.dim() < 2 or param.is_complex():
        return False
    layout = layout_for(param, group)
    return min(layout.num_rows, layout.num_cols) > 1


def _check_state_fits(state: Group, param: Tensor, group: Group, name: str) -> None:
    """See that a step could start from a saved state, before anything is replaced."""
    if _is_matrix_to_project(param, group):
        fits = fits_matrix(state, layout_for(param, group), group)
    else:
        fits = "basis" not in state and state["exp_avg"].shape == param.shape
    if not fits:
        raise ValueError(
            f"the saved state of {name} {tuple(param.shape)} is of another optimizer, shape or "
            "side; load it into an optimizer built as the one that was saved"
        )


def _copied_to(value: Any, device: torch.device) -> Any:
    """A copy of one parameter's state on the parameter's device, dtypes kept."""
    copied = {}
    for key, entry in value.items():
        if isinstance(entry, Tensor):  # torch's AdamW wants its step tensor where it was
            stays = key in KEPT_ON_CPU
            entry = entry.clone() if stays else entry.to(device, copy=True)
        copied[key] = entry
    return copied
