"""``adarankgrad generate``: transformers' ``generate`` on one prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from adarankgrad.generate.loading import LanguageModel, load_language_model
from adarankgrad.train.errors import TrainingError, UserError
from adarankgrad.train.presets import first_line
from adarankgrad.train.quiet import quiet_transformers
from adarankgrad.train.settings import resolve_device
from adarankgrad.train.tokenizer import check_knows

if TYPE_CHECKING:
    from adarankgrad.generate.request import GenerateRequest


def generate_text(request: GenerateRequest) -> dict[str, Any]:
    """Let a model continue a prompt, or answer it.

    Sampling draws from ``temperature`` and ``top_p`` alone: a top-k that the model's folder
    suggests is not used.

    Returns:
        ``prompt``, ``text`` (only what is new), ``num_prompt_tokens``, ``num_new_tokens``,
        ``finish`` (``"end"`` where the model ended, ``"length"`` where it was cut off), ``device``.

    Raises:
        UserError: The request cannot be met.
        TrainingError: The device has too little memory.
    """
    from transformers import set_seed

    device = resolve_device(request.device)
    quiet_transformers()
    loaded = load_language_model(request.model, trust_remote_code=request.trust_remote_code)
    inputs = _encode(request, loaded)
    num_prompt_tokens = inputs["input_ids"].shape[1]
    _check_length(request, loaded, num_prompt_tokens)
    set_seed(request.seed)
    try:
        model = loaded.model.to(device).eval()
        output = model.generate(
            **{name: tensor.to(device) for name, tensor in inputs.items()},
            max_new_tokens=request.max_new_tokens,
            **_sampling(request),
        )
    except torch.OutOfMemoryError as error:
        raise TrainingError(f"{device} is out of memory: use --device cpu.") from error
    new_tokens = output[0, num_prompt_tokens:]
    return {
        "prompt": request.prompt,
        "text": loaded.tokenizer.decode(new_tokens, skip_special_tokens=True),
        "num_prompt_tokens": num_prompt_tokens,
        "num_new_tokens": len(new_tokens),
        "finish": "end" if int(new_tokens[-1]) in _end_tokens(model) else "length",
        "device": str(device),
    }


def _encode(request: GenerateRequest, loaded: LanguageModel) -> dict[str, torch.Tensor]:
    """Return ``input_ids`` and ``attention_mask``, each (1, tokens)."""
    tokenizer = loaded.tokenizer
    if not request.chat:
        encoded = tokenizer(request.prompt, return_tensors="pt")
    elif tokenizer.chat_template is None:
        raise UserError(f"the tokenizer of {request.model} has no chat template: leave --chat out.")
    else:
        encoded = _encode_chat(request.prompt, tokenizer)
    ids = encoded["input_ids"]
    if ids.shape[1] == 0:
        raise UserError("the prompt has no tokens: give text with --prompt.")
    vocab_size = loaded.model.get_input_embeddings().num_embeddings
    check_knows(str(request.model), vocab_size, int(ids.max()))
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def _encode_chat(prompt: str, tokenizer: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
    except Exception as error:  # a template is a program, which can fail in its own ways
        raise UserError(f"the chat template cannot be used: {first_line(error)}") from error


def _check_length(request: GenerateRequest, loaded: LanguageModel, num_prompt_tokens: int) -> None:
    config = loaded.model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if longest is None or num_prompt_tokens + request.max_new_tokens <= longest:
        return
    room = longest - num_prompt_tokens
    advice = f"lower --max-new-tokens to {room}" if room > 0 else "shorten the prompt"
    raise UserError(
        f"the prompt's {num_prompt_tokens} tokens and {request.max_new_tokens} new ones are more "
        f"than the model's {longest} positions: {advice}."
    )


def _sampling(request: GenerateRequest) -> dict[str, Any]:
    if request.temperature == 0:
        return {"do_sample": False, "num_beams": 1}
    return {
        "do_sample": True,
        "num_beams": 1,
        "temperature": request.temperature,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "top_k": 0,
    }


def _end_tokens(model: Any) -> list[int]:
    end = model.generation_config.eos_token_id
    return end if isinstance(end, list) else [] if end is None else [end]
