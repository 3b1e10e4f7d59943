"""A model, a text and settings so small that a training run takes a second."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

WORDS = "the sea was calm and a whale rose near our ship while men ran to boats with ropes".split()

TINY_MODEL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "attention_dropout": 0.1,
}


def write_text(path: Path, num_words: int = 4000) -> Path:
    """Write random words; the same ones every time."""
    source = random.Random(3)
    words = [source.choice(WORDS) for _ in range(num_words)]
    lines = [" ".join(words[i : i + 12]) + ".\n" for i in range(0, num_words, 12)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    """A folder with ``text.txt`` and ``tiny/config.json``."""
    folder = tmp_path_factory.mktemp("inputs")
    write_text(folder / "text.txt")
    (folder / "tiny").mkdir()
    (folder / "tiny" / "config.json").write_text(json.dumps(TINY_MODEL))
    return folder


@pytest.fixture
def settings(inputs, tmp_path):
    """Settings of a run of 12 steps in a second; keyword arguments replace some."""

    def build(output: str = "run", **changes):
        return {
            "data": str(inputs / "text.txt"),
            "model": str(inputs / "tiny" / "config.json"),
            "output": str(tmp_path / output),
            "optimizer": "adamw",
            "steps": 12,
            "batch_size": 2,
            "seq_len": 16,
            "log_every": 3,
            "eval_every": 6,
            "save_every": 4,
            "device": "cpu",
            **changes,
        }

    return build
