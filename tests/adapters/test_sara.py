"""SaRA: small weights trained as vectors, selected again at half time, and exported as a delta."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize

from adarankgrad.adapters import SaRAConfig, sara
from adarankgrad.adapters.sara.small_weights import sites
from adarankgrad.adapters.sara.steps import rank_loss_gradient, selected_matrix

from .models import TinyConvNet, causal_loss, logits, tiny_bert, tiny_llama, token_batch
from .training import Run, assert_same_state

# Weights of the tiny models are drawn with a deviation of 0.02: a third of them is below this.
THRESHOLD = 0.008


def tiny_run(*, num_steps=8, model=None, lr=1e-3, weight_decay=0.0, batch_loss=None, **settings):
    config = SaRAConfig(
        **{"threshold": THRESHOLD, "rank_loss_weight": 0.0, "reselect_at": None} | settings
    )
    return Run(
        "sara",
        model or tiny_llama(),
        config,
        num_steps=num_steps,
        lr=lr,
        weight_decay=weight_decay,
        batch_loss=batch_loss,
    )


def image_loss(model, step):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(2, 3, 5, 5, generator=generator)
    return nn.functional.cross_entropy(model(images), torch.tensor([0, 1]))


def weights(model):
    """Present weights of the base model, by its own names."""
    return {name: param.detach().clone() for name, param in merged(model).named_parameters()}


def merged(model):
    return sara.merge(copy.deepcopy(model))


def nuclear_norms(model):
    return sum(
        float(torch.linalg.svdvals(selected_matrix(site)).sum())
        for site in sites(model)
        if site.base.dim() == 2
    )


# --- selection ---


def test_weights_below_the_threshold_are_selected_in_every_tensor():
    base = tiny_llama()
    model = sara.apply(tiny_llama(), SaRAConfig(threshold=THRESHOLD))
    selected = sara.num_selected(model)
    for name, param in base.named_parameters():
        assert selected.get(name, 0) == int((param.abs() < THRESHOLD).sum()), name
    assert not any("norm" in name for name in selected)


def test_zero_biases_are_selected_as_a_whole():
    model = sara.apply(tiny_bert(), SaRAConfig(threshold=1e-9))
    biases = [n for n, p in tiny_bert().named_parameters() if p.dim() == 1 and not p.any()]
    assert set(biases) <= set(sara.num_selected(model))


def test_a_quantile_selects_its_share_of_all_weights():
    model = sara.apply(tiny_llama(), SaRAConfig(quantile=0.1))
    num_all = sum(param.numel() for param in tiny_llama().parameters())
    assert sum(sara.num_selected(model).values()) == math.ceil(0.1 * num_all)
    assert 0.0 < sara.threshold_of(model) < 0.02


def test_patterns_choose_tensors():
    model = sara.apply(
        tiny_llama(),
        SaRAConfig(threshold=THRESHOLD, include="layers", exclude=["mlp", "k_proj"]),
    )
    kinds = {name.split(".")[-2] for name in sara.num_selected(model)}
    assert kinds == {"q_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 1e-12}, "threshold 1e-12 selects none of .* smallest magnitude is"),
        ({"threshold": 100.0}, r"threshold 100 selects all .* full fine-tuning"),
        ({"include": "conv"}, "include pattern 'conv' matches no trainable parameter"),
        ({"exclude": ["mlp", "bias"]}, "exclude pattern 'bias' matches no trainable"),
        ({"train_fully": "classifier"}, "train_fully pattern 'classifier' matches no trainable"),
        ({"include": "mlp", "exclude": "mlp"}, "no trainable parameter is left to select from"),
    ],
)
def test_a_selection_of_nothing_or_of_everything_is_refused_and_changes_nothing(settings, message):
    model = tiny_llama()
    with pytest.raises(ValueError, match=message):
        sara.apply(model, SaRAConfig(**{"threshold": THRESHOLD} | settings))
    assert all(param.requires_grad for param in model.parameters())
    assert not any(parametrize.is_parametrized(module) for module in model.modules())


def test_a_second_selection_on_top_is_refused():
    model = sara.apply(tiny_llama(), SaRAConfig())
    with pytest.raises(ValueError, match="carries SaRA already; merge it first"):
        sara.apply(model, SaRAConfig())


def test_recurrent_layers_are_refused_before_anything_changes():
    model = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4))
    with pytest.raises(ValueError, match="cannot train '1.weight_ih_l0': a LSTM"):
        sara.apply(model, SaRAConfig(threshold=0.1))
    assert model[0].weight.requires_grad and not parametrize.is_parametrized(model[0])
    sara.apply(model, SaRAConfig(threshold=0.1, exclude="^1"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 0.0}, "threshold must be"),
        ({"quantile": 1.0}, "quantile must be below 1"),
        ({"reselect_at": 1.5}, "reselect_at must be"),
        ({"rank_loss_weight": -1.0}, "rank_loss_weight must be"),
        ({"rank_loss_scope": "one"}, "rank_loss_scope must be one of random, all"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_a_setting_out_of_range_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        SaRAConfig(**settings)


# --- training vectors ---


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
    run = tiny_run().train(range(1, 4))
    causal_loss(run.model, token_batch()).backward()
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


def test_training_is_that_of_the_dense_model_with_a_masked_gradient():
    run = tiny_run(weight_decay=0.1).train(range(1, 5))
    dense = tiny_llama()
    masks = {name: param.detach().abs() < THRESHOLD for name, param in dense.named_parameters()}
    start = {name: param.detach().clone() for name, param in dense.named_parameters()}
    optimizer = torch.optim.AdamW(dense.parameters(), lr=1e-3, weight_decay=0.1)
    for step in range(1, 5):
        causal_loss(dense, token_batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, param in dense.named_parameters():
                param.copy_(torch.where(masks[name], param, start[name]))
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


def test_convolutions_and_attention_are_trained_in_any_memory_format():
    torch.manual_seed(0)
    base = TinyConvNet()
    run = tiny_run(model=copy.deepcopy(base), threshold=0.1, batch_loss=image_loss)
    run.model.to(memory_format=torch.channels_last)
    assert not run.model.conv.weight.is_contiguous()
    run.train(range(1, 4))
    start = dict(base.named_parameters())
    changed = {
        name for name, weight in weights(run.model).items() if not torch.equal(weight, start[name])
    }
    assert {"conv.weight", "attention.in_proj_weight", "attention.out_proj.weight"} <= changed


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


# --- low-rank term ---


def test_the_low_rank_term_reaches_the_trained_values():
    run = tiny_run(rank_loss_weight=3.0, rank_loss_scope="all", rank_loss_min_side=8)
    causal_loss(run.model, token_batch()).backward()
    before = {site.name: site.small.values.grad.clone() for site in sites(run.model)}
    run.hook.before_optimizer_step(1)
    for site in sites(run.model):
        matrix = selected_matrix(site).double().requires_grad_()
        if matrix.dim() != 2:
            assert torch.equal(site.small.values.grad, before[site.name])
            continue
        (gradient,) = torch.autograd.grad(torch.linalg.svdvals(matrix).sum(), matrix)
        push = 3.0 * gradient.take(site.small.indices.long()).float()
        # Singular vectors of small singular values are known to eps * largest / smallest.
        torch.testing.assert_close(
            site.small.values.grad - before[site.name], push, rtol=0, atol=3e-4
        )


def test_the_low_rank_term_lowers_the_nuclear_norm():
    settings = {"rank_loss_scope": "all", "rank_loss_min_side": 8}
    without = tiny_run(**settings).train(range(1, 9))
    with_term = tiny_run(rank_loss_weight=0.1, **settings).train(range(1, 9))
    assert nuclear_norms(with_term.model) < 0.9 * nuclear_norms(without.model)


def test_one_random_matrix_a_step_is_the_same_for_the_same_seed_and_step():
    def pushed(seed, step):
        run = tiny_run(rank_loss_weight=1.0, rank_loss_min_side=8, seed=seed)
        run.hook.before_optimizer_step(step)
        return [site.name for site in sites(run.model) if site.small.values.grad is not None]

    names = [pushed(0, step) for step in range(1, 7)]
    assert all(len(each) == 1 for each in names)
    assert len({each[0] for each in names}) > 2
    assert pushed(0, 3) == names[2]
    assert [pushed(1, step) for step in range(1, 7)] != names


def test_small_matrices_are_left_out_of_the_term():
    run = tiny_run(rank_loss_weight=1.0, rank_loss_scope="all", rank_loss_min_side=64)
    run.hook.before_optimizer_step(1)
    assert all(site.small.values.grad is None for site in sites(run.model))


def test_broken_weights_get_no_term():
    run = tiny_run()
    site = sites(run.model)[0]
    with torch.no_grad():
        site.small.values[0] = torch.nan
    assert torch.equal(rank_loss_gradient(site), torch.zeros_like(site.small.values))


# --- second selection ---


def test_the_second_selection_keeps_what_is_still_small_and_changes_no_output_by_a_bit():
    run = tiny_run(reselect_at=0.5).train(range(1, 4))
    tokens = token_batch()
    causal_loss(run.model, token_batch(4)).backward()
    run.optimizer.step()
    before, first = logits(merged(run.model), tokens), sara.num_selected(run.model)
    expected = {
        site.name: int((site.small.values.abs() < THRESHOLD).sum()) for site in sites(run.model)
    }
    run.hook.on_optimizer_step(4)
    assert sara.num_selected(run.model) == expected
    assert sum(expected.values()) < sum(first.values())
    assert torch.equal(logits(run.model, tokens), before)


def test_entries_frozen_by_the_second_selection_do_not_move_any_more():
    run = tiny_run(reselect_at=0.5, weight_decay=0.5).train(range(1, 5))
    before = weights(run.model)
    frozen = {
        site.name: site.small.indices[~site.small.trained].long() for site in sites(run.model)
    }
    run.train(range(5, 9))
    after = weights(run.model)
    assert sum(len(places) for places in frozen.values()) > 0
    for name, places in frozen.items():
        assert torch.equal(after[name].take(places), before[name].take(places)), name
    assert any(not torch.equal(after[name], before[name]) for name in after)


def test_frozen_entries_get_no_gradient_and_no_low_rank_term():
    run = tiny_run(
        reselect_at=0.5, rank_loss_weight=1e-6, rank_loss_scope="all", rank_loss_min_side=8
    ).train(range(1, 5))
    frozen = [~site.small.trained for site in sites(run.model)]
    assert any(each.any() for each in frozen)
    causal_loss(run.model, token_batch()).backward()
    after_backward = [
        site.small.values.grad[each] for site, each in zip(sites(run.model), frozen, strict=True)
    ]
    run.hook.before_optimizer_step(5)
    after_term = [
        site.small.values.grad[each] for site, each in zip(sites(run.model), frozen, strict=True)
    ]
    assert not any(each.any() for each in after_backward + after_term)


def test_every_batch_is_a_step_also_at_the_second_selection():
    run = tiny_run(reselect_at=0.5).train(range(1, 9))
    assert {int(state["step"]) for state in run.optimizer.state.values()} == {8}


def test_the_optimizer_can_start_again_at_the_second_selection():
    run = tiny_run(reselect_at=0.5, restart_optimizer=True).train(range(1, 9))
    assert {int(state["step"]) for state in run.optimizer.state.values()} == {4}
    run.hook.optimizer = None
    with pytest.raises(ValueError, match="restart_optimizer needs the optimizer"):
        run.hook.on_optimizer_step(1)


def test_a_second_selection_of_nothing_is_left_out_with_a_warning():
    run = tiny_run(reselect_at=0.5)
    with torch.no_grad():
        for site in sites(run.model):
            site.small.values.fill_(1.0)
    before = sara.num_selected(run.model)
    with pytest.warns(UserWarning, match="second selection is left out"):
        run.hook.reselect()
    assert sara.num_selected(run.model) == before


def test_without_second_selection_everything_stays_selected():
    run = tiny_run()
    before = sara.num_selected(run.model)
    assert sara.num_selected(run.train(range(1, 9)).model) == before


# --- resume ---


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


# --- export ---


def trained_run(**settings):
    return tiny_run(**{"reselect_at": 0.5} | settings).train(range(1, 9))


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


def test_the_published_rate_falls_with_the_threshold():
    # 1e-3 * exp(-0.7), the paper's 4.97e-4.
    assert sara.suggested_lr(2e-3) == pytest.approx(4.97e-4, rel=1e-3)
