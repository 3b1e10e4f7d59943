"""The pretrained model and its tokenizer: found and checked before its weights are loaded."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adarankgrad.adapters.sara.checksum import checksum
from adarankgrad.finetune.deeper import without_waiting_layers
from adarankgrad.train.errors import UserError
from adarankgrad.train.hub import ask_for_model
from adarankgrad.train.presets import first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from adarankgrad.finetune.config import FinetuneConfig
    from adarankgrad.finetune.tasks.interface import Task

_DEFAULT_LENGTH = 512
# Their positions start behind the padding token's number.
_OFFSET_POSITIONS = {
    "camembert",
    "data2vec-text",
    "esm",
    "ibert",
    "longformer",
    "luke",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
}


def load_config(config: FinetuneConfig, task: Task) -> PretrainedConfig:
    """Read a model's configuration and see that it has a model for the task.

    Raises:
        UserError: There is none, it is an adapter, needs code of its own, or is of another kind.
    """
    import transformers

    auto_config: Any = transformers.AutoConfig
    try:
        model_config: PretrainedConfig = auto_config.from_pretrained(**_source(config))
    except Exception as error:  # transformers raises many kinds for a bad config
        raise UserError(f"model {config.model!r} cannot be read: {_reason(error)}") from error
    has_own_code = bool(getattr(model_config, "auto_map", None)) and config.trust_remote_code
    known = getattr(transformers, task.model_class)._model_mapping
    if type(model_config) not in known and not has_own_code:
        raise UserError(
            f"{config.model} is a {model_config.model_type} model, of which transformers has no "
            f"{task.model_class}: it cannot be fine-tuned for {config.task}."
        )
    for name, value in task.model_settings().items():
        setattr(model_config, name, value)
    return model_config


def load_tokenizer(config: FinetuneConfig, source: str | Path | None = None) -> Any:
    """Load the model's tokenizer, or the one that a run has saved.

    Raises:
        UserError: There is none.
    """
    from transformers import AutoTokenizer

    name = str(source or config.model)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(**_source(config, name))
    except Exception as error:  # transformers raises many kinds for a bad folder
        raise UserError(f"{name} holds no usable tokenizer: {_reason(error)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise UserError(f"the tokenizer of {name} has no token to pad with: set its pad_token.")
    return tokenizer


def fit_length(
    config: FinetuneConfig, model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> int:
    """Return the longest example in tokens.

    Raises:
        UserError: More is asked for than the model has positions.
    """
    limit = most_tokens(model_config, tokenizer)
    if config.max_length is None:
        return min(limit or _DEFAULT_LENGTH, _DEFAULT_LENGTH)
    if limit is not None and config.max_length > limit:
        raise UserError(
            f"max_length = {config.max_length} is more than the {limit} tokens that {config.model} "
            "can read: lower it."
        )
    return config.max_length


def most_tokens(model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the most tokens that a model can read, or None where neither side says."""
    text_config = model_config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions is not None and model_config.model_type in _OFFSET_POSITIONS:
        positions -= (text_config.pad_token_id or 0) + 1
    # A tokenizer without a limit says so by a huge number.
    limits = [n for n in (positions, tokenizer.model_max_length) if n is not None and n < 1 << 30]
    return min(limits) if limits else None


def load_model(
    config: FinetuneConfig,
    task: Task,
    model_config: PretrainedConfig,
    num_layers: int | None = None,
) -> Any:
    """Load the weights in float32; a new head starts from the seed.

    Args:
        config: The settings.
        task: The task.
        model_config: Of the model that is built.
        num_layers: Layers of the pretrained model, where the one that is built has more.

    Returns:
        The model on the CPU, and the names of weights that the folder did not have.

    Raises:
        UserError: They cannot be loaded, or are those of another kind of model.
    """
    import torch
    import transformers

    auto_model: Any = getattr(transformers, task.model_class)
    transformers.set_seed(config.seed)
    try:
        model, info = auto_model.from_pretrained(
            **_source(config),
            config=model_config,
            dtype=torch.float32,
            ignore_mismatched_sizes=task.has_new_head,
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises many kinds for bad weights
        raise UserError(
            f"the weights of {config.model} cannot be loaded: {_reason(error)}"
        ) from error
    new = sorted({*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])})
    new = without_waiting_layers(config, model, new, num_layers)
    _check_new(config, task, model, new)
    return model, new


def build_empty(config: FinetuneConfig, task: Task, model_config: PretrainedConfig) -> Any:
    """Build the model on the meta device: shapes without memory."""
    import torch
    import transformers

    auto_model: Any = getattr(transformers, task.model_class)
    with torch.device("meta"):
        return auto_model.from_config(
            model_config, dtype=torch.float32, trust_remote_code=config.trust_remote_code
        )


def checksum_of(model: Any) -> int:
    """Return a fingerprint of a model's weights, new ones included."""
    found = 0
    for weight in model.state_dict().values():
        found = zlib.crc32(checksum(weight).to_bytes(4, "big"), found)
    return found


def check_known(features: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse texts of which the tokenizer does not know most.

    Raises:
        UserError: Saying how to write sequences of residues.
    """
    unknown = tokenizer.unk_token_id
    special = set(tokenizer.all_special_ids) - {unknown}
    tokens = [token for feature in features for token in feature["input_ids"]]
    num_ordinary = sum(token not in special for token in tokens)
    num_unknown = tokens.count(unknown)
    if 2 * num_unknown > num_ordinary:
        raise UserError(
            f"the tokenizer does not know {num_unknown:,} of {num_ordinary:,} tokens of the data: "
            "check the column of the text; for sequences of residues, give --split-characters."
        )


def _source(config: FinetuneConfig, name: str | None = None) -> dict[str, Any]:
    """Return what to load from, the model unless named, without asking a hub that is away."""
    path = Path(name or config.model).expanduser()
    is_here = path.is_dir()
    return {
        "pretrained_model_name_or_path": str(path),
        "local_files_only": is_here or not ask_for_model(str(path)),
        "trust_remote_code": config.trust_remote_code,
    }


def _check_new(config: FinetuneConfig, task: Task, model: Any, new: list[str]) -> None:
    """Refuse a folder that lacks more than a head, whose weights would silently be random."""
    prefix = f"{model.base_model_prefix}."
    # BERT's pooler reads the first token for a head, and language models are saved without it.
    lacking = [
        name
        for name in new
        if not task.has_new_head or (name.startswith(prefix) and ".pooler." not in name)
    ]
    if lacking:
        raise UserError(
            f"{config.model} lacks {len(lacking)} weights of a model for {config.task}, such as "
            f"{lacking[0]}: it is another kind of model, or damaged."
        )


def _reason(error: Exception) -> str:
    text = first_line(error)
    if "trust_remote_code" in str(error):
        return "it comes with code of its own, which only --trust-remote-code runs."
    return text
