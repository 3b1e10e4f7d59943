"""What PRILoRA and SoRA share: settings, targets, layers, and loading of plain LoRA adapters."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..core.checks import check_number
from ..core.patterns import check_pattern_settings

ADAPTER_NAME = "default"
"""The name peft gives to the only adapter of a model, which ours is."""

_CONFIG_NAME = "adapter_config.json"
_WEIGHTS_NAME = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
"""Of the base model's names inside a `peft.PeftModel`."""


@dataclass(kw_only=True)
class LoraSettings:
    """What every LoRA has, under peft's names.

    Attributes:
        target_modules: ``"all-linear"``, another regular expression, or module names, as in peft.
        exclude_modules: names or a regular expression of modules to leave alone.
        modules_to_save: names of modules trained in full and saved, such as a new head.
        task_type: peft's, such as ``"CAUSAL_LM"`` or ``"SEQ_CLS"``, which adds the head to
            ``modules_to_save``.
        dropout: of the inputs of A, in [0, 1).

    Raises:
        ValueError: if a setting is out of range, or no pattern.
    """

    target_modules: str | Sequence[str] = "all-linear"
    exclude_modules: str | Sequence[str] | None = None
    modules_to_save: str | Sequence[str] | None = None
    task_type: str | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_number("dropout", self.dropout, low=0.0, high=1.0, is_high_allowed=False)
        check_pattern_settings(self, ("target_modules", "exclude_modules", "modules_to_save"))

    def peft_arguments(self) -> dict[str, Any]:
        """Return these settings as arguments of `peft.LoraConfig`."""
        return {
            "target_modules": _as_peft_list(self.target_modules),
            "exclude_modules": _as_peft_list(self.exclude_modules),
            "modules_to_save": self._names_to_save(),
            "task_type": self.task_type,
            "lora_dropout": self.dropout,
        }

    def _names_to_save(self) -> list[str] | None:
        """Return names, of which a single one may be given as text; peft would take its letters."""
        names = _as_peft_list(self.modules_to_save)
        return [names] if isinstance(names, str) else names


def targeted_modules(model: nn.Module, config: LoraConfig) -> list[str]:
    """Return the names of the modules that a configuration targets, in the model's order.

    ``"all-linear"`` in the configuration is replaced by names.

    Raises:
        ValueError: if there is none, a name or a pattern of the configuration fits no module, or
            the model carries an adapter already.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            "the model carries a peft adapter already; merge it (merge_and_unload) or start from "
            "the base model"
        )
    wanted = config.target_modules
    _maybe_include_all_linear_layers(config, model)
    # The name "" is the model itself, which cannot be replaced in a parent.
    names = [name for name, _ in model.named_modules() if name]
    targeted = [name for name in names if check_target_module_exists(config, name)]
    if not targeted:
        linear = [name for name in names if isinstance(model.get_submodule(name), nn.Linear)]
        is_pattern = isinstance(wanted, str)
        advice = f"; to name modules by the ends of names, give [{wanted!r}]" if is_pattern else ""
        examples = f", such as {', '.join(linear[:3])}" if linear else ""
        raise ValueError(
            f"target_modules {wanted!r} match no module; the model has {len(linear)} linear layers"
            f"{examples}{advice}"
        )
    for argument in ("target_modules", "exclude_modules", "modules_to_save"):
        _check_fits_some_module(argument, getattr(config, argument), names)
    return targeted


def _check_fits_some_module(argument: str, given: Any, names: Sequence[str]) -> None:
    """Refuse a pattern that matches no module's whole name, and a name that is no module's end."""
    if isinstance(given, str) and given:
        if not any(re.fullmatch(given, name) for name in names):
            raise ValueError(
                f"{argument} {given!r} matches no module's whole name, such as {names[-1]!r}; "
                f"to name modules by the ends of names, give [{given!r}]"
            )
        return
    for entry in given or ():
        if not any(name == entry or name.endswith(f".{entry}") for name in names):
            raise ValueError(
                f"{argument} names {entry!r}, and the model has no module of this name, nor one "
                "whose name ends in it after a dot"
            )


def check_linear(model: nn.Module, names: Sequence[str], method: str) -> None:
    """Refuse targets that are no linear layers.

    Raises:
        ValueError: naming the first such module and its type.
    """
    for name in names:
        module = model.get_submodule(name)
        if not isinstance(module, (nn.Linear, Conv1D)):
            raise ValueError(
                f"{method} adapts linear layers only, but target_modules match {name!r}, a "
                f"{type(module).__name__}; narrow target_modules, or name it in exclude_modules"
            )


def add_lora(model: nn.Module, config: LoraConfig, names: Sequence[str]) -> PeftModel:
    """Return the model with LoRA layers on the named modules, which the configuration targets.

    Their trainable weights are float32 or wider.
    """
    config.fan_in_fan_out = any(isinstance(model.get_submodule(name), Conv1D) for name in names)
    return get_peft_model(model, config, adapter_name=ADAPTER_NAME)


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Return the LoRA layers of a model by their names in the base model.

    Raises:
        ValueError: if it has none.
    """
    layers = {
        name.removeprefix(PEFT_PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    if not layers:
        raise ValueError("the model has no LoRA layers; call apply first")
    return layers


def factor_a(layer: LoraLayer) -> Any:
    """Return the module that holds a layer's A."""
    return layer.lora_A[ADAPTER_NAME]


def exact_pattern(module_name: str) -> str:
    """Return a key of ``rank_pattern`` that matches one module and no other."""
    return f"^{re.escape(module_name)}"


def exact_targets(model: nn.Module, names: list[str]) -> list[str] | str:
    """Return ``target_modules`` that match these modules of the base model and no others.

    The names themselves; a regular expression where peft, to which a name is the end of one too,
    would find another module by one of them.
    """
    others = {name.removeprefix(PEFT_PREFIX) for name, _ in model.named_modules()} - set(names)
    endings = tuple(f".{name}" for name in names)
    if any(other.endswith(endings) for other in others):
        return "|".join(map(re.escape, names))
    return names


def load_lora(base_model: nn.Module, folder: str | PathLike[str]) -> PeftModel:
    """Load a plain LoRA adapter, checked against the model before anything is changed.

    Raises:
        ValueError: if the folder holds none, a damaged one, one with gates, or one of another base
            model.
    """
    path = Path(folder)
    _check_files(path)
    shapes = _saved_shapes(path / _WEIGHTS_NAME)
    if any(name.endswith("lora_gate") for name in shapes):
        raise ValueError(
            f"{path} holds gates: it is a checkpoint of SoRA, to resume from; load what "
            "adapters.sora.export writes"
        )
    modules = dict(base_model.named_modules())
    for name, shape in shapes.items():
        module_name, _, kind = name.removeprefix(PEFT_PREFIX).rpartition(".lora_")
        if kind in ("A.weight", "B.weight"):
            _check_fits(modules.get(module_name), module_name, kind, shape)
    return PeftModel.from_pretrained(base_model, str(path), adapter_name=ADAPTER_NAME)


def _as_peft_list(names: str | Sequence[str] | None) -> str | list[str] | None:
    return names if names is None or isinstance(names, str) else list(names)


def _check_files(path: Path) -> None:
    for name in (_CONFIG_NAME, _WEIGHTS_NAME):
        if not (path / name).is_file():
            raise ValueError(f"{path} holds no adapter of peft: {name} is missing")
    kind = json.loads((path / _CONFIG_NAME).read_text(encoding="utf-8")).get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{path} holds an adapter of type {kind!r}, not a LoRA")


def _saved_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _check_fits(module: nn.Module | None, name: str, kind: str, shape: tuple[int, ...]) -> None:
    """Compare one factor's outer side with the layer it is for."""
    hint = "the adapter belongs to another base model"
    if module is None:
        raise ValueError(f"the model has no module {name!r}; {hint}")
    weight = getattr(module, "weight", None)
    if weight is None or weight.dim() != 2:
        return
    out_features, in_features = weight.T.shape if isinstance(module, Conv1D) else weight.shape
    have, want = (in_features, shape[1]) if kind == "A.weight" else (out_features, shape[0])
    # Quantised weights are packed, so that their shape says nothing.
    if weight.is_floating_point() and have != want:
        side = "inputs" if kind == "A.weight" else "outputs"
        raise ValueError(f"{name!r} has {have} {side}, the adapter's {want}; {hint}")
