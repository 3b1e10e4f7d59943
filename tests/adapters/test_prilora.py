"""PRILoRA: ranks over depth, and pruning of A by weight times input norm."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from adarankgrad.adapters import PRILoRAConfig, prilora
from adarankgrad.adapters.prilora.ranks import depth_ranks, linear_ranks

from .models import causal_loss, logits, tiny_bert, tiny_gpt2, tiny_llama, token_batch
from .training import Run, assert_same_state

TWELVE = [4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11, 12]


def a_weights(model):
    return {name: param for name, param in model.named_parameters() if "lora_A" in name}


def tiny_run(**settings):
    config = PRILoRAConfig(**{"first_rank": 2, "last_rank": 4, "prune_every": 3} | settings)
    return Run("prilora", tiny_llama(), config)


def test_twelve_layers_from_four_to_twelve_have_the_published_ranks_and_mean():
    assert linear_ranks(4, 12, 12) == TWELVE
    assert sum(TWELVE) == 8 * 12


def test_one_layer_has_the_mean_rank():
    assert linear_ranks(4, 12, 1) == [8]


def test_rounded_halves_do_not_add_up():
    assert sum(linear_ranks(4, 12, 17)) == 8 * 17


def test_a_model_has_the_ranks_in_its_layers_and_as_many_parameters_as_with_their_mean():
    model = prilora.apply(tiny_llama(num_layers=12), PRILoRAConfig())
    ranks = [
        model.get_submodule(f"base_model.model.model.layers.{layer}.mlp.up_proj").r["default"]
        for layer in range(12)
    ]
    uniform = get_peft_model(
        tiny_llama(num_layers=12), LoraConfig(r=8, target_modules="all-linear")
    )
    assert ranks == TWELVE
    assert model.get_nb_trainable_parameters() == uniform.get_nb_trainable_parameters()


class ManyLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(4, 4)}) for _ in range(11))


def test_layer_one_is_not_layer_ten():
    config = PRILoRAConfig(first_rank=1, last_rank=11, target_modules=["fc"])
    layers = prilora.apply(ManyLayers(), config).base_model.model.layers
    assert [layer["fc"].r["default"] for layer in layers] == list(range(1, 12))


def test_each_stack_of_layers_rises_by_itself():
    names = ["encoder.0.fc", "encoder.1.fc", "decoder.0.fc", "decoder.1.fc", "decoder.2.fc"]
    ranks = depth_ranks(names, names, first=1, last=5)
    assert list(ranks.values()) == [1, 5, 1, 3, 5]


def test_a_stack_whose_name_ends_with_anothers_keeps_its_own_ranks():
    names = ["layers.0.fc", "layers.1.fc", *(f"decoder.layers.{layer}.fc" for layer in range(3))]
    ranks = depth_ranks(names, names, first=1, last=5)
    assert [ranks[get_pattern_key(ranks, name)] for name in names] == [1, 5, 1, 3, 5]


def test_depth_is_the_models_where_only_some_layers_are_targeted():
    names = [f"layers.{layer}.fc" for layer in range(5)]
    assert list(depth_ranks(names, names[2:3], first=1, last=5).values()) == [3]


@pytest.mark.parametrize(
    ("rule", "scalings"), [("constant_scaling", [4.0, 4.0]), ("constant_alpha", [6.0, 3.0])]
)
def test_scaling_is_the_same_in_all_layers_or_alpha_is(rule, scalings):
    config = PRILoRAConfig(first_rank=2, last_rank=4, alpha=12.0, alpha_rule=rule)
    model = prilora.apply(tiny_llama(), config)
    layers = [f"base_model.model.model.layers.{layer}.mlp.up_proj" for layer in range(2)]
    assert [model.get_submodule(layer).scaling["default"] for layer in layers] == scalings


def test_without_pruning_it_is_a_lora_with_rank_pattern_bit_for_bit():
    run = tiny_run(prune_share=0.0).train(range(1, 7))
    base = tiny_llama()
    plain = get_peft_model(
        base,
        LoraConfig(
            r=4,
            target_modules=r"model\.layers\..*_proj",
            rank_pattern={r"layers\.0\..*": 2, r"layers\.1\..*": 4},
            alpha_pattern={r"layers\.0\..*": 2 * 16 / 3, r"layers\.1\..*": 4 * 16 / 3},
        ),
    )
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0)
    plain.train()
    for step in range(1, 7):
        causal_loss(plain, token_batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same_state(run.model, plain)


@pytest.mark.parametrize("share", [0.5, 0.29])
def test_an_event_zeroes_exactly_the_share_of_each_row_and_changes_nothing_else(share):
    run = tiny_run(prune_share=share, prune_every=100).train(range(1, 4))
    before = {name: weight.detach().clone() for name, weight in a_weights(run.model).items()}
    run.hook.prune()
    for name, weight in a_weights(run.model).items():
        is_zero = weight == 0
        assert (is_zero.sum(1) == math.floor(share * weight.shape[1])).all()
        assert torch.equal(weight[~is_zero], before[name][~is_zero])


def test_what_an_event_keeps_is_at_least_as_important_as_what_it_drops():
    run = tiny_run(prune_every=100).train(range(1, 4))
    before = {name: weight.detach().clone() for name, weight in a_weights(run.model).items()}
    run.hook.prune()
    for name, layer in run.hook.layers.items():
        weight = layer.lora_A["default"].weight
        old = before[f"base_model.model.{name}.lora_A.default.weight"]
        importance = old.abs() * run.hook.norms.means[name]
        for row, is_dropped in zip(importance, weight == 0, strict=True):
            assert row[~is_dropped].min() >= row[is_dropped].max()


def test_a_whole_matrix_can_be_compared():
    run = tiny_run(compare="matrix", prune_every=100).train(range(1, 4))
    run.hook.prune()
    num_zeros = [(weight == 0).sum(1) for weight in a_weights(run.model).values()]
    assert all(
        zeros.sum() == weight.numel() // 2
        for zeros, weight in zip(num_zeros, a_weights(run.model).values(), strict=True)
    )
    assert any(len(set(zeros.tolist())) > 1 for zeros in num_zeros)


def test_events_come_every_so_many_steps_and_pruned_entries_grow_again_between_them():
    run = tiny_run(prune_every=3)
    run.train(range(1, 3))
    assert all((weight != 0).all() for weight in a_weights(run.model).values())
    run.train([3])
    zeros = {name: weight == 0 for name, weight in a_weights(run.model).items()}
    assert all(is_zero.any() for is_zero in zeros.values())
    run.train([4])
    assert all((w[zeros[name]] != 0).any() for name, w in a_weights(run.model).items())


class OneLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 5)])

    def forward(self, inputs, attention_mask=None):
        return self.layers[0](inputs)


def one_layer_hook(**settings):
    config = PRILoRAConfig(first_rank=2, last_rank=2, **settings)
    model = prilora.apply(OneLayer(), config)
    model.train()
    return model, prilora.step_hook(model, config, num_steps=1)


def mean_of(hook):
    return hook.norms.means["layers.0"]


def test_with_decay_zero_the_norms_are_those_of_the_last_step():
    model, hook = one_layer_hook(norm_decay=0.0)
    for step in (1, 2):
        inputs = torch.randn(3, 4, 6)
        model(inputs)
        hook.on_optimizer_step(step)
    # A square root of summed squares in two orders: a few roundings of float32.
    torch.testing.assert_close(mean_of(hook), inputs.reshape(-1, 6).norm(dim=0))


def test_norms_of_a_constant_input_converge_to_its_norm():
    model, hook = one_layer_hook(norm_decay=0.5)
    inputs = torch.randn(3, 4, 6)
    for step in range(1, 31):
        model(inputs)
        hook.on_optimizer_step(step)
    # 0.5 ** 30 of the norm is missing, less than a rounding.
    torch.testing.assert_close(mean_of(hook), inputs.reshape(-1, 6).norm(dim=0))


def test_micro_batches_count_as_one_batch():
    model, hook = one_layer_hook()
    inputs = torch.randn(4, 3, 6)
    model(inputs)
    hook.on_optimizer_step(1)
    whole = mean_of(hook).clone()
    model, hook = one_layer_hook()
    model(inputs[:1])
    model(inputs[1:])
    hook.on_optimizer_step(1)
    # The same sum of squares in another order.
    torch.testing.assert_close(mean_of(hook), whole)


@pytest.mark.parametrize("is_keyword", [True, False])
def test_padding_does_not_count(is_keyword):
    model, hook = one_layer_hook(norm_decay=0.0)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    inputs = torch.randn(2, 3, 6).masked_fill(mask.unsqueeze(-1) == 0, float("nan"))
    if is_keyword:
        model(inputs, attention_mask=mask)
    else:
        model(inputs, mask)
    hook.on_optimizer_step(1)
    torch.testing.assert_close(mean_of(hook), inputs[mask.bool()].norm(dim=0))


def test_padding_does_not_count_where_a_model_flattens_its_batches():
    model, hook = one_layer_hook(norm_decay=0.0)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    inputs = torch.randn(2, 3, 6)
    model(inputs.reshape(-1, 6), attention_mask=mask)
    hook.on_optimizer_step(1)
    torch.testing.assert_close(mean_of(hook), inputs[mask.bool()].norm(dim=0))


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("is_left", [False, True])
def test_padding_of_a_decoder_does_not_count(build, task_type, is_left):
    def norms(batches):
        torch.manual_seed(1)
        config = PRILoRAConfig(first_rank=2, last_rank=2, norm_decay=0.0, task_type=task_type)
        run = Run("prilora", build(), config)
        for module in run.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        for tokens, mask in batches:
            positions = (mask.cumsum(-1) - 1).clamp_min(0)
            run.model(input_ids=tokens, attention_mask=mask, position_ids=positions)
        run.hook.on_optimizer_step(1)
        return run.hook.norms.means

    rows = token_batch(batch=2)
    short, (filler, ones) = rows[1:, :-3], (rows[:1, :3], torch.ones_like(rows[:1]))
    row = torch.cat([filler, short] if is_left else [short, filler], dim=1)
    mask = torch.cat([0 * filler, ones[:, 3:]] if is_left else [ones[:, 3:], 0 * filler], dim=1)
    padded = norms([(torch.cat([rows[:1], row]), torch.cat([ones, mask]))])
    alone = norms([(rows[:1], ones), (short, ones[:, 3:])])
    for name, mean in alone.items():
        # Attention over padded rows sums in another order.
        torch.testing.assert_close(padded[name], mean, rtol=1e-4, atol=1e-5)


def test_norms_do_not_move_in_evaluation():
    model, hook = one_layer_hook()
    model.eval()
    model(torch.randn(2, 3, 6))
    hook.on_optimizer_step(1)
    assert torch.equal(mean_of(hook), torch.zeros(6))


def test_a_broken_batch_leaves_the_norms_as_they_were():
    model, hook = one_layer_hook()
    model(torch.randn(2, 3, 6))
    hook.on_optimizer_step(1)
    before = mean_of(hook).clone()
    model(torch.full((2, 3, 6), torch.inf))
    hook.on_optimizer_step(2)
    assert torch.equal(mean_of(hook), before)


def test_activation_checkpointing_does_not_count_inputs_twice():
    model, hook = one_layer_hook(norm_decay=0.0)
    inputs = torch.randn(3, 4, 6)
    checkpoint(model, inputs, use_reentrant=False).sum().backward()
    hook.on_optimizer_step(1)
    torch.testing.assert_close(mean_of(hook), inputs.reshape(-1, 6).norm(dim=0))


def test_pruning_is_by_input_norm_and_not_by_weight_alone():
    model, hook = one_layer_hook(prune_share=0.5)
    weight = model.base_model.model.layers[0].lora_A["default"].weight
    with torch.no_grad():
        weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]).expand(2, 6))
    model(torch.tensor([[6.0, 6.0, 6.0, 1.0, 1.0, 1.0]]))
    hook.on_optimizer_step(1)
    hook.prune()
    # Importances 6, 12, 18, 4, 5, 6 (times 0.1): the tie of the first and the last goes left.
    assert torch.equal(weight[0], torch.tensor([0.0, 2.0, 3.0, 0.0, 0.0, 6.0]))


def test_a_removed_hook_sees_nothing():
    model, hook = one_layer_hook()
    hook.remove()
    model(torch.randn(2, 3, 6))
    hook.on_optimizer_step(1)
    assert torch.equal(mean_of(hook), torch.zeros(6))


def test_a_resumed_run_continues_bit_for_bit():
    whole = tiny_run().train(range(1, 9))
    half = tiny_run().train(range(1, 5))
    resumed = tiny_run()
    resumed.load_state_dict(half.state_dict())
    resumed.train(range(5, 9))
    assert_same_state(whole.model, resumed.model)


def test_the_state_loads_with_weights_only(tmp_path):
    run = tiny_run().train([1])
    torch.save(run.hook.state_dict(), tmp_path / "hook.pt")
    state = torch.load(tmp_path / "hook.pt", weights_only=True)
    run.hook.load_state_dict(state)


def test_state_of_another_model_is_refused():
    state = tiny_run().hook.state_dict()
    config = PRILoRAConfig(target_modules=["q_proj"])
    other = Run("prilora", tiny_llama(), config)
    with pytest.raises(ValueError, match="norms belong to other layers"):
        other.hook.load_state_dict(state)


def test_any_peft_user_loads_what_is_exported(tmp_path):
    run = tiny_run().train(range(1, 7))
    prilora.export(run.model, tmp_path)
    tokens = token_batch()
    trained = logits(run.model, tokens)
    reloaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(logits(reloaded, tokens), trained)
    assert torch.equal(logits(prilora.load(tiny_llama(), tmp_path), tokens), trained)
    # Logits of about 0.1; a merge rounds weights of about 0.02 once, 32 inputs a product.
    merged = reloaded.merge_and_unload()
    torch.testing.assert_close(logits(merged, tokens), trained, rtol=0, atol=1e-5)


def test_an_event_before_the_export_makes_the_saved_share_of_zeros_exact(tmp_path):
    run = tiny_run(prune_share=0.25).train(range(1, 5))
    run.hook.prune()
    prilora.export(run.model, tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    shares = [(each == 0).float().mean(1) for name, each in state.items() if "lora_A" in name]
    assert len(shares) == 14
    assert all(torch.equal(share, torch.full_like(share, 0.25)) for share in shares)


def test_transposed_linear_layers_of_gpt2_are_pruned_and_exported(tmp_path):
    run = Run("prilora", tiny_gpt2(), PRILoRAConfig(prune_every=3)).train(range(1, 4))
    layer = run.hook.layers["transformer.h.0.mlp.c_proj"]
    assert run.hook.norms.means["transformer.h.0.mlp.c_proj"].shape == (128,)
    assert (layer.lora_A["default"].weight == 0).any()
    prilora.export(run.model, tmp_path)
    loaded = prilora.load(tiny_gpt2(), tmp_path)
    assert torch.equal(logits(loaded, token_batch()), logits(run.model, token_batch()))


def test_a_classifier_is_trained_saved_and_loaded_with_the_adapter(tmp_path):
    config = PRILoRAConfig(first_rank=2, last_rank=4, task_type="SEQ_CLS")
    labels = torch.tensor([0, 1, 2, 0])
    run = Run(
        "prilora",
        tiny_bert(),
        config,
        batch_loss=lambda model, step: model(input_ids=token_batch(step), labels=labels).loss,
    ).train(range(1, 4))
    assert not any("pooler" in name for name in run.hook.layers)
    prilora.export(run.model, tmp_path)
    reloaded = prilora.load(tiny_bert(), tmp_path)
    assert torch.equal(logits(reloaded, token_batch()), logits(run.model, token_batch()))


def test_a_target_outside_the_layers_is_refused():
    with pytest.raises(ValueError, match="'bert.pooler.dense' lies in no numbered layer"):
        prilora.apply(tiny_bert(), PRILoRAConfig(target_modules=["query", "pooler.dense"]))


def test_a_target_that_matches_nothing_is_refused():
    with pytest.raises(ValueError, match=r"{'c_attn'} match no module; .* 15 linear layers"):
        prilora.apply(tiny_llama(), PRILoRAConfig(target_modules=["c_attn"]))


def test_a_target_that_is_not_linear_is_refused():
    with pytest.raises(ValueError, match="PRILoRA adapts linear layers only.*LlamaRMSNorm"):
        prilora.apply(tiny_llama(), PRILoRAConfig(target_modules=["input_layernorm"]))


def test_a_model_with_an_adapter_is_refused():
    model = prilora.apply(tiny_llama(), PRILoRAConfig())
    with pytest.raises(ValueError, match="carries a peft adapter already"):
        prilora.apply(model, PRILoRAConfig())


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("first_rank", 0),
        ("last_rank", 2.5),
        ("prune_share", 1.0),
        ("prune_every", 0),
        ("norm_decay", 1.0),
        ("alpha", 0.0),
        ("alpha_rule", "rank"),
        ("compare", "column"),
        ("dropout", -0.1),
        ("dropout", 1.0),
    ],
)
def test_a_setting_out_of_range_is_named(setting, value):
    with pytest.raises(ValueError, match=f"{setting} must be"):
        PRILoRAConfig(**{setting: value})


def test_an_adapter_of_another_base_model_is_refused(tmp_path):
    prilora.export(prilora.apply(tiny_llama(num_layers=3), PRILoRAConfig()), tmp_path)
    with pytest.raises(ValueError, match=r"no module 'model.layers.2.*another base model"):
        prilora.load(tiny_llama(num_layers=2), tmp_path)
    with pytest.raises(ValueError, match="no module 'model.layers.0.*another base model"):
        prilora.load(tiny_bert(), tmp_path)


def test_truncated_weights_are_refused(tmp_path):
    prilora.export(prilora.apply(tiny_llama(), PRILoRAConfig()), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is damaged"):
        prilora.load(tiny_llama(), tmp_path)


def test_a_folder_without_adapter_is_refused(tmp_path):
    with pytest.raises(ValueError, match="adapter_config.json is missing"):
        prilora.load(tiny_llama(), tmp_path)
