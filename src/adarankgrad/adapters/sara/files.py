"""SaRA's adapter on disk: positions and values of the selected weights, for one base model.

``sara.safetensors`` holds ``NAME.indices`` and ``NAME.values`` for each tensor trained in part, and
``NAME`` for each trained in full; ``sara_config.json`` shapes, and checksums of the base's entries.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...core.checks import check_number
from .checksum import checksum
from .small_weights import all_sites, present_values, put_entries_, sites

FORMAT_VERSION = 1
_CONFIG_NAME = "sara_config.json"
_WEIGHTS_NAME = "sara.safetensors"


def export_values(model: nn.Module, folder: str | PathLike[str]) -> None:
    """Write what was trained; the model stays as it is.

    Raises:
        ValueError: if the model carries no SaRA.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    described: dict[str, Any] = {}
    for site in sites(model):
        tensors[f"{site.name}.indices"] = site.small.indices.cpu()
        tensors[f"{site.name}.values"] = present_values(site).cpu()
        described[site.name] = {
            "shape": list(site.base.shape),
            "base_checksum": site.small.base_checksum,
            "threshold": site.small.threshold,
        }
    values = {id(site.small.values) for site in sites(model)}
    for name, param in model.named_parameters():
        if param.requires_grad and id(param) not in values:
            tensors[name] = param.detach().cpu().clone()
            described[name] = {"shape": list(param.shape)}
    save_file(tensors, path / _WEIGHTS_NAME, metadata={"format": "pt"})
    config = {"method": "sara", "format_version": FORMAT_VERSION, "tensors": described}
    (path / _CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def load_sum(
    base_model: nn.Module,
    scales: Mapping[str | PathLike[str], float],
    *,
    check_base: bool = True,
) -> nn.Module:
    """Add scaled adapters to the model they were all trained from: P₀ + Σ aᵢ ΔPᵢ.

    Args:
        base_model: changed in place, after everything was checked.
        scales: factor by folder; 1 alone gives the tuned weights bit for bit, 0 the base.
        check_base: compare the base's entries with those that were trained from. Without it,
            an adapter goes on any model of the same shapes, or the same model in another dtype.

    Returns:
        The model, without any trace of SaRA but its weights.

    Raises:
        ValueError: if a folder holds no SaRA adapter, a damaged one, or one of another base model,
            a scale is not a number, or the model carries SaRA already.
    """
    if next(all_sites(base_model), None) is not None:
        raise ValueError("the model carries SaRA already; load on the base model")
    params = dict(base_model.named_parameters(remove_duplicate=False))
    adapters = []
    for folder, scale in scales.items():
        check_number(f"scale of {folder}", scale, low=float("-inf"))
        adapter = _read(Path(folder))
        _check_base(params, adapter, Path(folder), check_entries=check_base)
        adapters.append((adapter, scale))
    starts = [_entries(params, adapter) for adapter, _ in adapters]
    for (adapter, scale), start in zip(adapters, starts, strict=True):
        for name, tensor in adapter.items():
            _move(params[name].data, tensor, start[name], scale)
    return base_model


class _Tensor:
    """One tensor of an adapter: its final values, at some places or everywhere."""

    def __init__(self, values: Tensor, indices: Tensor | None, described: dict[str, Any]) -> None:
        self.values = values.flatten()
        self.places = None if indices is None else indices.long().flatten()
        self.shape = tuple(described["shape"])
        self.base_checksum: int | None = described.get("base_checksum")

    def fault(self) -> str | None:
        """Return what does not fit together, or None."""
        size = math.prod(self.shape)
        expected = size if self.places is None else len(self.places)
        if len(self.values) != expected:
            whole = f"shape {self.shape}" if self.places is None else f"{expected} indices"
            return f"has {len(self.values)} values for {whole}"
        if self.places is not None and len(self.places):
            low, high = int(self.places.min()), int(self.places.max())
            if low < 0 or high >= size:
                return f"has indices from {low} to {high}, and shape {self.shape} allows 0 to " + (
                    f"{size - 1}"
                )
        return None


_Adapter = dict[str, _Tensor]


def _read(path: Path) -> _Adapter:
    for name in (_CONFIG_NAME, _WEIGHTS_NAME):
        if not (path / name).is_file():
            raise ValueError(f"{path} holds no adapter of SaRA: {name} is missing")
    described_by_name = _read_config(path / _CONFIG_NAME)
    try:
        saved = load_file(path / _WEIGHTS_NAME)
    except SafetensorError as error:
        raise ValueError(f"{path / _WEIGHTS_NAME} is damaged: {error}") from error
    adapter = {}
    for name, described in described_by_name.items():
        key = f"{name}.values" if f"{name}.indices" in saved else name
        if key not in saved:
            raise ValueError(f"{path / _WEIGHTS_NAME} has no {key!r}, which {_CONFIG_NAME} names")
        adapter[name] = _Tensor(saved[key], saved.get(f"{name}.indices"), described)
        fault = adapter[name].fault()
        if fault is not None:
            raise ValueError(f"{path / _WEIGHTS_NAME} is damaged: {name!r} {fault}")
    return adapter


def _read_config(path: Path) -> dict[str, dict[str, Any]]:
    """Return what is described of each tensor."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        method, version = config["method"], config["format_version"]
        if method != "sara" or not 1 <= version <= FORMAT_VERSION:
            raise ValueError(
                f"{path} is of method {method!r}, format {version!r}; this version reads 'sara' up "
                f"to {FORMAT_VERSION}"
            )
        tensors: dict[str, dict[str, Any]] = config["tensors"]
        for described in tensors.values():
            math.prod(described["shape"])
        return tensors
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no description of an adapter of SaRA, as sara.export writes it: "
            f"{type(error).__name__}: {error}"
        ) from error


def _check_base(
    params: Mapping[str, Tensor], adapter: _Adapter, path: Path, *, check_entries: bool
) -> None:
    """Compare names and shapes; if asked, the entries that were selected."""
    for name, tensor in adapter.items():
        if name not in params:
            raise ValueError(f"the model has no {name!r}; {path} belongs to another base model")
        shape = tuple(params[name].shape)
        if shape != tensor.shape:
            raise ValueError(
                f"{name!r} has shape {shape}, the adapter's {tensor.shape}; {path} belongs to "
                "another base model"
            )
    if not check_entries:
        return
    for name, tensor in adapter.items():
        if tensor.places is None:
            continue
        if checksum(_gather(params[name], tensor)) != tensor.base_checksum:
            raise ValueError(
                f"{name!r} is not what {path} was trained from: another base model, one that was "
                "changed, or another dtype; check_base=False loads it nevertheless"
            )


def _entries(params: Mapping[str, Tensor], adapter: _Adapter) -> dict[str, Tensor]:
    return {name: _gather(params[name].data, tensor) for name, tensor in adapter.items()}


def _gather(param: Tensor, tensor: _Tensor) -> Tensor:
    if tensor.places is None:
        return param.flatten().clone()
    return param.take(tensor.places.to(param.device))


def _move(param: Tensor, tensor: _Tensor, start: Tensor, scale: float) -> None:
    """Move entries by ``scale`` times their way from the base, exactly at 0 and 1."""
    dtype = torch.promote_types(param.dtype, tensor.values.dtype)
    begin = start.to(dtype)
    moved = torch.lerp(begin, tensor.values.to(param.device, dtype), scale)
    present = _gather(param, tensor)
    # Where another adapter has moved an entry before, the ways add up.
    moved = torch.where(present == start, moved, present.to(dtype) + (moved - begin))
    if tensor.places is None:
        param.copy_(moved.reshape(param.shape))
    else:
        put_entries_(param, tensor.places.to(param.device), moved.to(param.dtype))
