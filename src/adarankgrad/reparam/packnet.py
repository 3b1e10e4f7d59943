"""EfficientPackNet: several tasks in one model, each in weights of its own.

After each task the fewest weights that still do it are kept for it, for good; the next task trains
the others, and uses the kept ones as they are. Built on weights that `powerpropagate` made easy to
prune, no training follows the pruning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..core.checks import check_number
from ..core.patterns import matching_names
from .masks import DENSITIES, largest_entries, num_kept, prunable_weights, stored_weights

_MAX_TASKS = 127


class EfficientPackNet:
    """Packs one task after the other into the linear and convolution layers of a model.

    For each task: ``begin_task()``, a new optimizer and ``protect(optimizer)``, training,
    ``finish_task(evaluate)``; for inference ``use_task(number)``. All other parameters (biases,
    norms, embeddings) are trained with the first task and frozen afterwards, but for those that
    ``own`` matches, of which every task keeps its own, as it does of buffers.

    Differs from the paper: from a summary and memory. Weights that pruning freed go into the
    next task as training left them, where the paper's choice is unknown to us; from zero they could
    not be trained, since the slope of the power is zero there.

    Args:
        model: plain, or from `powerpropagate`, which the method is made for.
        gamma: least share of the unpruned score that the pruned model must keep, in (0, 1].
        densities: shares of each layer's free weights to try, each in (0, 1].
        own: regular expressions of parameters outside linear and convolution layers' weights, or
            of such weights that are not packed, such as a head for each task.

    Attributes:
        num_tasks: finished ones.
        owners: by plain weight name, an int8 tensor: the task that a weight belongs to, 0 for none.

    Raises:
        ValueError: an argument is out of range, a pattern matches nothing, or nothing is packed.

    Memory: beside the model, a copy of the packed weights and a byte for each.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        gamma: float = 0.98,
        densities: Sequence[float] = DENSITIES,
        own: str | Sequence[str] = (),
    ) -> None:
        check_number("gamma", gamma, low=0.0, high=1.0, is_low_allowed=False)
        for density in densities:
            check_number("densities", density, low=0.0, high=1.0, is_low_allowed=False)
        self.model = model
        self.gamma = gamma
        self.densities = sorted({1.0, *densities}, reverse=True)
        self.num_tasks = 0
        self._is_begun = False
        stored = stored_weights(model)
        names = {id(param): name for name, param in stored.items()}
        named = [(names.get(id(param), name), param) for name, param in model.named_parameters()]
        own_names = matching_names(own, named, "own")
        self._packed = {name: each for name, each in stored.items() if name not in own_names}
        if not self._packed:
            raise ValueError(f"own={own!r} leaves no weight of a layer to pack; match fewer")
        self._own = {name: param for name, param in named if name in own_names}
        self._rest = [p for n, p in named if n not in own_names and n not in self._packed]
        self.owners = {
            name: torch.zeros(param.shape, dtype=torch.int8, device=param.device)
            for name, param in self._packed.items()
        }
        self._values = {name: param.detach().clone() for name, param in self._packed.items()}
        self._of_task: list[dict[str, Tensor]] = []

    @torch.no_grad()
    def begin_task(self) -> None:
        """Put the weights back that pruning took out; those of earlier tasks will stay.

        Raises:
            ValueError: a task is begun already, or there are 127.
        """
        self._check_between_tasks("begin a task")
        if self.num_tasks == _MAX_TASKS:
            raise ValueError(f"{_MAX_TASKS} tasks are in the model already, the most it can hold")
        if self.num_tasks > 0:
            self._put_back()
        for param in self._rest:
            param.requires_grad_(self.num_tasks == 0)
            param.grad = None  # of the last task, which a new optimizer would apply
        self._is_begun = True

    def protect(self, optimizer: Optimizer) -> list[RemovableHandle]:
        """Keep the weights of earlier tasks as they are through an optimizer's steps.

        Their gradients are set to zero before clipping or moments see them, and their values, which
        decay or momentum could move, are put back bit for bit after each step.

        Returns:
            Handles whose ``remove()`` ends this.

        Raises:
            ValueError: no task is begun.
        """
        self._check_begun("protect")
        if self.num_tasks == 0:
            return []
        hooks = [
            param.register_hook(_zeroed_where(self.owners[name] > 0))  # type: ignore[no-untyped-call]
            for name, param in self._packed.items()
        ]
        return [*hooks, optimizer.register_step_post_hook(self._restore)]

    def finish_task(self, evaluate: Callable[[nn.Module], float]) -> float:
        """Keep the fewest weights with which the task still scores gamma times the unpruned score.

        Densities are tried downwards, and the first that fails ends the search.

        Args:
            evaluate: scores the model on held-out data, in evaluation mode; at least 0, higher is
                better.

        Returns:
            The share of free weights that the task kept. The model is pruned to the task.

        Raises:
            ValueError: no task is begun, weights of earlier tasks were changed, or a score is below
                0 or not finite. What was trained is there as before.
        """
        self._check_begun("finish_task")
        self._check_protected()
        magnitudes = {name: each.abs() for name, each in prunable_weights(self.model).items()}
        self._values = {name: param.detach().clone() for name, param in self._packed.items()}
        try:
            best, claims = self._search(evaluate, magnitudes)
        except BaseException:
            self._put_back()
            raise
        self.num_tasks += 1
        self._is_begun = False
        for name, claim in claims.items():
            self.owners[name].masked_fill_(claim, self.num_tasks)
        self._of_task.append({name: held.detach().clone() for name, held in self._per_task()})
        self.use_task(self.num_tasks)
        return best

    @torch.no_grad()
    def use_task(self, task: int) -> None:
        """Make the model do a finished task, to the bit as it did when it was finished.

        Args:
            task: 1 for the first.

        Raises:
            ValueError: there is no such task, or one is being trained.
        """
        self._check_between_tasks("use a task")
        if not 1 <= task <= self.num_tasks:
            raise ValueError(
                f"task must be one of the {self.num_tasks} finished ones, from 1 on, got {task}"
            )
        self._show(task, {})
        for name, held in self._per_task():
            held.copy_(self._of_task[task - 1][name])

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain numbers that `load_state_dict` continues from, between tasks.

        Raises:
            ValueError: a task is being trained.
        """
        self._check_between_tasks("save")
        return {
            "num_tasks": self.num_tasks,
            "owners": self.owners,
            "values": self._values,
            "rest": [param.detach() for param in self._rest],
            "of_task": self._of_task,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the last finished task of a saved state, on a model built in the same way.

        A task that is being trained is given up.

        Raises:
            ValueError: the state is of other weights.
        """
        shapes = {name: owners.shape for name, owners in state["owners"].items()}
        if shapes != {name: param.shape for name, param in self._packed.items()}:
            raise ValueError("the state is of a model with other packed weights; load its own")
        self.num_tasks, self._is_begun = state["num_tasks"], False
        for name, param in self._packed.items():
            self.owners[name].copy_(state["owners"][name])
            self._values[name].copy_(state["values"][name])
            param.copy_(self._values[name])
        for param, saved in zip(self._rest, state["rest"], strict=True):
            param.copy_(saved)
        self._of_task = [dict(saved) for saved in state["of_task"]]
        if self.num_tasks:
            self.use_task(self.num_tasks)

    def _search(
        self, evaluate: Callable[[nn.Module], float], magnitudes: dict[str, Tensor]
    ) -> tuple[float, dict[str, Tensor]]:
        """Return the lowest density that does, and the weights it keeps."""
        wanted = self.gamma * _score(evaluate, self.model)
        best, claims = 1.0, self._claims(magnitudes, 1.0)
        for density in self.densities[1:]:
            tried = self._claims(magnitudes, density)
            self._show(self.num_tasks, tried)
            if _score(evaluate, self.model) < wanted:
                break
            best, claims = density, tried
        return best, claims

    @torch.no_grad()
    def _put_back(self) -> None:
        for name, param in self._packed.items():
            param.copy_(self._values[name])

    def _check_begun(self, what: str) -> None:
        if not self._is_begun:
            raise ValueError(f"{what} is for a task in training: call begin_task() first")

    def _check_protected(self) -> None:
        for name, param in self._packed.items():
            if bool(((param != self._values[name]) & (self.owners[name] > 0)).any()):
                raise ValueError(
                    f"weights of earlier tasks were changed in {name}: call protect(optimizer) "
                    "before training; load_state_dict() of an earlier state gives this task up"
                )

    def _check_between_tasks(self, what: str) -> None:
        if self._is_begun:
            raise ValueError(
                f"cannot {what} while task {self.num_tasks + 1} is being trained: call "
                "finish_task() first, or load_state_dict() of an earlier state to give it up"
            )

    def _claims(self, magnitudes: dict[str, Tensor], density: float) -> dict[str, Tensor]:
        """Mark the largest free weights of every layer."""
        claims = {}
        for name, owners in self.owners.items():
            is_free = owners.flatten() == 0
            claim = torch.zeros_like(is_free)
            free = magnitudes[name].flatten()[is_free]
            claim[is_free] = largest_entries(free, num_kept(density, free.numel()))
            claims[name] = claim.view(owners.shape)
        return claims

    @torch.no_grad()
    def _show(self, task: int, claims: dict[str, Tensor]) -> None:
        """Leave in the model the weights of the first tasks, and those claimed, and no others."""
        for name, param in self._packed.items():
            owners = self.owners[name]
            is_shown = (owners > 0) & (owners <= task)
            if name in claims:
                is_shown |= claims[name]
            param.copy_(torch.where(is_shown, self._values[name], 0.0))

    @torch.no_grad()
    def _restore(self, *_: Any) -> None:
        for name, param in self._packed.items():
            param.copy_(torch.where(self.owners[name] > 0, self._values[name], param))

    def _per_task(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._own.items()
        yield from self.model.named_buffers()


def _zeroed_where(is_frozen: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda grad: grad.masked_fill(is_frozen, 0.0)


def _score(evaluate: Callable[[nn.Module], float], model: nn.Module) -> float:
    score = float(evaluate(model))
    check_number("the score", score, low=0.0)
    return score
