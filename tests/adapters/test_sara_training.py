"""SaRA: small weights trained as vectors, and a run that resumes."""

from __future__ import annotations

import copy

import pytest
import torch

from adarankgrad.adapters import SaRAConfig, sara
from adarankgrad.adapters.sara.small_weights import sites

from .models import TinyConvNet, causal_loss, logits, tiny_llama, token_batch
from .sara_runs import THRESHOLD, image_loss, merged, tiny_run, weights
from .training import assert_same_state


def test_applying_changes_no_output_by_a_bit_signs_included():
    tokens = token_batch()
    model = sara.apply(tiny_llama(), SaRAConfig(threshold=THRESHOLD))
    assert torch.equal(logits(model, tokens), logits(tiny_llama(), tokens))
    assert any((site.small.values < 0).any() for site in sites(model))


def test_the_gradient_is_the_dense_one_at_the_selected_entries_bit_for_bit():
    model = sara.apply(tiny_llama(), SaRAConfig(threshold=THRESHOLD))
    causal_loss(model, token_batch()).backward()
    dense = tiny_llama()
    causal_loss(dense, token_batch()).backward()
    for site in sites(model):
        expected = dense.get_parameter(site.name).grad.take(site.small.indices.long())
        assert torch.equal(site.small.values.grad, expected), site.name


def test_no_dense_gradient_is_kept_and_optimizer_state_is_two_numbers_a_selected_weight():
    # The low-rank term is what leaves one in the authors' code.
    term = {"rank_loss_weight": 1e-3, "rank_loss_scope": "all", "rank_loss_min_side": 8}
    run = tiny_run(**term).train(range(1, 4))
    causal_loss(run.model, token_batch()).backward()
    run.hook.before_optimizer_step(4)
    assert all(site.base.grad is None for site in sites(run.model))
    num_state = sum(
        tensor.numel()
        for state in run.optimizer.state.values()
        for name, tensor in state.items()
        if name != "step"
    )
    assert num_state == 2 * sum(sara.num_selected(run.model).values())


def test_no_copy_of_a_tensor_is_made_in_the_forward_pass():
    model = sara.apply(tiny_llama(), SaRAConfig(threshold=THRESHOLD))
    layer = model.model.layers[0].mlp.up_proj
    assert layer.weight.data_ptr() == layer.parametrizations.weight.original.data_ptr()


def test_training_moves_selected_entries_alone_under_decay_too():
    base = dict(tiny_llama().named_parameters())
    run = tiny_run(weight_decay=0.5).train(range(1, 5))
    for name, weight in weights(run.model).items():
        is_selected = base[name].abs() < THRESHOLD
        assert torch.equal(weight[~is_selected], base[name][~is_selected]), name
        assert not is_selected.any() or not torch.equal(weight, base[name])


@pytest.mark.parametrize("reselect_at", [None, 0.5])
def test_training_is_that_of_the_dense_model_with_a_masked_gradient_and_loses_no_batch(reselect_at):
    run = tiny_run(weight_decay=0.1, reselect_at=reselect_at).train(range(1, 9))
    dense = tiny_llama()
    masks = {name: param.detach().abs() < THRESHOLD for name, param in dense.named_parameters()}
    held = {name: param.detach().clone() for name, param in dense.named_parameters()}
    optimizer = torch.optim.AdamW(dense.parameters(), lr=1e-3, weight_decay=0.1)
    for step in range(1, 9):
        causal_loss(dense, token_batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, param in dense.named_parameters():
                param.copy_(torch.where(masks[name], param, held[name]))
                if reselect_at is not None and step == 4:
                    masks[name] &= param.abs() < THRESHOLD
                    held[name].copy_(param)
    for name, weight in weights(run.model).items():
        assert torch.equal(weight, dense.get_parameter(name)), name


def test_several_forward_passes_may_come_before_a_backward_pass():
    run = tiny_run().train([1])
    loss = causal_loss(run.model, token_batch(1)) + causal_loss(run.model, token_batch(2))
    loss.backward()
    both = [site.small.values.grad.clone() for site in sites(run.model)]
    run.optimizer.zero_grad()
    for step in (1, 2):
        causal_loss(run.model, token_batch(step)).backward()
    for site, gradient in zip(sites(run.model), both, strict=True):
        # The same two gradients, added in another order with others in between.
        torch.testing.assert_close(site.small.values.grad, gradient, rtol=1e-5, atol=1e-7)


def test_outputs_in_inference_mode_are_the_present_ones_and_training_goes_on_after_them():
    run = tiny_run().train([1])
    with torch.inference_mode():
        inferred = run.model(input_ids=token_batch()).logits
    assert torch.equal(logits(merged(run.model), token_batch()), inferred)
    run.train([2])
    assert not torch.equal(logits(run.model, token_batch()), inferred)


FORMATS = [torch.contiguous_format, torch.channels_last]


def convolving_run(memory_format):
    """A run of a model with convolution and attention, and the model itself."""
    torch.manual_seed(0)
    base = TinyConvNet().to(memory_format=memory_format)
    run = tiny_run(model=copy.deepcopy(base), threshold=0.1, batch_loss=image_loss)
    assert run.model.conv.weight.is_contiguous(memory_format=memory_format)
    return run, base


@pytest.mark.parametrize("memory_format", FORMATS)
def test_convolutions_and_attention_have_the_dense_gradient_in_any_memory_format(memory_format):
    run, dense = convolving_run(memory_format)
    image_loss(run.model, 1).backward()
    image_loss(dense, 1).backward()
    for site in sites(run.model):
        expected = dense.get_parameter(site.name).grad.take(site.small.indices.long())
        assert torch.equal(site.small.values.grad, expected), site.name


@pytest.mark.parametrize("memory_format", FORMATS)
def test_convolutions_and_attention_are_trained_and_exported_in_any_memory_format(
    memory_format, tmp_path
):
    run, base = convolving_run(memory_format)
    start = {name: param.detach().clone() for name, param in base.named_parameters()}
    changed = set()
    for name, weight in weights(run.train(range(1, 4)).model).items():
        is_selected = start[name].abs() < 0.1
        assert torch.equal(weight[~is_selected], start[name][~is_selected]), name
        changed |= set() if torch.equal(weight, start[name]) else {name}
    assert {"conv.weight", "attention.in_proj_weight", "attention.out_proj.weight"} <= changed
    sara.export(run.model, tmp_path)
    loaded = sara.load(base, tmp_path)
    # In training mode, since the running statistics of the norm are no weights.
    assert torch.equal(image_loss(loaded, 9), image_loss(run.model, 9))


def test_tied_weights_are_trained_once_with_the_gradient_of_both_uses():
    model = sara.apply(tiny_llama(tie=True), SaRAConfig(threshold=THRESHOLD))
    causal_loss(model, token_batch()).backward()
    dense = tiny_llama(tie=True)
    causal_loss(dense, token_batch()).backward()
    (site,) = [site for site in sites(model) if "embed_tokens" in site.name]
    expected = dense.model.embed_tokens.weight.grad.take(site.small.indices.long())
    # Two gradients added before or after the gathering.
    torch.testing.assert_close(site.small.values.grad, expected)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_values_of_half_precision_weights_are_float32_and_add_up_small_steps():
    model = sara.apply(tiny_llama().to(torch.bfloat16), SaRAConfig(threshold=THRESHOLD))
    site = sites(model)[0]
    assert site.small.values.dtype == torch.float32
    start = site.small.values.detach().clone()
    with torch.no_grad():
        for _ in range(64):
            site.small.values.add_(start, alpha=2**-9)  # half a bfloat16 step
    site.module(torch.zeros(1, dtype=torch.long))
    moved = site.base.take(site.small.indices.long())
    torch.testing.assert_close(moved, (start * 1.125).to(torch.bfloat16), rtol=2**-8, atol=0)


def test_data_parallel_training_does_not_broadcast_positions():
    model = sara.apply(tiny_llama(), SaRAConfig(threshold=THRESHOLD))
    buffers = {name for name, _ in model.named_buffers()} - {
        name for name, _ in tiny_llama().named_buffers()
    }
    assert len(buffers) == 2 * len(sites(model))
    assert buffers == set(model._ddp_params_and_buffers_to_ignore)


@pytest.mark.parametrize("half_at", [3, 4, 6])
def test_a_resumed_run_continues_bit_for_bit_before_at_and_after_the_second_selection(half_at):
    settings = {"reselect_at": 0.5, "rank_loss_weight": 0.1, "rank_loss_min_side": 8}
    whole = tiny_run(**settings).train(range(1, 9))
    half = tiny_run(**settings).train(range(1, half_at + 1))
    resumed = tiny_run(**settings)
    resumed.load_state_dict(half.state_dict())
    resumed.train(range(half_at + 1, 9))
    assert_same_state(merged(whole.model), merged(resumed.model))
    assert sara.num_selected(whole.model) == sara.num_selected(resumed.model)
