"""The files under `examples` run as they stand, on a tiny model."""

from __future__ import annotations

import importlib.util
import random
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import LlamaConfig, LlamaForCausalLM

from adarankgrad.train.tokenizer import train_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
WORDS = "the sea was calm and a whale rose near our ship while men ran to boats".split()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Folder of a tiny model with tokenizer, and a text of 20 blocks."""
    folder = tmp_path_factory.mktemp("inputs")
    source = random.Random(3)
    lines = [" ".join(source.choices(WORDS, k=64)) for _ in range(40)]
    (folder / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    tokenizer = train_tokenizer(lines, vocab_size=300, seq_len=128)
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=len(tokenizer),
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    return folder


@pytest.fixture
def run(inputs, tmp_path, monkeypatch):
    """Run an example by name; return its names and the folder it wrote."""

    def run_example(name):
        output = tmp_path / "output"
        argv = [f"{name}.py", str(inputs / "model"), str(inputs / "text.txt"), str(output)]
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.syspath_prepend(str(EXAMPLES))
        return runpy.run_path(str(EXAMPLES / argv[0]), run_name="__main__"), output

    return run_example


def moved(inputs, output):
    start = load_file(inputs / "model" / "model.safetensors")
    end = load_file(output / "model.safetensors")
    return [name for name in start if not torch.equal(start[name], end[name])]


ignore_pinning = pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")
# Both packages use names that newer transformers and torch have deprecated.
ignore_deprecation = pytest.mark.filterwarnings("ignore:.* is deprecated:FutureWarning")


def test_every_example_is_run_here():
    names = {path.stem for path in EXAMPLES.glob("*.py")} - {"text_blocks"}
    assert names == {"trainer", "accelerate_loop", "peft_lora", "trl_sft", "lightning_module"}


@ignore_pinning
def test_trainer_reports_to_tensorboard(run, inputs):
    _, output = run("trainer")
    assert len(moved(inputs, output)) > 8
    events = EventAccumulator(str(next(output.rglob("events.*")).parent)).Reload()
    for name in ("loss", "grad_norm", "lr_plain", "mean_rank", "captured_energy", "state_bytes"):
        assert len(events.Scalars(f"train/{name}")) >= 2


def test_accelerate_loop(run, inputs, capsys):
    names, output = run("accelerate_loop")
    assert len(moved(inputs, output)) > 8
    assert set(names["schedule"].get_last_lr()) == {0.0}  # the cosine ends with the data
    assert "mean rank" in capsys.readouterr().out


@ignore_pinning
def test_peft_lora(run):
    _, output = run("peft_lora")
    adapter = load_file(output / "adapter_model.safetensors")
    assert len(adapter) == 14
    # B starts at zero.
    assert all(weight.any() for name, weight in adapter.items() if "lora_B" in name)


@pytest.mark.skipif(not importlib.util.find_spec("trl"), reason="needs trl")
@ignore_pinning
@ignore_deprecation
def test_trl_sft(run, inputs):
    names, output = run("trl_sft")
    assert len(moved(inputs, output)) > 8
    row = names["trainer"].state.log_history[0]
    assert {"mean_rank", "mean_token_accuracy"} <= row.keys()


@pytest.mark.skipif(not importlib.util.find_spec("lightning"), reason="needs lightning")
@pytest.mark.filterwarnings("ignore:.*num_workers:UserWarning")
@ignore_deprecation
def test_lightning_module(run, inputs):
    _, output = run("lightning_module")
    assert len(moved(inputs, output)) > 8
