"""The optimizers that training knows by name; adding one is one entry in `OPTIMIZERS`.

A name with a dot is the class of another package (`dotted_path`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adarankgrad.optim import (
    AdaGradNorm,
    AdaRankGrad,
    Fira,
    GaLore,
    OrthogonalizedSGD,
    param_groups,
)
from adarankgrad.optim.engine import SubspaceOptimizer
from adarankgrad.optim.matrix_state import layout_for
from adarankgrad.optim.options import DEFAULT_MAX_RANK
from adarankgrad.train.dotted_path import (
    GROUP_ARGUMENT,
    build_paired,
    load_optimizer_class,
    own_default_lr,
)
from adarankgrad.train.errors import UserError, unknown_name
from adarankgrad.train.powered import powered_groups
from adarankgrad.train.run_config import RunConfig, flag_of

_SET_BY_FLAGS = ("lr", "weight_decay", "max_rank", "min_rank", "energy", "seed")
_SET_BY_GROUPS = ("project", "stacked")
# What torch's AdamW takes, but training here cannot honour.
_NOT_FOR_TRAINING = ("capturable", "differentiable", "maximize")
_RANK_SETTINGS = ("max_rank", "min_rank", "energy")
# What --accumulate-in-backward implies where --optimizer-args does not say otherwise.
_FOR_ACCUMULATION = {"adarankgrad": {"basis": "sketched"}}


@dataclass(frozen=True)
class OptimizerSpec:
    """How training builds one optimizer.

    Attributes:
        build: From groups of `param_groups` and keyword arguments to the optimizer.
        signatures: The callables whose parameters ``--optimizer-args`` may set.
        default_lr: Peak learning rate when none is given; None if one must be.
        default_plain_lr: The same for weights that are not projected.
        is_low_rank: Takes rank settings; for others they only say which weights to report as
            projected.
        more_arguments: What ``--optimizer-args`` may set besides.
        projects_embeddings: Projects embeddings and head as well, at the rate of plain weights.
    """

    build: Callable[..., Optimizer]
    signatures: tuple[Callable[..., Any], ...]
    default_lr: float | None
    default_plain_lr: float
    is_low_rank: bool
    more_arguments: tuple[str, ...] = ()
    projects_embeddings: bool = False


@dataclass(frozen=True)
class StateSizes:
    """What an optimizer holds, and its ranks where it has any.

    Attributes:
        state_bytes: All optimizer state, but for corrections.
        projected_state_bytes: State of the weights that low-rank methods project.
        adamw_projected_state_bytes: What AdamW would hold for the same weights.
        mean_rank: Over projected weights, or None.
        layers: One plain dict per projected weight, empty without ranks.
        correction_bytes: The last eight bits of weights of 24 bits.
    """

    state_bytes: int
    projected_state_bytes: int
    adamw_projected_state_bytes: int
    mean_rank: float | None
    layers: list[dict[str, Any]]
    correction_bytes: int = 0


def _adamw(groups: list[dict[str, Any]], *, lr: float, **options: Any) -> Optimizer:
    decay = options.pop("weight_decay", 0.0)
    return torch.optim.AdamW(
        [
            {
                "params": group["params"],
                "weight_decay": group.get("weight_decay", decay),
                "lr": group.get("lr", lr),
            }
            for group in groups
        ],
        lr=lr,
        **options,
    )


def _adagrad_norm(groups: list[dict[str, Any]], *, lr: float, **options: Any) -> Optimizer:
    known = ("params", "lr", "weight_decay")
    return AdaGradNorm([{n: g[n] for n in known if n in g} for g in groups], lr=lr, **options)


def _published(groups: list[dict[str, Any]], **options: Any) -> Optimizer:
    return AdaRankGrad.published(groups, **{"max_rank": DEFAULT_MAX_RANK, **options})


DEFAULT_PLAIN_LR = 8e-3

# Near the best of benchmarks/pretrain_small.py, for a model of that size, and the lower of two that
# are close. GaLore's and Fira's are their papers', AdaGradNorm's is not tuned.
OPTIMIZERS: dict[str, OptimizerSpec] = {
    "adarankgrad": OptimizerSpec(AdaRankGrad, (AdaRankGrad,), 4e-3, DEFAULT_PLAIN_LR, True),
    "adarankgrad-published": OptimizerSpec(
        _published, (AdaRankGrad.published, AdaRankGrad), 4e-3, DEFAULT_PLAIN_LR, True
    ),
    "adarankgrad-low-memory": OptimizerSpec(
        AdaRankGrad.low_memory,
        (AdaRankGrad.low_memory, AdaRankGrad),
        4e-3,
        DEFAULT_PLAIN_LR,
        True,
        projects_embeddings=True,
    ),
    "galore": OptimizerSpec(GaLore, (GaLore,), 1e-2, DEFAULT_PLAIN_LR, True),
    "fira": OptimizerSpec(Fira, (Fira,), 1e-2, DEFAULT_PLAIN_LR, True),
    "orthogonalized-sgd": OptimizerSpec(
        OrthogonalizedSGD, (OrthogonalizedSGD,), 8e-3, DEFAULT_PLAIN_LR, True
    ),
    "adagrad-norm": OptimizerSpec(_adagrad_norm, (AdaGradNorm,), 1.0, 1.0, False),
    "adamw": OptimizerSpec(_adamw, (torch.optim.AdamW,), 1e-3, DEFAULT_PLAIN_LR, False),
}


def find_optimizer(name: str) -> OptimizerSpec:
    """Look an optimizer up, by name or by dotted path.

    Raises:
        UserError: There is none of that name.
    """
    check_optimizer_name(name)
    return OPTIMIZERS[name] if name in OPTIMIZERS else _of_another_package(name)


def check_optimizer_name(
    name: str, *, what: str = "optimizer", others: tuple[str, ...] = ()
) -> None:
    """See that a name is one of ours or a dotted path, which is not imported.

    Args:
        name: The name.
        what: What is asked for, for the message.
        others: Further names to suggest.

    Raises:
        UserError: It is neither.
    """
    if name not in OPTIMIZERS and "." not in name.strip("."):
        known = [*OPTIMIZERS, *others]
        raise unknown_name(what, name, known, hint=", or the dotted path of a class")


def allowed_arguments(spec: OptimizerSpec) -> set[str]:
    """Return the names of what may be set besides the weights."""
    names = set()
    for function in spec.signatures:
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                names.add(parameter.name)
    return (names | set(spec.more_arguments)) - {"params", *_SET_BY_GROUPS, *_NOT_FOR_TRAINING}


def _of_another_package(path: str) -> OptimizerSpec:
    optimizer_class = load_optimizer_class(path)
    return OptimizerSpec(
        functools.partial(build_paired, optimizer_class),
        (optimizer_class,),
        own_default_lr(optimizer_class),
        DEFAULT_PLAIN_LR,
        False,
        (GROUP_ARGUMENT,),
    )


def group_parameters(model: nn.Module, config: RunConfig) -> list[dict[str, Any]]:
    """Divide a model's parameters into projected and plain ones, the same for every optimizer.

    Raises:
        UserError: A rank setting does not fit any projected matrix.
    """
    settings = _given(config, _RANK_SETTINGS)
    plain = {} if config.plain_lr is None else {"lr": config.plain_lr}
    if find_optimizer(config.optimizer).projects_embeddings:
        settings["embeddings"] = plain
    try:
        groups = param_groups(model, weight_decay=config.weight_decay, **settings)
    except ValueError as error:
        raise UserError(f"{error}") from error
    check_ranks_fit(config, groups, trained=config.model, advice="choose a larger model")
    for group in groups:
        if not group["project"]:
            group.update(plain)
    return powered_groups(groups, model, config)


def projected_parameters(groups: list[dict[str, Any]]) -> list[Tensor]:
    """Return the tensors of the projected groups."""
    return [
        entry[1] if isinstance(entry, tuple) else entry
        for group in groups
        if group.get("project")
        for entry in group["params"]
    ]


def build_optimizer(groups: list[dict[str, Any]], config: RunConfig) -> Optimizer:
    """Build the optimizer of a run.

    Args:
        groups: From `group_parameters`.
        config: The settings, with the learning rate decided.

    Raises:
        UserError: The optimizer refuses a setting, or has no argument of that name.
    """
    spec = find_optimizer(config.optimizer)
    allowed = allowed_arguments(spec)
    implied = dict(config.implied_arguments.get(config.optimizer, {}))
    if config.accumulate_in_backward:
        implied |= _FOR_ACCUMULATION.get(config.optimizer, {})
    extra = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in {**implied, **config.optimizer_args}.items()
    }
    for name in extra:
        if name in _SET_BY_FLAGS:
            raise UserError(f"set {name} by {flag_of(name)}, not by --optimizer-args.")
        if name not in allowed:
            raise unknown_name(
                f"argument of {config.optimizer}", name, sorted(allowed - set(_SET_BY_FLAGS))
            )
    settings = {"lr": config.lr, "weight_decay": config.weight_decay, "seed": config.seed}
    if spec.is_low_rank:
        settings.update(_given(config, _RANK_SETTINGS))
        _refuse_missing(config, settings, allowed)
    settings = {name: value for name, value in settings.items() if name in allowed}
    try:
        return spec.build(groups, **settings, **extra)
    except Exception as error:  # torch's own checks raise several kinds
        raise UserError(f"{config.optimizer} refuses its arguments: {error}") from error


def accumulate_gradients(optimizer: Optimizer, model: nn.Module, config: RunConfig) -> None:
    """Project gradients in the backward pass, where the settings ask for it.

    Raises:
        UserError: The optimizer needs whole gradients.
    """
    if not config.accumulate_in_backward:
        return
    try:
        if not isinstance(optimizer, SubspaceOptimizer):
            raise ValueError("it needs whole gradients")
        optimizer.accumulate_in_backward(model, num_micro_batches=config.gradient_accumulation)
    except ValueError as error:
        raise UserError(
            f"{config.optimizer} cannot be trained with --accumulate-in-backward: {error}. Leave "
            "it out, or take --optimizer adarankgrad."
        ) from error


def measure_state(optimizer: Optimizer, projected: list[Tensor]) -> StateSizes:
    """Measure what an optimizer holds now.

    Args:
        optimizer: From `build_optimizer`.
        projected: The weights to count as projected where the optimizer itself does not say.
    """
    if isinstance(optimizer, SubspaceOptimizer):
        report = optimizer.report()
        layers = report.as_dict()["layers"]
        for layer in layers:
            layer["shape"] = list(layer["shape"])
            del layer["state_bytes"]
        return StateSizes(
            report.state_bytes - report.correction_bytes,
            report.projected_state_bytes,
            report.adamw_projected_state_bytes,
            report.mean_rank,
            list(layers),
            report.correction_bytes,
        )
    return StateSizes(
        state_bytes=sum(held_bytes(state) for state in optimizer.state.values()),
        projected_state_bytes=sum(
            held_bytes(optimizer.state[weight]) for weight in projected if weight in optimizer.state
        ),
        adamw_projected_state_bytes=sum(2 * w.numel() * w.element_size() for w in projected),
        mean_rank=None,
        layers=[],
    )


def count_skipped_steps(optimizer: Optimizer) -> int | None:
    """Count steps left out because gradients were not finite; None if the optimizer leaves none."""
    count = optimizer.param_groups[0].get("num_skipped_steps")
    return None if count is None else int(count)


def widen_corrected_weights(model: nn.Module, optimizer: Optimizer) -> None:
    """Give a bfloat16 model the float32 weights that its optimizer holds, where it holds any.

    Training cannot go on afterwards.
    """
    if not isinstance(optimizer, SubspaceOptimizer):
        return
    if any("correction" in state for state in optimizer.state.values()):
        weights = optimizer.master_weights(model)
        model.float()
        model.load_state_dict(weights)


def held_bytes(value: Any) -> int:
    """Bytes of the tensors in a value: in lists, tables, quantised tensors, an object's attributes.

    Tensors of one element are left out: they are counters, which torch keeps on the CPU.
    """
    if isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__"):
            return sum(held_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
        return value.numel() * value.element_size() if value.numel() > 1 else 0
    if isinstance(value, dict):
        return sum(map(held_bytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(held_bytes, value))
    attributes = getattr(value, "__dict__", {}).values()
    return sum(held_bytes(item) for item in attributes if isinstance(item, Tensor | list | tuple))


def _given(config: RunConfig, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names if getattr(config, name) is not None}


def _refuse_missing(config: RunConfig, settings: dict[str, Any], allowed: set[str]) -> None:
    for name in _RANK_SETTINGS:
        if name in settings and name not in allowed:
            raise UserError(
                f"{config.optimizer} has no {name}: leave {flag_of(name)} out{_hint(allowed)}."
            )


def _hint(allowed: set[str]) -> str:
    return "; its rank is set by --optimizer-args rank=..." if "rank" in allowed else ""


def check_ranks_fit(
    config: RunConfig, groups: list[dict[str, Any]], *, trained: str, advice: str
) -> None:
    """Refuse ranks that no projected matrix has, and a floor above the ceiling.

    Args:
        config: The settings.
        groups: What is trained.
        trained: What it is, for messages.
        advice: How to have weights that are worth projecting.

    Raises:
        UserError: A rank does not fit, or a low-rank optimizer would project nothing.
    """
    short_sides = [
        min(layout.num_rows, layout.num_cols)
        for group in groups
        for weight in projected_parameters([group])
        for layout in [layout_for(weight, {"side": "short", "stacked": group["stacked"]})]
    ]
    if not short_sides:
        if find_optimizer(config.optimizer).is_low_rank:
            raise UserError(
                f"{trained} has no weight worth projecting, so {config.optimizer} would be "
                f"plain AdamW: {advice} or --optimizer adamw."
            )
        return
    largest = max(short_sides)
    for name in ("max_rank", "min_rank"):
        rank = getattr(config, name)
        if isinstance(rank, int) and rank > largest:
            raise UserError(
                f"{name} = {rank} is above the short side of every projected matrix of "
                f"{trained}, at most {largest}: lower it, or give a share such as 0.25."
            )
    if config.max_rank is not None and config.min_rank is not None:
        low, high = (_columns(rank, largest) for rank in (config.min_rank, config.max_rank))
        if low > high:
            raise UserError(f"min_rank = {config.min_rank} is above max_rank = {config.max_rank}.")


def _columns(rank: int | float, short_side: int) -> float:
    return rank if isinstance(rank, int) else rank * short_side
