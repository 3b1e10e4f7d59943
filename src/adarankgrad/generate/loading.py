"""A causal language model and its tokenizer from a folder: a model's, an adapter's or a run's."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adarankgrad.fetch.advice import advice_for_missing
from adarankgrad.train.errors import UserError
from adarankgrad.train.folder import MODEL_FOLDER
from adarankgrad.train.hub import ask_for_model, is_hub_name
from adarankgrad.train.presets import first_line, load_causal_lm
from adarankgrad.train.quiet import peft_warnings_ignored
from adarankgrad.train.tokenizer import read_tokenizer

_CONFIG = "config.json"
_ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class LanguageModel:
    """A model ready to generate.

    Attributes:
        model: On the CPU, in the type its weights are stored in.
        tokenizer: Its tokenizer.
    """

    model: Any
    tokenizer: Any


def load_language_model(folder: Path, *, trust_remote_code: bool = False) -> LanguageModel:
    """Load a causal language model, with its adapter where the folder holds one.

    Args:
        folder: Of a model, of a peft adapter, or of a run that has either in ``model``.
        trust_remote_code: Whether to run code that the folder holds.

    Raises:
        UserError: There is no such model, it is of another kind, or it cannot be loaded.
    """
    folder = _find_model(folder)
    if (folder / _ADAPTER_CONFIG).is_file():
        return _load_adapter(folder, trust_remote_code)
    _check_kind(folder, trust_remote_code)
    tokenizer = read_tokenizer(folder, trust_remote_code=trust_remote_code)
    model = load_causal_lm(folder, dtype="auto", trust_remote_code=trust_remote_code)
    return LanguageModel(model, tokenizer)


def _find_model(folder: Path) -> Path:
    for candidate in (folder, folder / MODEL_FOLDER):
        if any((candidate / name).is_file() for name in (_CONFIG, _ADAPTER_CONFIG)):
            return candidate
    raise UserError(
        f"{folder} holds no model, neither {_CONFIG} nor {_ADAPTER_CONFIG}: name the folder of a "
        "model, of an adapter, or of a finished run."
    )


def _load_adapter(folder: Path, trust_remote_code: bool) -> LanguageModel:
    settings = _read_json(folder / _ADAPTER_CONFIG)
    task = settings.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise UserError(f"{folder} is an adapter for {task}, not for a causal language model.")
    base = Path(str(settings.get("base_model_name_or_path")))
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    if base.is_dir():
        _check_kind(base, trust_remote_code)
    elif has_tokenizer:
        _check_on_hub(str(base), folder)
    else:
        raise UserError(
            f"the adapter {folder} has no tokenizer, and its base model {base} is not a folder "
            "here: save the tokenizer beside the adapter."
        )
    tokenizer = read_tokenizer(
        folder if has_tokenizer else base, trust_remote_code=trust_remote_code
    )
    return LanguageModel(_load_peft_model(folder, base, trust_remote_code), tokenizer)


def _check_on_hub(base: str, folder: Path) -> None:
    """See that a base model that is no folder is on the hub."""
    if not is_hub_name(base):
        raise UserError(
            f"the adapter {folder} is for the base model {base}, which is no folder here"
            f"{advice_for_missing(base) or '.'}"
        )
    ask_for_model(base)


def _load_peft_model(folder: Path, base: Path, trust_remote_code: bool) -> Any:
    try:
        from peft import AutoPeftModelForCausalLM
    except ModuleNotFoundError as error:
        raise UserError(
            f'{folder} is an adapter, which needs peft: pip install "adarankgrad[finetune]"'
        ) from error
    try:
        with peft_warnings_ignored():
            return AutoPeftModelForCausalLM.from_pretrained(
                folder, dtype="auto", trust_remote_code=trust_remote_code
            )
    except Exception as error:  # peft and transformers raise many kinds for a bad folder
        raise UserError(
            f"the adapter {folder} on its base model {base} cannot be loaded: {first_line(error)}"
        ) from error


def _check_kind(folder: Path, trust_remote_code: bool) -> None:
    """See from its config that a model is a causal language model, and needs no code of its own."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    settings = _read_json(folder / _CONFIG)
    if "auto_map" in settings:
        if trust_remote_code:
            return
        if settings.get("model_type") not in CONFIG_MAPPING:
            raise UserError(
                f"{folder} needs code that it brings along: read that code, then allow it with "
                "--trust-remote-code."
            )
    architectures = settings.get("architectures") or []
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if architectures and known.isdisjoint(architectures):
        raise UserError(f"{folder} holds a {architectures[0]}, not a causal language model.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object.")
    return content
