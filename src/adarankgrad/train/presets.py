"""Which model to train: LLaMA sizes by name, a config.json, or the folder of a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adarankgrad.train.errors import UserError, unknown_name

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from adarankgrad.train.config import TrainConfig


@dataclass(frozen=True)
class LlamaSize:
    """The shape of a LLaMA; embeddings and output head are not tied.

    Attributes:
        hidden: Width of the residual stream.
        intermediate: Width of the feed-forward layers.
        layers: Number of blocks.
        heads: Number of attention heads.
        vocab_size: Vocabulary when ``vocab_size`` is not given.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocab_size: int = 32000


LLAMA_SIZES = {
    "small-llama": LlamaSize(128, 344, 4, 4, vocab_size=4096),
    "9m": LlamaSize(128, 352, 4, 4),
    "20m": LlamaSize(256, 688, 4, 4),
    "35m": LlamaSize(384, 1024, 6, 8),
    "60m": LlamaSize(512, 1376, 8, 8),
    "71m": LlamaSize(512, 1368, 12, 8),
    "130m": LlamaSize(768, 2048, 12, 12),
    "250m": LlamaSize(768, 2560, 24, 16),
    "350m": LlamaSize(1024, 2736, 24, 16),
    "1b": LlamaSize(2048, 5461, 24, 32),
    "3b": LlamaSize(2560, 6848, 32, 32),
    "7b": LlamaSize(4096, 11008, 32, 32),
}
"""``small-llama`` (1.84M weights) and the sizes of the GaLore papers (arXiv 2403.03507)."""

_PRESET_CONTEXT = 1024


@dataclass(frozen=True)
class ModelPlan:
    """What to build, decided before anything heavy happens.

    Attributes:
        config: The architecture; its vocabulary is final.
        weights: Folder to load weights from, or None to start from random weights.
    """

    config: PretrainedConfig
    weights: Path | None


def model_folder(model: str) -> Path | None:
    """Return the folder of a model given by path, or None for a size or a config.json."""
    return Path(model) if model not in LLAMA_SIZES and Path(model).is_dir() else None


def plan_model(config: TrainConfig, tokenizer: Any | None) -> ModelPlan:
    """Decide the architecture.

    Args:
        config: The run's settings.
        tokenizer: A loaded tokenizer, or None where one will be trained on the data.

    Raises:
        UserError: The model is unknown or unreadable, or does not fit tokenizer or ``seq_len``.
    """
    if config.model in LLAMA_SIZES:
        return ModelPlan(_llama_config(config, tokenizer), None)
    model_config = _load_config(config.model)
    _fit_context(config, model_config)
    folder = model_folder(config.model)
    has_weights = folder is not None and any(
        list(folder.glob(pattern)) for pattern in ("*.safetensors", "pytorch_model*.bin")
    )
    _fit_vocabulary(config, model_config, tokenizer, may_change=not has_weights)
    return ModelPlan(model_config, folder if has_weights else None)


def build_model(plan: ModelPlan, seed: int, *, meta: bool = False) -> PreTrainedModel:
    """Build the model: random weights from `seed`, or loaded ones; never remote code.

    Args:
        plan: From `plan_model`.
        seed: Seed of random weights; the global generator is left seeded with it.
        meta: Build shapes only, on the meta device, without memory or loading.

    Returns:
        A float32 causal language model on the CPU (or the meta device).

    Raises:
        UserError: The weights cannot be loaded, or are those of another kind of model.
    """
    import torch
    from transformers import AutoModelForCausalLM, set_seed

    auto_model: Any = AutoModelForCausalLM
    model: PreTrainedModel

    if plan.weights is not None and not meta:
        return load_causal_lm(plan.weights)
    if not meta:
        set_seed(seed)
    options = {"attn_implementation": "sdpa"} if plan.config.model_type == "llama" else {}
    with torch.device("meta" if meta else "cpu"):
        model = auto_model.from_config(
            plan.config, dtype=torch.float32, trust_remote_code=False, **options
        )
    return model


def load_causal_lm(
    folder: Path, *, dtype: str = "float32", trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a causal language model, all its weights, from a folder.

    Args:
        folder: With config.json and weights.
        dtype: A floating point type, or ``"auto"`` for the one that the weights are stored in.
        trust_remote_code: Whether to run code that the folder holds.

    Raises:
        UserError: The weights cannot be loaded, or are those of another kind of model.
    """
    from transformers import AutoModelForCausalLM

    auto_model: Any = AutoModelForCausalLM
    try:
        model, info = auto_model.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises many kinds for bad weights
        raise UserError(f"the weights in {folder} cannot be loaded: {first_line(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} weights of a causal language model, such as "
            f"{missing[0]}: it is another kind of model, or damaged."
        )
    loaded: PreTrainedModel = model
    return loaded


def _llama_config(config: TrainConfig, tokenizer: Any | None) -> PretrainedConfig:
    from transformers import LlamaConfig

    size = LLAMA_SIZES[config.model]
    vocab_size = config.vocab_size or (len(tokenizer) if tokenizer else size.vocab_size)
    model_config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=max(_PRESET_CONTEXT, config.seq_len),
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    )
    _fit_vocabulary(config, model_config, tokenizer, may_change=True)
    return model_config


def _load_config(model: str) -> PretrainedConfig:
    from transformers import AutoConfig

    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        if path.is_dir():
            raise UserError(f"the model folder {model} has no config.json.")
        raise unknown_name(
            "model", model, list(LLAMA_SIZES), hint=", a config.json, or the folder of a model"
        )
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            file, trust_remote_code=False, local_files_only=True
        )
        return config
    except Exception as error:  # transformers raises many kinds for a bad config
        raise UserError(
            f"{file} is not the config of a model that transformers knows: {first_line(error)}"
        ) from error


def first_line(error: BaseException) -> str:
    """Return an exception's message in one line."""
    text = str(error).strip() or type(error).__name__
    return " ".join(text.splitlines()[0].split())


def _fit_context(config: TrainConfig, model_config: PretrainedConfig) -> None:
    longest = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and config.seq_len > longest:
        raise UserError(
            f"seq_len = {config.seq_len} is more than the {longest} positions of {config.model}."
        )


def _fit_vocabulary(
    config: TrainConfig, model_config: PretrainedConfig, tokenizer: Any | None, *, may_change: bool
) -> None:
    """Set the vocabulary where it was asked for, and see that the tokenizer's fits into it."""
    text_config = model_config.get_text_config()
    if config.vocab_size is not None and config.vocab_size != text_config.vocab_size:
        if not may_change:
            raise UserError(
                f"vocab_size = {config.vocab_size} differs from the {text_config.vocab_size} "
                f"tokens of {config.model}: leave it out."
            )
        text_config.vocab_size = config.vocab_size
    if tokenizer is not None and len(tokenizer) > text_config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, more than the model's vocabulary of "
            f"{text_config.vocab_size}: choose another tokenizer or a larger vocab_size."
        )


def checkpoint_activations(model: PreTrainedModel, **options: Any) -> None:
    """Have each block keep its inputs only, and compute the rest again in the backward pass.

    Args:
        model: Changed in place.
        options: Of `torch.utils.checkpoint.checkpoint`.

    Raises:
        UserError: The model cannot.
    """
    if not model.supports_gradient_checkpointing:
        raise UserError(
            f"{type(model).__name__} cannot compute activations again: leave "
            "--activation-checkpointing out."
        )
    # The new name, and the one of older versions of transformers.
    enable: Any = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False, **options})
