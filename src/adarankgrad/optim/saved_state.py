"""Whether a saved state fits an optimizer, found out before anything of it is replaced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .matrix_state import KEPT_ON_CPU, fits_matrix, is_matrix_to_project
from .options import STATE_VERSION
from .plain_step import fits_plain

Group = dict[str, Any]


def check_saved_groups(groups: list[Group], saved_groups: list[Group]) -> None:
    """See that saved groups are of the same optimizer, a known version and the same sizes.

    Raises:
        ValueError: naming what differs.
    """
    sizes = [len(group["params"]) for group in groups]
    saved_sizes = [len(group["params"]) for group in saved_groups]
    if sizes != saved_sizes:
        raise ValueError(
            "the saved optimizer has parameter groups of other sizes: "
            f"saved {saved_sizes}, here {sizes}; build the groups as they were when it was saved"
        )
    for group, saved in zip(groups, saved_groups, strict=True):
        method = saved.get("method", group["method"])
        if method != group["method"]:
            raise ValueError(
                f"the saved state is of {method}, this optimizer is {group['method']}; load it "
                f"into {method}, or start this one afresh"
            )
        version = saved.get("state_version", STATE_VERSION)
        if version > STATE_VERSION:
            raise ValueError(
                f"the saved state has format version {version}, and this adarankgrad reads up to "
                f"{STATE_VERSION}: it was saved by a newer one; update adarankgrad"
            )


def check_state_fits(state: Group, param: Tensor, group: Group, name: str) -> None:
    """See that a step could start from the saved state of one weight.

    Raises:
        ValueError: if it is of another optimizer, shape, side or form.
    """
    if is_matrix_to_project(param, group):
        fits = fits_matrix(state, param, group)
    else:
        fits = "basis" not in state and fits_plain(state, param, group)
    if not fits:
        raise ValueError(
            f"the saved state of {name} {tuple(param.shape)} is of another optimizer, shape, side "
            "or form; load it into an optimizer built as the one that was saved, and into weights "
            "of the same dtype"
        )


def copied_to(value: Any, device: torch.device) -> Any:
    """A copy of one parameter's state on the parameter's device, dtypes kept."""
    copied = {}
    for key, entry in value.items():
        if isinstance(entry, Tensor):  # torch's AdamW wants its step tensor where it was
            stays = key in KEPT_ON_CPU
            entry = entry.clone() if stays else entry.to(device, copy=True)
        copied[key] = entry
    return copied
