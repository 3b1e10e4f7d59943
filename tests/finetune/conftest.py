"""Pretrained models and data so small that a fine-tuning run takes a second."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from task_inputs import TASK_INPUTS
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from adarankgrad.finetune import FinetuneConfig, finetune
from adarankgrad.train.tokenizer import train_tokenizer

LETTERS = list("ACDEFGHIKLMNPQRSTVWY")
GOOD, BAD = "fine lovely great".split(), "awful dull poor".split()
OTHER = "a film the and is".split()
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def save_bert(folder: Path, vocabulary: list[str], dropout: float = 0.0) -> None:
    """Write a BERT of hidden size 16 and a tokenizer of whole words."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    numbers = {token: number for number, token in enumerate([*special, *vocabulary])}
    words = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    PreTrainedTokenizerFast(
        tokenizer_object=words, model_max_length=32, **dict(zip(names, special, strict=True))
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(numbers),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    BertForMaskedLM(config).save_pretrained(folder)


def save_llama(folder: Path, chat_template: str | None) -> None:
    """Write a LLaMA of hidden size 16 and a byte-level tokenizer."""
    tokenizer = train_tokenizer(["what is one and two? three. #### 3"] * 3, 280, 64)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write rows as .tsv, .csv or .jsonl, by the suffix; nothing is quoted."""
    if path.suffix == ".jsonl":
        lines = [json.dumps(row) for row in rows]
    else:
        separator = "\t" if path.suffix == ".tsv" else ","
        lines = [separator.join(rows[0]), *(separator.join(map(str, r.values())) for r in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def sentence(source: random.Random, label: int) -> str:
    """Return five words, of which two say what it thinks."""
    words = source.sample(GOOD if label else BAD, 2) + source.choices(OTHER, k=3)
    source.shuffle(words)
    return " ".join(words)


def write_data(folder: Path) -> None:
    source = random.Random(7)
    for name, count in (("train", 40), ("dev", 12)):
        labels = [number % 2 for number in range(count)]
        films = [{"sentence": sentence(source, label), "label": label} for label in labels]
        write_rows(folder / f"{name}.tsv", films)
        pairs = [
            {"sentence1": sentence(source, label), "sentence2": sentence(source, 1), "label": label}
            for label in labels
        ]
        write_rows(folder / f"{name}_pairs.tsv", pairs)
        scored = [{**pair, "label": pair["label"] + n / 100} for n, pair in enumerate(pairs)]
        write_rows(folder / f"{name}_scores.tsv", scored)
        asked = [
            {"question": f"what is {n} and {n}?", "answer": f"{n}+{n}={2 * n}\n#### {2 * n}"}
            for n in range(count)
        ]
        write_rows(folder / f"{name}.jsonl", asked)
        proteins = ["".join(source.choices(LETTERS, k=12)) for _ in range(count)]
        write_rows(folder / f"{name}.csv", [{"sequence": text} for text in proteins])


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    """A folder with the models bert, residues, llama and chat, and data of each kind."""
    folder = tmp_path_factory.mktemp("finetune")
    save_bert(folder / "bert", GOOD + BAD + OTHER)
    save_bert(folder / "residues", LETTERS, dropout=0.1)
    save_llama(folder / "llama", None)
    save_llama(folder / "chat", CHAT_TEMPLATE)
    write_data(folder)
    return folder


@pytest.fixture
def settings(inputs, tmp_path):
    """Settings of a run of 8 steps in a second; keyword arguments replace some."""

    def build(task: str = "classification", output: str = "run", **changes):
        model, data = TASK_INPUTS[task]
        given = {
            "task": task,
            "model": str(inputs / model),
            "data": str(inputs / data.format("train")),
            "validation": str(inputs / data.format("dev")),
            "output": str(tmp_path / output),
            "optimizer": "adamw",
            "lr": 1e-2,
            "steps": 8,
            "batch_size": 4,
            "log_every": 2,
            "eval_every": 4,
            "save_every": 2,
            "device": "cpu",
            **changes,
        }
        return {name: value for name, value in given.items() if value is not None}

    return build


@pytest.fixture
def tune(settings, monkeypatch):
    """Fine-tune in this process without plots; returns the summary."""
    monkeypatch.setattr("adarankgrad.train.plots.write_plots", lambda run_dir: [])
    monkeypatch.setattr("adarankgrad.train.report.write_report", lambda run_dir: run_dir)

    def run(task: str = "classification", *, resume=False, overwrite=False, **changes):
        config = FinetuneConfig.from_settings(settings(task, **changes))
        return finetune(config, resume=resume, overwrite=overwrite)

    return run
