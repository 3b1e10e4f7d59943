"""One step of plain AdamW, for the weights that are not projected."""

from __future__ import annotations

import warnings
from collections import defaultdict
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..core.adam import SMALLEST_EPS, corrected_eps, weight_factors
from ..core.generators import generator_for
from ..core.quantize import BLOCK, num_blocks
from .stored_state import is_stored_as, read, stored, zeros_stored
from .weight_rounding import (
    CHUNK,
    Part,
    fits_correction,
    is_rounded,
    new_correction,
    rounding_generator,
)

Group = dict[str, Any]
State = dict[str, Any]

_MOMENTS = ("exp_avg", "exp_avg_sq")


def step_plain(group: Group, named_params: list[tuple[str, Tensor]], states: list[State]) -> None:
    """Update parameters in place by AdamW, in the convention of their group.

    Moments are kept in the weight's dtype, as torch does. Where ``state_dtype`` asks for another
    form, bfloat16 weights are not rounded to the nearest, or weights are float16 (in which squares
    of ordinary gradients overflow and eps vanishes), arithmetic is in float32 (`CHUNK` weights at a
    time) and so are moments, but for that form.

    Args:
        group: the parameter group.
        named_params: some of its parameters with their names, each with a dense gradient.
        states: theirs; made at a parameter's first step, modified in place.
    """
    listed: list[int] = []
    for index, ((name, param), state) in enumerate(zip(named_params, states, strict=True)):
        if not state:
            _warn_of_another_form(name, param, group)
            state.update(_new_state(param, group))
        if is_chunked(param, group):
            _step_in_chunks(group, name, param, state)
        else:
            listed.append(index)
    params = [named_params[index][1] for index in listed]
    grads = [cast(Tensor, param.grad) for param in params]
    _adamw(group, params, grads, [states[index] for index in listed])


def fits_plain(state: State, param: Tensor, group: Group) -> bool:
    """Tell whether a saved state is one that `step_plain` made for such a parameter."""
    scale_shape = (num_blocks(param.numel()),)
    has_moments = all(
        key in state
        and state[key].shape == param.shape
        and is_stored_as(state, key, _form(param, group), scale_shape)
        for key in _MOMENTS
    )
    return has_moments and fits_correction(state, param, group)


def _form(param: Tensor, group: Group) -> str:
    """What moments are kept in; those of complex weights stay as they are."""
    return "float32" if param.is_complex() else group["state_dtype"]


def is_chunked(param: Tensor, group: Group) -> bool:
    """Whether arithmetic is wider than what is kept, and so done for some weights at a time."""
    return _form(param, group) != "float32" or _is_wide(param, group)


def _warn_of_another_form(name: str, param: Tensor, group: Group) -> None:
    if _form(param, group) != group["state_dtype"]:
        warnings.warn(
            f"{name} {tuple(param.shape)} is complex; its moments are kept in {param.dtype}, not "
            f"as state_dtype={group['state_dtype']!r} says",
            stacklevel=5,
        )


def _is_wide(param: Tensor, group: Group) -> bool:
    return is_rounded(param, group) or param.dtype is torch.float16


def _new_state(param: Tensor, group: Group) -> State:
    state: State = {"step": torch.tensor(0.0), **new_correction(param, group)}
    form = _form(param, group)
    for key in _MOMENTS:
        if form != "float32":
            state |= zeros_stored(param.shape, key, form, param.device)
        elif _is_wide(param, group):
            state[key] = torch.zeros(param.shape, dtype=torch.float32, device=param.device)
        else:
            state[key] = torch.zeros_like(param, memory_format=torch.preserve_format)
    return state


def _step_in_chunks(group: Group, name: str, param: Tensor, state: State) -> None:
    """The same step in float32 or wider, of so many weights at a time."""
    form = _form(param, group)
    weights = param.contiguous().view(-1)
    grads = cast(Tensor, param.grad).contiguous().view(-1)
    count = int(state["step"])
    generator = generator_for(param.device, group["seed"], f"{name}/moments", count)
    weight_generator = rounding_generator(param, group, name, count)
    for start in range(0, param.numel(), CHUNK):
        held = _chunk_of(state, slice(start, start + CHUNK))
        part = Part(weights[start : start + CHUNK], held.get("correction"), weight_generator)
        values = part.read()
        computed = {"step": state["step"].clone()}
        for key in _MOMENTS:
            is_wide = form == "float32"
            computed[key] = held[key] if is_wide else read(held, key, form, values.dtype)
        _adamw(group, [values], [grads[start : start + CHUNK].to(values.dtype)], [computed])
        part.write(values)
        if form != "float32":
            for key in _MOMENTS:
                for entry, stored_values in stored(computed[key], key, form, generator).items():
                    held[entry].copy_(stored_values)
    state["step"] += 1
    if weights.data_ptr() != param.data_ptr():
        param.copy_(weights.view(param.shape))


def _chunk_of(state: State, chunk: slice) -> State:
    """Views of a part of a state, flattened."""
    blocks = slice(chunk.start // BLOCK, chunk.stop // BLOCK)
    return {
        key: entry[blocks] if key.endswith("_scale") else entry.view(-1)[chunk]
        for key, entry in state.items()
        if key != "step"
    }


def _adamw(group: Group, params: list[Tensor], grads: list[Tensor], states: list[State]) -> None:
    """Torch's own AdamW on a list of parameters, in the convention of their group."""
    if not params:
        return
    if group["adam_convention"] == "torch":
        eps, weight_decay = group["eps"], group["weight_decay"]
        _torch_adamw(group, params, grads, states, eps=eps, weight_decay=weight_decay)
        return
    _, beta2 = group["betas"]
    of_step: dict[int, list[int]] = defaultdict(list)
    for index, state in enumerate(states):
        of_step[int(state["step"]) + 1].append(index)
    for step, members in of_step.items():
        eps = corrected_eps(group["eps"], "transformers", step=step, beta2=beta2)
        _torch_adamw(
            group,
            [params[i] for i in members],
            [grads[i] for i in members],
            [states[i] for i in members],
            eps=eps,
        )
    factor, _ = weight_factors(float(group["lr"]), group["weight_decay"], "transformers")
    if factor != 1.0:
        torch._foreach_mul_(params, factor)


def _torch_adamw(
    group: Group,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[State],
    *,
    eps: float,
    weight_decay: float = 0.0,
) -> None:
    beta1, beta2 = group["betas"]
    adamw(
        params,
        grads,
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
        eps=max(eps, SMALLEST_EPS),
        maximize=False,
    )
