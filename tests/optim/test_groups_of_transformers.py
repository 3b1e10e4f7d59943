"""`param_groups` on the real architectures of transformers, at tiny sizes."""

from __future__ import annotations

import pytest
import torch

from adarankgrad import AdaRankGrad, param_groups
from adarankgrad.reparam import PowerpropConfig, powered_weights, powerpropagate

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def build(name, **changes):
    if name == "llama":
        config = transformers.LlamaConfig(
            **SIZES, **TOKENS, intermediate_size=40, num_key_value_heads=1, **changes
        )
        return transformers.LlamaForCausalLM(config)
    if name == "mixtral":
        config = transformers.MixtralConfig(
            **SIZES, **TOKENS, intermediate_size=24, num_key_value_heads=1, num_local_experts=3
        )
        return transformers.MixtralForCausalLM(config)
    if name == "bert":
        config = transformers.BertConfig(
            **SIZES, **TOKENS, intermediate_size=32, max_position_embeddings=16
        )
        return transformers.BertForMaskedLM(config)
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=16, **TOKENS
    )
    return transformers.GPT2LMHeadModel(config)


def names_where(groups, **settings):
    return {
        name
        for group in groups
        if all(group.get(key) == value for key, value in settings.items())
        for name, _ in group["params"]
    }


PROJECTED_IN_A_LAYER = {
    "llama": [
        *(f"model.layers.{{}}.self_attn.{name}_proj.weight" for name in "qkvo"),
        *(f"model.layers.{{}}.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    ],
    "mixtral": [
        *(f"model.layers.{{}}.self_attn.{name}_proj.weight" for name in "qkvo"),
        *(f"model.layers.{{}}.mlp.experts.{name}_proj" for name in ("gate_up", "down")),
    ],
    "gpt2": [
        f"transformer.h.{{}}.{name}.weight"
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ],
    "bert": [
        f"bert.encoder.layer.{{}}.{name}.weight"
        for name in (
            *(f"attention.self.{name}" for name in ("query", "key", "value")),
            *("attention.output.dense", "intermediate.dense", "output.dense"),
        )
    ],
}
PROJECTED_ONCE = {"bert": {"cls.predictions.transform.dense.weight"}}


@pytest.mark.parametrize("name", PROJECTED_IN_A_LAYER)
def test_the_matrices_of_every_layer_are_projected_and_only_those(name):
    groups = param_groups(build(name))
    expected = {pattern.format(i) for pattern in PROJECTED_IN_A_LAYER[name] for i in range(2)}
    assert names_where(groups, project=True) == expected | PROJECTED_ONCE.get(name, set())


@pytest.mark.parametrize("name", PROJECTED_IN_A_LAYER)
def test_every_parameter_is_in_one_group_and_norms_and_biases_have_no_decay(name):
    model = build(name)
    groups = param_groups(model, weight_decay=0.1)
    listed = [name for group in groups for name, _ in group["params"]]
    assert sorted(listed) == sorted(name for name, _ in model.named_parameters())
    vectors = {name for name, param in model.named_parameters() if param.dim() < 2}
    assert names_where(groups, weight_decay=0.0) == vectors


def test_the_experts_of_mixtral_are_stacks():
    groups = param_groups(build("mixtral"))
    stacked = names_where(groups, stacked=True)
    assert len(stacked) == 4
    assert all(".experts." in name for name in stacked)
    assert "model.layers.0.mlp.gate.weight" in names_where(groups, project=False)


@pytest.mark.parametrize("is_tied", [True, False])
def test_embedding_and_head_of_llama_are_plain_tied_or_not(is_tied):
    groups = param_groups(build("llama", tie_word_embeddings=is_tied))
    plain = names_where(groups, project=False) - names_where(groups, weight_decay=0.0)
    expected = (
        {"model.embed_tokens.weight"}
        if is_tied
        else {"model.embed_tokens.weight", "lm_head.weight"}
    )
    assert plain == expected


@pytest.mark.parametrize("name", PROJECTED_IN_A_LAYER)
def test_a_tiny_model_of_each_architecture_learns_a_batch_by_heart(name):
    model = build(name)
    groups = param_groups(model, max_rank=4, min_rank=1, energy=0.9)
    optimizer = AdaRankGrad(groups, lr=0.02, refresh_max_gap=5)
    tokens = torch.arange(3, 19).view(2, 8)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # Sixteen tokens out of 64 start near ln 64 = 4.2; by heart is below 1.
    assert losses[0] > 3.5
    assert losses[-1] < 1.0


def test_weights_trained_by_a_power_are_grouped_as_the_plain_ones():
    plain, powered = build("gpt2"), build("gpt2")
    with pytest.raises(ValueError, match=r"lm_head\.weight is tied to transformer\.wte\.weight"):
        powerpropagate(powered)
    powerpropagate(powered, PowerpropConfig(exclude="lm_head"))
    assert len(powered_weights(powered)) == 8
    groups, expected = (param_groups(model, smallest_side=4) for model in (powered, plain))
    assert [{name for name, _ in group["params"]} for group in groups] == [
        {name for name, _ in group["params"]} for group in expected
    ]
