"""SoRA: a plain LoRA of the ranks that are left."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from adarankgrad.adapters import SoRAConfig, sora
from adarankgrad.adapters.lora import lora_layers
from adarankgrad.adapters.sora.gates import gates_of

from .models import logits, tiny_bert, tiny_gpt2, tiny_llama, token_batch
from .sora_runs import kill, tiny_run
from .training import Run


def saved_ranks(folder):
    state = load_file(folder / "adapter_model.safetensors")
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): len(weight)
        for name, weight in state.items()
        if "lora_A" in name
    }


def trained_run(**settings):
    """A run with one whole and one dead layer, and others in between."""
    run = tiny_run(shrinkage=0.05, **settings).train(range(1, 9))
    kill(run.model, "model.layers.0.mlp.up_proj")
    kill(run.model, "model.layers.1.mlp.up_proj", kept=1)
    return run


def test_the_exported_adapter_gives_the_same_logits_without_dead_ranks_and_layers(tmp_path):
    run, tokens = trained_run(), token_batch()
    gated = logits(run.model, tokens)
    sora.export(run.model, tmp_path)
    alive = {name: rank for name, rank in sora.surviving_ranks(run.model).items() if rank}
    assert saved_ranks(tmp_path) == alive
    assert "model.layers.0.mlp.up_proj" not in alive and len(alive) >= 10
    reloaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    # Logits of about 1; a fold rounds each product once: some 1e-7 an entry, 1e-6 through a model.
    torch.testing.assert_close(logits(reloaded, tokens), gated, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        logits(sora.load(tiny_llama(), tmp_path), tokens), gated, rtol=0, atol=1e-5
    )
    merged = reloaded.merge_and_unload()
    torch.testing.assert_close(logits(merged, tokens), gated, rtol=0, atol=1e-5)
    assert (gated - logits(tiny_llama(), tokens)).abs().max() > 1e-2
    # The model goes on with its gates.
    assert torch.equal(logits(run.model, tokens), gated)


def test_merging_the_gated_model_gives_the_same_logits():
    run, tokens = trained_run(), token_batch()
    gated = logits(run.model, tokens)
    torch.testing.assert_close(
        logits(run.model.merge_and_unload(), tokens), gated, rtol=0, atol=1e-5
    )


def test_the_scaling_survives_the_export(tmp_path):
    run = trained_run(alpha=12.0)
    sora.export(run.model, tmp_path)
    reloaded = sora.load(tiny_llama(), tmp_path)
    scalings = {
        layer.scaling["default"] for layer in reloaded.modules() if hasattr(layer, "lora_alpha")
    }
    assert scalings == {3.0}


def test_a_model_without_any_gate_alive_is_not_exported(tmp_path):
    model = tiny_run().model
    for name in gates_of(model):
        kill(model, name)
    with pytest.raises(ValueError, match="every gate is zero"):
        sora.export(model, tmp_path)


def test_a_plain_lora_is_not_exported_as_sora(tmp_path):
    plain = get_peft_model(tiny_llama(), LoraConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match="have no gates; call sora.apply"):
        sora.export(plain, tmp_path)


def test_saving_without_exporting_warns_and_loading_such_a_folder_is_refused(tmp_path):
    model = tiny_run().model
    with pytest.warns(UserWarning, match="holds SoRA's gates, which peft ignores"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="it is a checkpoint of SoRA, to resume from"):
        sora.load(tiny_llama(), tmp_path)


def test_exporting_does_not_warn_and_leaves_a_configuration_of_plain_peft(tmp_path):
    model = trained_run().model
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sora.export(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "sora_gate_init" not in config
    assert config["inference_mode"] is True


def test_transposed_linear_layers_of_gpt2_are_gated_merged_and_exported(tmp_path):
    run, tokens = tiny_run(model=tiny_gpt2(), target_modules=["c_attn", "c_fc"]), token_batch()
    run.train(range(1, 4))
    gated = logits(run.model, tokens)
    sora.export(run.model, tmp_path)
    torch.testing.assert_close(
        logits(sora.load(tiny_gpt2(), tmp_path), tokens), gated, rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        logits(run.model.merge_and_unload(), tokens), gated, rtol=0, atol=1e-5
    )


class TwoStacks(nn.Module):
    """Names of which one ends with the other."""

    def __init__(self):
        super().__init__()
        self.layers = many_layers()
        self.decoder = nn.ModuleDict({"layers": many_layers()})

    def forward(self, inputs):
        for layers in (self.layers, self.decoder["layers"]):
            for layer in layers:
                inputs = layer["fc"](inputs)
        return inputs


def many_layers():
    return nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(4, 4)}) for _ in range(12))


def test_exported_ranks_are_of_whole_names_and_a_dead_layer_is_adapted_by_no_other_name(tmp_path):
    torch.manual_seed(0)
    base = TwoStacks()
    model = sora.apply(copy.deepcopy(base), SoRAConfig(rank=4, target_modules=["fc"]))
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_B" in name:
                param.normal_()
    kept = {"layers.1.fc": 1, "layers.11.fc": 3, "decoder.layers.11.fc": 2}
    for name in gates_of(model):
        kill(model, name, kept=kept.get(name, 0))
    sora.export(model, tmp_path)
    loaded = sora.load(base, tmp_path)
    ranks = {name: layer.r["default"] for name, layer in lora_layers(loaded).items()}
    assert ranks == kept
    inputs = torch.randn(3, 4)
    # The 1e-5 that docs/sora.md promises; outputs of about 0.3, so some hundred roundings.
    torch.testing.assert_close(loaded(inputs), model(inputs), rtol=0, atol=1e-5)


class TransposedAndNot(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = Conv1D(48, 32)
        self.second = nn.Linear(48, 32)

    def forward(self, inputs):
        return self.second(self.first(inputs))


def test_transposed_and_usual_layers_side_by_side_are_merged():
    model = sora.apply(TransposedAndNot(), SoRAConfig(target_modules=["first", "second"]))
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_B" in name:
                param.normal_(std=0.1)
    inputs = torch.randn(3, 32)
    gated = model(inputs)
    with model.disable_adapter():
        assert not torch.allclose(model(inputs), gated)
    # The 1e-5 that docs/sora.md promises; outputs of about 1, so some hundred roundings.
    torch.testing.assert_close(model.merge_and_unload()(inputs), gated, rtol=0, atol=1e-5)


def test_a_classifier_is_trained_saved_and_loaded_with_the_adapter(tmp_path):
    labels = torch.tensor([0, 1, 2, 0])
    run = Run(
        "sora",
        tiny_bert(),
        SoRAConfig(rank=2, task_type="SEQ_CLS", shrinkage=1e-3),
        batch_loss=lambda model, step: model(input_ids=token_batch(step), labels=labels).loss,
    ).train(range(1, 4))
    sora.export(run.model, tmp_path)
    torch.testing.assert_close(
        logits(sora.load(tiny_bert(), tmp_path), token_batch()),
        logits(run.model, token_batch()),
        rtol=0,
        atol=1e-5,
    )
