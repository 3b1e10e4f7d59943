"""Parameter groups from a model: which weights are projected, and which are left to AdamW."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..core.layers import is_transposed_linear
from ..core.memory import adam_state_bytes
from ..core.patterns import matching_names
from .matrix_state import layout_for
from .options import DEFAULT_MAX_RANK, correction_bytes, matrix_bytes, plain_bytes, resolve_rank
from .text_table import aligned, mib

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORM_NAME = re.compile(r"norm|(^|[._])ln(_|\d|\.|$)", re.IGNORECASE)
_HEAD_NAMES = {"lm_head", "embed_out", "output_head", "classifier", "score", "head", "out_head"}
_SMALLEST_SIDE = 8

Group = dict[str, Any]


def param_groups(
    model: nn.Module,
    *,
    max_rank: int | float | None = None,
    min_rank: int | float | None = None,
    energy: float | None = None,
    weight_decay: float | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    embeddings: Group | None = None,
    smallest_side: int = _SMALLEST_SIDE,
    **options: Any,
) -> list[Group]:
    """Split a model's trainable parameters into groups for a subspace optimizer.

    Projected: weights of linear and convolution layers, and stacked-expert weights of three axes
    outside convolutions, whose shorter side has at least ``smallest_side`` entries. Plain AdamW:
    embeddings and weights tied to them, the output head, norms, biases, and everything else. Norms
    and biases get no weight decay. A tied weight appears once.

    Args:
        model: any module.
        max_rank: rank ceiling of the projected groups; None leaves it to the optimizer.
        min_rank: rank floor, likewise.
        energy: energy threshold, likewise.
        weight_decay: of all groups but norms and biases; None leaves it to the optimizer.
        include: regular expressions searched in parameter names. Given, only matching weights
            are projected, whatever module they belong to, as long as they have two axes of
            ``smallest_side`` entries.
        exclude: regular expressions; matching weights are not projected.
        embeddings: given, embeddings and the output head are projected too, in a group of their own
            with these options beside those of the other projected groups, such as ``{"lr": 8e-3}``.
            None leaves them to AdamW.
        smallest_side: see above; at least 2.
        options: further options of the projected groups.

    Returns:
        Up to five groups of named parameters, empty ones left out: projected matrices, projected
        stacks, projected embeddings, plain weights, and parameters without decay.

    Raises:
        ValueError: if a pattern matches no parameter, ``include`` none that can be projected, the
            model has no trainable parameter, ``include`` comes with ``embeddings``, there are no
            embeddings to project, or ``smallest_side`` is below 2.
    """
    if smallest_side < 2:
        raise ValueError(f"smallest_side must be at least 2, got {smallest_side}")
    if include is not None and embeddings is not None:
        raise ValueError(
            f"include {include!r} and embeddings {embeddings!r} both say which weights are "
            "projected; give one of them"
        )
    # Reversed, so that a tied weight keeps its first name.
    plain_names = {id(param): name for name, _, param in reversed([*_layer_parameters(model)])}
    named = [
        (plain_names[id(param)] if "parametrizations." in name else name, param)
        for name, param in model.named_parameters()
        if param.requires_grad
    ]
    if not named:
        raise ValueError("the model has no parameter that requires a gradient; unfreeze some")
    include_names = None if include is None else matching_names(include, named, "include")
    exclude_names = matching_names(exclude, named, "exclude")
    embedding_ids = {id(param) for param in _embedding_and_head_weights(model)}
    candidates = _candidate_names(model, embedding_ids) if include_names is None else include_names
    convolutions = _names_in(model, nn.modules.conv._ConvNd)

    members: dict[str, list[tuple[str, Tensor]]] = {
        kind: [] for kind in ("matrices", "stacks", "embeddings", "plain", "undecayed")
    }
    for name, param in named:
        is_embedding = embeddings is not None and id(param) in embedding_ids
        is_candidate = (is_embedding or name in candidates) and name not in exclude_names
        is_stack = param.dim() > 2 and name not in convolutions and not is_embedding
        is_large = param.dim() >= 2 and _short_side(param, is_stack) >= smallest_side
        if is_candidate and is_large:
            kind = "embeddings" if is_embedding else "stacks" if is_stack else "matrices"
            members[kind].append((name, param))
        elif param.dim() < 2 or _NORM_NAME.search(name):
            members["undecayed"].append((name, param))
        else:
            members["plain"].append((name, param))

    if embeddings is not None and not members["embeddings"]:
        raise ValueError(
            f"embeddings {embeddings!r} asks for embeddings and head to be projected, and none has "
            f"two axes with at least {smallest_side} entries each; leave it out"
        )
    if include is not None and not (members["matrices"] or members["stacks"]):
        raise ValueError(
            f"include {include!r} matches no weight that can be projected: none has two axes with "
            f"at least {smallest_side} entries each; widen it, or lower smallest_side"
        )

    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    ranks = {"max_rank": max_rank, "min_rank": min_rank, "energy": energy}
    chosen = {name: value for name, value in ranks.items() if value is not None}
    projected = {"project": True, **decay, **chosen, **options}
    settings: dict[str, Group] = {
        "matrices": {**projected, "stacked": False},
        "stacks": {**projected, "stacked": True},
        "embeddings": {**projected, "stacked": False, **(embeddings or {})},
        "plain": {"project": False, **decay},
        "undecayed": {"project": False, "weight_decay": 0.0},
    }
    return [{"params": params, **settings[kind]} for kind, params in members.items() if params]


def describe(groups: Any, *, max_rank: int | float = DEFAULT_MAX_RANK) -> str:
    """Return a table of what is projected, at which rank ceiling, and what that saves.

    Args:
        groups: from `param_groups`, or an optimizer of ours, before or after its first step.
        max_rank: ceiling of groups that do not set one; an optimizer's groups all do.

    Returns:
        Lines of text: one for each projected weight with its bytes of state at the ceiling and
        AdamW's for the same weight, then totals in MiB (2**20 bytes).
    """
    group_list: list[Group] = getattr(groups, "param_groups", groups)
    rows: list[tuple[str, str, str, str, str]] = []
    held_corrections = 0
    ceiling_bytes = adamw_bytes = num_projected = num_plain = held_plain = 0
    for group in group_list:
        for name, param in _group_members(group):
            held_corrections += correction_bytes(param, group)
            full = adam_state_bytes(param.numel(), param.element_size())
            if not group.get("project", True) or param.dim() < 2:
                num_plain += param.numel()
                held_plain += plain_bytes(param, group)
                continue
            layout = layout_for(param, {"side": "short", "stacked": False, **group})
            has_basis = group.get("basis") != "none"
            rank = resolve_rank(group.get("max_rank", max_rank), layout) if has_basis else 0
            held = matrix_bytes(param, layout, rank, group)
            num_projected += param.numel()
            ceiling_bytes += held
            adamw_bytes += full
            shape = "x".join(map(str, param.shape))
            rows.append((name, shape, str(rank), mib(held), mib(full)))
    budget = group_list[0].get("memory_budget") if group_list else None
    header = ("projected weight", "shape", "max rank", "state MiB", "AdamW MiB")
    share = ceiling_bytes / adamw_bytes if adamw_bytes else 0.0
    return "\n".join(
        [
            *aligned([header, *rows]),
            f"projected: {num_projected:,} weights in {len(rows)} matrices, at most "
            f"{mib(ceiling_bytes)} MiB of state, {share:.0%} of AdamW's {mib(adamw_bytes)} MiB",
            *([] if budget is None else [f"together within the memory budget, {budget}"]),
            f"plain AdamW: {num_plain:,} weights, {mib(held_plain)} MiB of state",
            *([f"corrections: {mib(held_corrections)} MiB"] if held_corrections else []),
        ]
    )


def _candidate_names(model: nn.Module, kept_plain: set[int]) -> set[str]:
    """Names of weights that are projected by default, without those of some ids."""
    names = set()
    for name, module, param in _layer_parameters(model):
        short_name = name.rpartition(".")[2]
        is_linear = isinstance(module, nn.Linear) or is_transposed_linear(module)
        is_layer = is_linear or isinstance(module, _CONVOLUTIONS)
        is_stack = _is_stack_of_matrices(module, short_name, param)
        if ((is_layer and short_name == "weight") or is_stack) and id(param) not in kept_plain:
            names.add(name)
    return names


def _layer_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Yield every parameter with its name and the module that it is of.

    One behind an entrywise parametrization, which keeps what rows and columns mean, has the name
    and the module of the tensor it stands for.
    """
    entrywise: set[nn.Module] = set()
    for module_name, module in model.named_modules():
        prefix = f"{module_name}." if module_name else ""
        stages_of: Any = module.parametrizations if is_parametrized(module) else {}
        for tensor_name, stages in stages_of.items():
            if all(getattr(stage, "is_entrywise", False) for stage in stages):
                entrywise.add(stages)
                yield f"{prefix}{tensor_name}", module, stages.original
        if module not in entrywise:
            for short_name, param in module.named_parameters(recurse=False):
                yield f"{prefix}{short_name}", module, param


def _is_stack_of_matrices(module: nn.Module, short_name: str, param: Tensor) -> bool:
    """Stacked experts; not a convolution, however reparametrised, nor a position embedding."""
    is_other_layer = isinstance(
        module, (nn.modules.conv._ConvNd, nn.utils.parametrize.ParametrizationList)
    )
    is_embedding = re.search(r"embed|pos", short_name) is not None
    return param.dim() == 3 and param.shape[0] > 1 and not is_other_layer and not is_embedding


def _embedding_and_head_weights(model: nn.Module) -> Iterator[Tensor]:
    for name, module in model.named_modules():
        is_head = name.rpartition(".")[2] in _HEAD_NAMES
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or is_head:
            yield from module.parameters()
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    if isinstance(head, nn.Module):
        yield from head.parameters()


def _names_in(model: nn.Module, kind: type[nn.Module]) -> set[str]:
    return {name for name, module, _ in _layer_parameters(model) if isinstance(module, kind)}


def _short_side(param: Tensor, is_stack: bool) -> int:
    layout = layout_for(param, {"side": "short", "stacked": is_stack})
    return min(layout.num_rows, layout.num_cols)


def _group_members(group: Group) -> Iterator[tuple[str, Tensor]]:
    """Named members of a group as a user writes it or as an optimizer holds it."""
    if "param_names" in group:
        yield from zip(group["param_names"], group["params"], strict=True)
        return
    members = group["params"]
    for index, member in enumerate([members] if isinstance(members, torch.Tensor) else members):
        yield member if isinstance(member, tuple) else (f"parameter {index}", member)
