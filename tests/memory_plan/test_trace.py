"""A traced pass holds what a real one holds."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from transformers import BertConfig, GPT2Config, LlamaConfig

from adarankgrad.memory_plan.live_bytes import LiveBytes
from adarankgrad.memory_plan.lora import add_adapters
from adarankgrad.memory_plan.trace import (
    fake_tensors,
    materialize,
    trace_training,
)
from adarankgrad.train.presets import ModelPlan, build_model, checkpoint_activations

SEQ_LEN = 32
CONFIGS = {
    "llama": LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=500,
    ),
    "gpt2": GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=500, n_positions=64),
    "bert": BertConfig(
        is_decoder=True,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=500,
        max_position_embeddings=64,
    ),
}


def traced(kind, prepare=lambda model: None, **options):
    config = copy.deepcopy(CONFIGS[kind])
    model = build_model(ModelPlan(config, None), 0, meta=True)
    with fake_tensors():
        materialize(model)
        prepare(model)
        return trace_training(model, SEQ_LEN, **options)


def measured_peak(kind, batch_size, prepare=lambda model: None, *, is_mixed=False):
    """What a real forward and backward pass holds at most, each gradient freed when it is final."""
    model = build_model(ModelPlan(copy.deepcopy(CONFIGS[kind]), None), 0)
    model.config.use_cache = False
    model.train()
    prepare(model)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(lambda w: setattr(w, "grad", None))
    tokens = torch.zeros(batch_size, SEQ_LEN, dtype=torch.long)
    with LiveBytes([*model.parameters(), *model.buffers()]) as counter:
        with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
    return counter.peak


# The same operators run, but that a real pass of LLaMA keeps 8 bytes a token from looking whether
# sequences are packed, where the activations of these small models take more than 4 kB: 0.2 %.
ONE_TABLE = 0.002


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_peak_is_that_of_a_real_pass_at_any_batch(kind):
    trace = traced(kind)
    for batch_size in (2, 5):
        expected = measured_peak(kind, batch_size)
        assert trace.live(batch_size).max() == pytest.approx(expected, rel=ONE_TABLE)


def test_checkpointed_and_mixed_passes_are_traced_as_they_run():
    for options in ({}, {"is_mixed": True}):
        # Fake tensors have no random state to preserve.
        keep = functools.partial(checkpoint_activations, preserve_rng_state=False)
        trace = traced("llama", keep, **options)
        expected = measured_peak("llama", 4, checkpoint_activations, **options)
        assert trace.live(4).max() == pytest.approx(expected, rel=ONE_TABLE)
        assert trace.live(4).max() < traced("llama", **options).live(4).max()


def test_adapters_hold_less_than_the_weights_they_replace():
    def adapt(model):
        add_adapters(model, 2, torch.float32)

    trace = traced("llama", adapt)
    assert trace.live(4).max() == pytest.approx(measured_peak("llama", 4, adapt), rel=ONE_TABLE)
    assert trace.live(4).max() < traced("llama").live(4).max()
    # Seven linear layers in each of three blocks.
    assert len(trace.gradients) == 2 * 7 * 3


def test_gradients_become_final_from_the_head_to_the_embedding():
    gradients = traced("llama").gradients
    assert gradients[0].name == "lm_head.weight"
    assert gradients[-1].name == "model.embed_tokens.weight"
    assert gradients[0].num_bytes == 500 * 64 * 4


def test_a_tied_weight_has_one_gradient():
    names = [gradient.name for gradient in traced("gpt2").gradients]
    assert names.count("transformer.wte.weight") == 1
    assert "lm_head.weight" not in names


def test_nothing_is_alive_at_the_end_but_the_loss():
    trace = traced("llama")
    # The loss, and the tokens, 8 bytes each, one sequence at a time.
    assert trace.constant[-1] <= 64
    assert trace.per_sequence[-1] <= 8 * SEQ_LEN
