"""A new head is trained and saved whole beside an adapter, and nothing else is."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_runs import ADAPTERS, assert_predicts
from transformers import AutoModelForSequenceClassification, AutoTokenizer

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 33,
    "pad_token_id": 0,
}
# Heads whose layers are called as layers of the encoder are; DeBERTa's pooler is one of them.
MODELS = {
    "Roberta": ("lora", {"classifier"}),
    "DebertaV2": ("prilora", {"classifier", "pooler"}),
    "Esm": ("sora", {"classifier"}),
    "Electra": ("lora", {"classifier"}),
}


@pytest.fixture
def save_encoder(inputs, tmp_path):
    """Write an encoder of a kind, without a head, and a tokenizer; returns the folder."""

    def save(kind: str):
        tokenizer = AutoTokenizer.from_pretrained(inputs / "bert")
        config_class = getattr(transformers, f"{kind}Config")
        more = {"mask_token_id": tokenizer.mask_token_id} if kind == "Esm" else {}
        torch.manual_seed(0)
        config = config_class(vocab_size=len(tokenizer), **SIZES, **more)
        getattr(transformers, f"{kind}ForMaskedLM")(config).save_pretrained(tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return save


def saved_modules(run):
    """Modules that an adapter holds whole, by their names in the model, and the factors' layers."""
    names = load_file(run / "model" / "adapter_model.safetensors")
    names = [name.removeprefix("base_model.model.") for name in names]
    whole = {name.rpartition(".")[0] for name in names if ".lora_" not in name}
    return whole, {name.partition(".lora_")[0] for name in names if ".lora_" in name}


@pytest.mark.parametrize(("kind", "method", "head"), [(k, *v) for k, v in MODELS.items()])
def test_the_head_alone_is_trained_whole_and_every_layer_is_adapted(
    kind, method, head, save_encoder, tune, tmp_path
):
    folder, run = save_encoder(kind), tmp_path / "run"
    summary = tune(model=str(folder), method=method, adapter=ADAPTERS[method], steps=2)
    if method != "sora":  # whose gates, and what they end, are trained and not saved
        saved = load_file(run / "model" / "adapter_model.safetensors").values()
        assert summary["trainable_parameters"] == sum(weight.numel() for weight in saved)
    whole, adapted = saved_modules(run)
    assert {name.split(".")[0] for name in whole} == head
    linear_of_layers = {"query", "key", "value", "dense"}
    assert linear_of_layers <= {name.split(".")[-1].removesuffix("_proj") for name in adapted}
    config = json.loads((run / "model" / "adapter_config.json").read_text())
    assert head <= set(config["modules_to_save"]) and config["exclude_modules"] is None
    base = AutoModelForSequenceClassification.from_pretrained(
        folder, config=transformers.AutoConfig.from_pretrained(run / "model")
    )
    assert_predicts(peft.PeftModel.from_pretrained(base, run / "model"), run)


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("lora", {"modules_to_save": ["classifier", "word_embeddings"]}),
        ("sara", {"quantile": 0.2, "train_fully": "word_embeddings"}),
    ],
)
def test_what_is_given_is_trained_whole_beside_a_new_head(method, given, tune, inputs, tmp_path):
    tune(method=method, adapter=given, steps=2)
    run = tmp_path / "run"
    if method == "lora":
        whole, _ = saved_modules(run)
    else:
        names = load_file(run / "adapter" / "sara.safetensors")
        places = (".indices", ".values")
        whole = {name.rpartition(".")[0] for name in names if not name.endswith(places)}
    # The tiny BERT, a language model, has neither pooler nor classifier.
    assert whole == {"bert.pooler.dense", "classifier", "bert.embeddings.word_embeddings"}
