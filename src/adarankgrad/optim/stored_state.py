"""The forms that state is kept in between steps, and how a step reads and writes them.

Steps compute with float32 tensors (float64 under float64 weights). With ``state_dtype`` and
``basis_dtype`` at their defaults these are the state itself. Otherwise a step reads copies for as
long as it works on one weight, and the state holds bfloat16 tensors, or codes and, under
``KEY_scale``, their scales (`core.quantize`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..core.generators import generator_for
from ..core.quantize import SIGNED, UNSIGNED, Code, Quantized, dequantize, num_blocks, quantize
from ..core.rounding import round_stochastically

State = dict[str, Any]
Options = dict[str, Any]

_CODES = {"basis": SIGNED, "exp_avg": SIGNED, "exp_avg_sq": UNSIGNED}


def forms_of(options: Options) -> dict[str, str]:
    """Which entries of a projected weight's state are kept in which compact form."""
    wanted = {
        "basis": options["basis_dtype"],
        "exp_avg": options["state_dtype"],
        "exp_avg_sq": options["state_dtype"],
    }
    return {key: form for key, form in wanted.items() if form != "float32"}


def stored(
    values: Tensor, key: str, form: str, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Put values into a compact form: the entries of a state that hold them.

    Args:
        values: (..., n), blocks are of the last axis; of a basis (..., m, r), of the one before.
        key: of the entry, which says whether its values have a sign.
        form: ``bfloat16`` or ``int8``.
        generator: for rounding up or down at random; None rounds to the nearest.
    """
    code = _CODES[key]
    if form == "bfloat16":
        return {key: _to_bfloat16(values, code, generator)}
    is_basis = key == "basis"
    codes, scale = quantize(values.mT if is_basis else values, code, generator)
    return {key: codes.mT if is_basis else codes, f"{key}_scale": scale}


def zeros_stored(shape: torch.Size, key: str, form: str, device: torch.device) -> State:
    """Entries of a state that hold zeros in a compact form, in blocks of the flattened tensor."""
    if form == "bfloat16":
        return {key: torch.zeros(shape, dtype=torch.bfloat16, device=device)}
    return {
        key: torch.zeros(shape, dtype=_CODES[key].dtype, device=device),
        f"{key}_scale": torch.zeros(num_blocks(shape.numel()), device=device),
    }


def read(state: State, key: str, form: str, dtype: torch.dtype) -> Tensor:
    """Return the values of an entry, newly allocated."""
    entry: Tensor = state[key]
    if form == "bfloat16":
        return entry.to(dtype)
    is_basis = key == "basis"
    quantized = Quantized(entry.mT if is_basis else entry, state[f"{key}_scale"])
    values = dequantize(quantized, _CODES[key], dtype)
    return values.mT if is_basis else values


def is_stored_as(state: State, key: str, form: str, scale_shape: tuple[int, ...]) -> bool:
    """Tell whether an entry is in a form, with scales of this shape where it has any."""
    entry, scale = state[key], state.get(f"{key}_scale")
    if form == "int8":
        has_scale = scale is not None and scale.shape == scale_shape
        return has_scale and entry.dtype is _CODES[key].dtype
    if form == "bfloat16":
        return scale is None and entry.dtype is torch.bfloat16
    return scale is None and (entry.is_floating_point() or entry.is_complex())


@contextlib.contextmanager
def opened(state: State, options: Options, name: str) -> Iterator[State]:
    """A projected weight's state as a step computes with it; kept when the block ends well.

    With compact forms, that are copies of one weight's state while the block runs. A basis is
    rounded when it is replaced, to the nearest, moments after every step, at random.
    """
    forms = forms_of(options)
    if not forms:
        yield state
        return
    wide = as_computed(state, options)
    basis = wide["basis"]
    yield wide
    generator = generator_for(
        basis.device,
        options["seed"],
        f"{name}/moments/{wide['num_refreshes']}",
        wide["steps_since_refresh"],
    )
    if wide["basis"] is basis:
        forms.pop("basis", None)
        wide["basis"] = state["basis"]
    for key, form in forms.items():
        wide |= stored(wide[key], key, form, None if key == "basis" else generator)
    state.update(wide)


def as_computed(state: State, options: Options) -> State:
    """A projected weight's state with compact entries read, to look at only."""
    wide = dict(state)
    for key, form in forms_of(options).items():
        values = read(state, key, form, state["seen"].dtype)
        # Strides as `projection.project` returns coordinates: mixed ones would slow Adam down.
        is_basis = key == "basis"
        wide[key] = values.contiguous() if is_basis else values.mT.contiguous().mT
    return wide


def _to_bfloat16(values: Tensor, code: Code, generator: torch.Generator | None) -> Tensor:
    values = values.float().contiguous()
    if generator is None:
        return values.to(torch.bfloat16)
    rounded = round_stochastically(values, generator)
    if code.is_signed:
        return rounded
    # As in eight bits, what is positive stays so.
    return torch.where(values > 0, rounded.clamp_min(torch.finfo(torch.bfloat16).tiny), rounded)
