"""Inputs for the command's tests: a text, a tiny model, and a way to call the command."""

from __future__ import annotations

import json
from pathlib import Path

from adarankgrad.cli import main

TINY_MODEL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 64,
}


def write_inputs(folder: Path) -> None:
    """Write ``text.txt`` (about 20 kB) and ``tiny/config.json``."""
    lines = [f"line {i} of a text, from {i * 7 % 31} to {i * 5 % 17}, and on\n" for i in range(450)]
    (folder / "text.txt").write_text("".join(lines))
    (folder / "tiny").mkdir()
    (folder / "tiny" / "config.json").write_text(json.dumps(TINY_MODEL))


def tiny_flags(**changes: object) -> list[str]:
    """Return flags of a run of 6 steps, relative to the inputs' folder; None leaves a flag out."""
    settings = {
        "data": "text.txt",
        "model": "tiny/config.json",
        "output": "run",
        "optimizer": "adamw",
        "steps": 6,
        "batch-size": 2,
        "seq-len": 16,
        "log-every": 2,
        "eval-every": 3,
        "save-every": 3,
        "device": "cpu",
    } | {name.replace("_", "-"): value for name, value in changes.items()}
    flags = []
    for name, value in settings.items():
        if value is True:
            flags.append(f"--{name}")
        elif value is not None:
            flags += [f"--{name}", str(value)]
    return flags


def call(*arguments: str) -> int:
    """Call the command in this process and return its exit code."""
    try:
        main.main(list(arguments))
    except SystemExit as end:
        return int(end.code or 0)
