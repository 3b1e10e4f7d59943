"""A model, a text and settings so small that a training run takes a second."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from pictures import same_picture

from adarankgrad.train import Interrupted, TrainConfig, train
from adarankgrad.train.child import ChildPool
from adarankgrad.train.config import TABLES
from adarankgrad.train.errors import DivergedError
from adarankgrad.train.values import parse_arguments

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


@pytest.fixture
def shared(settings):
    """Settings of tiny runs, without what the comparison decides."""
    given = settings()
    for name in ("output", "optimizer", "seed", "lr"):
        given.pop(name, None)
    return given


@pytest.fixture
def children(monkeypatch):
    """Train in this process; returns the flags of each run, and takes exit codes to fake."""

    class Children(list):
        exit_codes = {}

        def run(self, job):
            flags = job.command[job.command.index("train") + 1 :]
            self.append(flags)
            for part, (exit_code, said) in self.exit_codes.items():
                if part in " ".join(flags):
                    job.log.write_text(f"a warning\nadarankgrad: error: {said}\n")
                    return exit_code
            job.log.write_text("")
            values = dict(zip(flags[::2], flags[1::2], strict=False))
            settings = {
                name.removeprefix("--").replace("-", "_"): _value(name, text)
                for name, text in values.items()
                if name.startswith("--") and name not in ("--overwrite", "--resume")
            }
            try:
                train(TrainConfig.from_settings(settings), overwrite="--overwrite" in flags)
            except DivergedError:
                return 3
            return 0

    seen = Children()

    def run_all(pool, jobs, on_end):
        for job in jobs:
            exit_code = seen.run(job)
            on_end(job, exit_code)
            if exit_code > 128:
                raise Interrupted("stopped by a signal.", exit_code)

    monkeypatch.setattr("adarankgrad.train.plots.write_plots", lambda run_dir: [])
    monkeypatch.setattr("adarankgrad.train.report.write_report", lambda run_dir: run_dir)
    monkeypatch.setattr("adarankgrad.compare.plots.to_png", same_picture)
    monkeypatch.setattr(ChildPool, "run", run_all)
    return seen


def _value(name, text):
    if name.removeprefix("--").replace("-", "_") in TABLES:
        return parse_arguments(text)
    try:
        return json.loads(text)
    except ValueError:
        return text
