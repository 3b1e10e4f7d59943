"""SaRA: a delta of the base model, and what of it is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils import parametrize

from adarankgrad.adapters import sara

from .models import logits, tiny_bert, tiny_llama, token_batch
from .sara_runs import THRESHOLD, merged, tiny_run, trained_run, weights
from .training import assert_same_state


def test_the_exported_delta_gives_the_tuned_model_on_its_base_bit_for_bit(tmp_path):
    run, tokens = trained_run(), token_batch()
    sara.export(run.model, tmp_path)
    loaded = sara.load(tiny_llama(), tmp_path)
    assert torch.equal(logits(loaded, tokens), logits(run.model, tokens))
    assert_same_state(loaded, merged(run.model))
    assert torch.equal(logits(merged(run.model), tokens), logits(run.model, tokens))
    assert type(loaded) is type(tiny_llama())


def test_merging_a_copy_leaves_the_trained_model_whole():
    run = tiny_run().train(range(1, 3))
    before = logits(run.model, token_batch())
    merged(run.model)
    assert torch.equal(logits(run.model, token_batch()), before)
    assert not torch.equal(logits(run.train([3]).model, token_batch()), before)


def test_a_merged_model_is_a_plain_one_and_frozen():
    model = merged(tiny_run().train([1]).model)
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    assert {type(module) for module in model.modules()} == {
        type(module) for module in tiny_llama().modules()
    }
    assert model.state_dict().keys() == tiny_llama().state_dict().keys()
    assert not any(param.requires_grad for param in model.parameters())


def test_a_delta_can_be_scaled_and_scale_zero_is_the_base(tmp_path):
    run = trained_run()
    sara.export(run.model, tmp_path)
    base, tuned = dict(tiny_llama().named_parameters()), weights(run.model)
    assert_same_state(sara.load(tiny_llama(), tmp_path, scale=0.0), tiny_llama())
    for name, weight in sara.load(tiny_llama(), tmp_path, scale=-0.6).named_parameters():
        expected = base[name] - 0.6 * (tuned[name] - base[name])
        # One product and one sum, in two orders, of weights of about 0.02.
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-8)


def test_deltas_of_one_base_add_up(tmp_path):
    first = trained_run()
    second = trained_run(threshold=2 * THRESHOLD, lr=3e-3)
    sara.export(first.model, tmp_path / "first")
    sara.export(second.model, tmp_path / "second")
    folders = {tmp_path / "first": 0.6, tmp_path / "second": 0.5}
    summed = sara.load_sum(tiny_llama(), folders)
    base = dict(tiny_llama().named_parameters())
    tuned = weights(first.model), weights(second.model)
    for name, weight in summed.named_parameters():
        start = base[name]
        expected = start + 0.6 * (tuned[0][name] - start) + 0.5 * (tuned[1][name] - start)
        # What moves stays below 1/16, where a rounding is at most 2**-29 = 1.9e-9; ten at most.
        torch.testing.assert_close(weight, expected, rtol=0, atol=2e-8)


def test_a_head_trained_in_full_travels_with_the_delta(tmp_path):
    labels = torch.tensor([0, 1, 2, 0])
    run = tiny_run(
        model=tiny_bert(),
        train_fully="^classifier",
        batch_loss=lambda model, step: model(input_ids=token_batch(step), labels=labels).loss,
    ).train(range(1, 4))
    assert not torch.equal(run.model.classifier.weight, tiny_bert().classifier.weight)
    sara.export(run.model, tmp_path)
    loaded = sara.load(tiny_bert(), tmp_path)
    assert torch.equal(logits(loaded, token_batch()), logits(run.model, token_batch()))


def test_tied_weights_are_exported_once(tmp_path):
    run = trained_run(model=tiny_llama(tie=True))
    sara.export(run.model, tmp_path)
    names = json.loads((tmp_path / "sara_config.json").read_text())["tensors"]
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    loaded = sara.load(tiny_llama(tie=True), tmp_path)
    assert torch.equal(logits(loaded, token_batch()), logits(run.model, token_batch()))
    plain = merged(run.model)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    plain.save_pretrained(tmp_path / "merged")
    reloaded = type(plain).from_pretrained(tmp_path / "merged")
    assert_same_state(reloaded, plain)


def test_a_delta_of_another_base_is_refused_and_changes_nothing(tmp_path):
    sara.export(trained_run().model, tmp_path)
    other = tiny_llama(seed=7)
    with pytest.raises(ValueError, match="is not what .* was trained from: another base model"):
        sara.load(other, tmp_path)
    assert_same_state(other, tiny_llama(seed=7))
    sara.load(other, tmp_path, check_base=False)
    with pytest.raises(ValueError, match="belongs to another base model"):
        sara.load(tiny_bert(), tmp_path)
    with pytest.raises(ValueError, match="no 'model.layers.1.*belongs to another base model"):
        sara.load(tiny_llama(num_layers=1), tmp_path)


def test_a_folder_without_a_delta_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no adapter of SaRA: sara_config.json is missing"):
        sara.load(tiny_llama(), tmp_path)
    sara.export(trained_run().model, tmp_path)
    config = tmp_path / "sara_config.json"
    config.write_text(config.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(ValueError, match="this version reads 'sara' up to 1"):
        sara.load(tiny_llama(), tmp_path)


def exported(folder, **damage):
    """A delta with some of its tensors replaced, or taken out where they are None."""
    sara.export(trained_run().model, folder)
    tensors = {**load_file(folder / "sara.safetensors"), **damage}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "sara.safetensors")


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({f"{UP}.values": torch.zeros(3)}, f"'{UP}' has 3 values for .* indices"),
        (
            {f"{UP}.values": torch.zeros(2), f"{UP}.indices": torch.tensor([0, 32 * 48])},
            r"indices from 0 to 1536, and shape \(48, 32\) allows 0 to 1535",
        ),
        (
            {f"{UP}.values": torch.zeros(1), f"{UP}.indices": torch.tensor([-1])},
            "indices from -1 to -1, and shape",
        ),
        ({f"{UP}.values": None}, f"has no '{UP}.values', which sara_config.json names"),
        ({f"{UP}.indices": None}, f"has no '{UP}', which sara_config.json names"),
        (
            {f"{UP}.values": None, f"{UP}.indices": None, UP: torch.zeros(48, 31)},
            r"has 1488 values for shape \(48, 32\)",
        ),
    ],
    ids=["values", "above", "below", "no values", "no indices", "whole tensor"],
)
def test_a_damaged_delta_is_refused_and_changes_nothing(damage, message, tmp_path):
    exported(tmp_path, **damage)
    model = tiny_llama()
    with pytest.raises(ValueError, match=message):
        sara.load(model, tmp_path, check_base=False)
    assert_same_state(model, tiny_llama())


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "[1, 2]",
        "{}",
        '{"method": "sara", "format_version": "1", "tensors": {}}',
        '{"method": "sara", "format_version": 1, "tensors": {"a": {}}}',
        '{"method": "sara", "format_version": 1, "tensors": {"a": {"shape": 3}}}',
        '{"method": "sara", "format_version": 1, "tensors": ["a"]}',
    ],
)
def test_a_description_that_is_none_is_refused(text, tmp_path):
    exported(tmp_path)
    (tmp_path / "sara_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"sara_config\.json is no description of an adapter"):
        sara.load(tiny_llama(), tmp_path)


def test_weights_that_are_no_safetensors_are_refused(tmp_path):
    exported(tmp_path)
    (tmp_path / "sara.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"sara\.safetensors is damaged"):
        sara.load(tiny_llama(), tmp_path)


def test_a_model_without_sara_is_not_exported(tmp_path):
    with pytest.raises(ValueError, match="call sara.apply first"):
        sara.export(tiny_llama(), tmp_path)
