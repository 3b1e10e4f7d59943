"""What an optimizer is doing: ranks, captured energy, refreshes and bytes, as plain values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..core.memory import adam_state_bytes
from ..core.refresh import RefreshReason
from .matrix_state import KEPT_ON_CPU, layout_for
from .options import rank_bounds
from .text_table import aligned, mib

if TYPE_CHECKING:
    from .engine import SubspaceOptimizer


@dataclass(frozen=True)
class LayerReport:
    """One projected weight.

    Attributes:
        name: the parameter's name, or its position.
        shape: of the weight.
        rank: columns of its basis; 0 before the first refresh.
        max_rank: the most columns it may have.
        captured_energy: ‖basisᵀ G‖² / ‖G‖² at the last refresh, in [0, 1].
        steps_since_refresh: steps taken with the present basis.
        refresh_reason: which rule fired last: first, max_gap, norm, energy, or none.
        num_refreshes: bases found so far.
        num_skipped_refreshes: refreshes put off because the gradient was zero or not finite.
        state_bytes: bytes of its basis and moments.
    """

    name: str
    shape: tuple[int, ...]
    rank: int
    max_rank: int
    captured_energy: float
    steps_since_refresh: int
    refresh_reason: str
    num_refreshes: int
    num_skipped_refreshes: int
    state_bytes: int


@dataclass(frozen=True)
class OptimizerReport:
    """Every projected weight that has been stepped, and totals.

    Attributes:
        layers: one report a projected weight, in the order of the groups.
        projected_state_bytes: bytes of state of the projected weights.
        plain_state_bytes: bytes of state of all others.
        correction_bytes: bytes of the corrections of 24-bit weights, in neither of them.
        adamw_projected_state_bytes: what ``torch.optim.AdamW`` would hold for the projected
            weights.
        projected_share: share of stepped weights (elements) that are projected, in [0, 1].
        num_skipped_steps: steps left out because the gradients' norm was not finite.
        last_grad_norm: norm of all gradients at the last step before clipping, not finite if that
            was skipped; None where neither ``max_grad_norm`` nor ``nonfinite`` needed it.
    """

    layers: tuple[LayerReport, ...]
    projected_state_bytes: int
    plain_state_bytes: int
    correction_bytes: int
    adamw_projected_state_bytes: int
    projected_share: float
    num_skipped_steps: int
    last_grad_norm: float | None

    @property
    def state_bytes(self) -> int:
        """Bytes of all optimizer state."""
        return self.projected_state_bytes + self.plain_state_bytes + self.correction_bytes

    @property
    def mean_rank(self) -> float:
        """Mean rank over projected weights; 0 without any."""
        return sum(layer.rank for layer in self.layers) / max(1, len(self.layers))

    @property
    def num_skipped_refreshes(self) -> int:
        """Refreshes put off, over all weights."""
        return sum(layer.num_skipped_refreshes for layer in self.layers)

    def __str__(self) -> str:
        """Return a table with one line a projected weight, then totals."""
        header = ("projected weight", "shape", "rank", "of", "energy", "age", "last refresh", "MiB")
        rows = [
            (
                layer.name,
                "x".join(map(str, layer.shape)),
                str(layer.rank),
                str(layer.max_rank),
                f"{layer.captured_energy:.3f}",
                str(layer.steps_since_refresh),
                layer.refresh_reason,
                mib(layer.state_bytes),
            )
            for layer in self.layers
        ]
        has_any = self.correction_bytes > 0
        corrections = f", corrections {mib(self.correction_bytes)} MiB" if has_any else ""
        totals = (
            f"mean rank {self.mean_rank:.1f}; state of projected weights "
            f"{mib(self.projected_state_bytes)} MiB (AdamW: "
            f"{mib(self.adamw_projected_state_bytes)}), of all others "
            f"{mib(self.plain_state_bytes)} MiB{corrections}; "
            f"skipped steps: {self.num_skipped_steps}, refreshes: {self.num_skipped_refreshes}"
        )
        return "\n".join([*aligned([header, *rows]), totals])

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values, ready for JSON: None for a norm that is not finite."""
        norm = self.last_grad_norm
        return {
            **asdict(self),
            "last_grad_norm": norm if norm is not None and math.isfinite(norm) else None,
            "state_bytes": self.state_bytes,
            "mean_rank": self.mean_rank,
            "num_skipped_refreshes": self.num_skipped_refreshes,
        }


def build_report(optimizer: SubspaceOptimizer) -> OptimizerReport:
    """Read a report off an optimizer's state. Costs no device synchronisation."""
    layers: list[LayerReport] = []
    plain_bytes = correction_bytes = adamw_bytes = projected_weights = all_weights = 0
    for name, param, group in _stepped_parameters(optimizer):
        state = optimizer.state[param]
        all_weights += param.numel()
        correction_bytes += bytes_of(state.get("correction"))
        if "basis" not in state:
            plain_bytes += tensor_bytes(state)
            continue
        projected_weights += param.numel()
        adamw_bytes += adam_state_bytes(param.numel(), param.element_size())
        layers.append(_layer_report(name, param, state, group))
    return OptimizerReport(
        layers=tuple(layers),
        projected_state_bytes=sum(layer.state_bytes for layer in layers),
        plain_state_bytes=plain_bytes,
        correction_bytes=correction_bytes,
        adamw_projected_state_bytes=adamw_bytes,
        projected_share=projected_weights / max(1, all_weights),
        num_skipped_steps=optimizer.param_groups[0]["num_skipped_steps"],
        last_grad_norm=optimizer.last_grad_norm,
    )


def log_reports(
    optimizer: SubspaceOptimizer,
    callback: Callable[[int, OptimizerReport], None],
    *,
    every_steps: int = 100,
) -> RemovableHandle:
    """Call ``callback(step, report)`` after every so many steps.

    Args:
        optimizer: the one to watch.
        callback: receives the number of steps since this call and a report.
        every_steps: steps between two calls, at least 1.

    Returns:
        A handle whose ``remove()`` ends it.

    Raises:
        ValueError: if ``every_steps`` is below 1.
    """
    if every_steps < 1:
        raise ValueError(f"every_steps must be at least 1, got {every_steps}")
    num_steps = 0

    def after_step(*_: Any) -> None:
        nonlocal num_steps
        num_steps += 1
        if num_steps % every_steps == 0:
            callback(num_steps, optimizer.report())

    return optimizer.register_step_post_hook(after_step)


def named_parameters(
    group: dict[str, Any], groups: Iterable[dict[str, Any]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of one group, each with its name, or its position over all groups."""
    if "param_names" in group:
        yield from zip(group["param_names"], group["params"], strict=True)
        return
    offset = 0
    for other in groups:
        if other is group:
            break
        offset += len(other["params"])
    for index, param in enumerate(group["params"]):
        yield f"parameter {offset + index}", param


def _stepped_parameters(
    optimizer: SubspaceOptimizer,
) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
    for group in optimizer.param_groups:
        for name, param in named_parameters(group, optimizer.param_groups):
            if param in optimizer.state:
                yield name, param, group


def _layer_report(
    name: str, param: Tensor, state: dict[str, Any], group: dict[str, Any]
) -> LayerReport:
    return LayerReport(
        name=name,
        shape=tuple(param.shape),
        rank=state["basis"].shape[-1],
        max_rank=rank_bounds(group, layout_for(param, group))[1],
        captured_energy=state["captured_energy"],
        steps_since_refresh=state["steps_since_refresh"],
        refresh_reason=RefreshReason(state["refresh_reason"]).name.lower(),
        num_refreshes=state["num_refreshes"],
        num_skipped_refreshes=state["num_skipped_refreshes"],
        state_bytes=tensor_bytes(state),
    )


def tensor_bytes(state: dict[str, Any]) -> int:
    """Bytes of a parameter's moments and basis: not of the tensors on the CPU, nor a correction."""
    uncounted = (*KEPT_ON_CPU, "correction")
    return sum(bytes_of(value) for key, value in state.items() if key not in uncounted)


def bytes_of(value: Any) -> int:
    """Bytes of a tensor, 0 of anything else."""
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0
