"""SoRA: gates on LoRA's ranks, shrunk to exact zeros, and a plain LoRA at the end."""

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

from adarankgrad.adapters import AdapterError, SoRAConfig, sora
from adarankgrad.adapters.lora import lora_layers
from adarankgrad.adapters.sora.gates import gated_layers, gates_of

from .models import causal_loss, logits, tiny_bert, tiny_gpt2, tiny_llama, token_batch
from .training import Run, assert_same_state


def tiny_run(*, num_steps=20, model=None, lr=1e-2, **settings):
    config = SoRAConfig(**{"rank": 4} | settings)
    base = model or tiny_llama()
    torch.manual_seed(1)
    return Run("sora", base, config, num_steps=num_steps, lr=lr)


def all_gates(model):
    return torch.cat([gate.detach().flatten() for gate in gates_of(model).values()])


def kill(model, name, kept=0):
    """Set all gates of a layer to zero but the first few."""
    with torch.no_grad():
        gates_of(model)[name][:, kept:] = 0.0


def saved_ranks(folder):
    state = load_file(folder / "adapter_model.safetensors")
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): len(weight)
        for name, weight in state.items()
        if "lora_A" in name
    }


# --- neutral setting ---


def test_gates_of_one_that_nothing_moves_are_a_plain_lora_bit_for_bit():
    run = tiny_run(gate_init="ones", train_gates=False, shrinkage=0.0).train(range(1, 5))
    base = tiny_llama()
    torch.manual_seed(1)
    plain = get_peft_model(base, LoraConfig(r=4, lora_alpha=16, target_modules="all-linear"))
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(1, 5):
        causal_loss(plain, token_batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    gated = {k: v for k, v in run.model.state_dict().items() if "lora_gate" not in k}
    assert gated.keys() == plain.state_dict().keys()
    assert all(torch.equal(gated[k], v) for k, v in plain.state_dict().items())
    assert torch.equal(logits(run.model, token_batch()), logits(plain, token_batch()))


def test_a_frozen_gate_is_not_shrunk():
    run = tiny_run(gate_init="ones", train_gates=False, shrinkage=0.1).train([1])
    assert torch.equal(all_gates(run.model), torch.ones(14 * 4))


# --- gates ---


def test_gates_are_drawn_from_a_normal_distribution_with_both_signs_and_held_in_float32():
    model = sora.apply(tiny_llama().to(torch.bfloat16), SoRAConfig(rank=16))
    gates = all_gates(model)
    assert gates.dtype == torch.float32
    # 224 draws: mean and deviation within four standard errors, 4 / sqrt(224) and 4 / sqrt(448).
    assert abs(gates.mean()) < 0.27 and abs(gates.std() - 1) < 0.19
    assert (gates > 0).any() and (gates < 0).any()
    assert not torch.equal(gates.to(torch.bfloat16).float(), gates)


def test_at_the_first_step_only_the_shrinkage_moves_the_gates():
    run = tiny_run(shrinkage=1e-3)
    before = all_gates(run.model)
    run.train([1])
    expected = nn.functional.softshrink(before, 1e-3)
    assert torch.equal(all_gates(run.model), expected)


def test_without_gradient_a_gate_dies_after_its_size_over_the_shrinkage():
    run = tiny_run(shrinkage=0.25)
    with torch.no_grad():
        for gate in gates_of(run.model).values():
            gate.copy_(torch.tensor([0.5, -0.75, 1.0, -1.25]))
    alive = []
    for step in range(1, 5):
        run.hook.on_optimizer_step(step)
        alive.append(sora.surviving_ranks(run.model)["model.layers.0.mlp.up_proj"])
    assert alive == [4, 3, 2, 1]
    with pytest.raises(AdapterError, match=r"zero after step 5, .* smaller shrinkage \(now 0\.25"):
        run.hook.on_optimizer_step(5)
    assert torch.equal(all_gates(run.model), torch.zeros(14 * 4))


def test_a_larger_shrinkage_never_leaves_more_ranks():
    def alive(shrinkage):
        run = tiny_run(shrinkage=shrinkage)
        for step in range(1, 11):
            run.hook.on_optimizer_step(step)
        return sum(sora.surviving_ranks(run.model).values())

    counts = [alive(shrinkage) for shrinkage in (0.0, 0.03, 0.1, 0.2)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 14 * 4 and counts[-1] < counts[1]


@pytest.mark.parametrize(("move", "is_alive"), [(0.09, False), (0.11, True)])
def test_a_dead_gate_lives_again_only_if_the_optimizer_moves_it_by_more_than_the_shrinkage(
    move, is_alive
):
    run = tiny_run(shrinkage=0.1)
    gate = next(iter(gates_of(run.model).values()))
    with torch.no_grad():
        gate.zero_()
    gate.grad = torch.ones_like(gate)
    torch.optim.SGD([gate], lr=move).step()
    run.hook.on_optimizer_step(1)
    assert bool((gate != 0).all()) is is_alive


def test_by_default_half_of_the_gates_without_gradient_die_within_the_run():
    run = tiny_run(rank=64, num_steps=50)
    for step in range(1, 51):
        run.hook.on_optimizer_step(step)
    # 896 gates: a share of one half within four standard errors, 4 * 0.5 / sqrt(896).
    assert abs((all_gates(run.model) == 0).float().mean() - 0.5) < 0.067


def test_the_official_threshold_can_be_chosen():
    run = tiny_run(shrinkage=0.25, threshold="official")
    with torch.no_grad():
        for gate in gates_of(run.model).values():
            gate.copy_(torch.tensor([0.125, 0.25, 0.375, 0.5]))
    run.hook.on_optimizer_step(1)
    assert all_gates(run.model)[:4].tolist() == [0.0, 0.25, 0.0, 0.25]


def test_a_shrinkage_in_units_of_the_rate_follows_the_gates_present_rate():
    run = tiny_run(shrinkage=2.0, shrinkage_unit="lr", gate_lr=0.05)
    before = all_gates(run.model)
    run.hook.on_optimizer_step(1)
    assert torch.equal(all_gates(run.model), nn.functional.softshrink(before, 0.1))


def test_a_shrinkage_in_units_of_the_rate_needs_an_optimizer_that_trains_the_gates():
    run = tiny_run(shrinkage=2.0, shrinkage_unit="lr")
    run.hook.optimizer = None
    with pytest.raises(ValueError, match="needs the optimizer"):
        run.hook.on_optimizer_step(1)
    run.hook.optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match="does not train the gates"):
        run.hook.on_optimizer_step(1)


def test_the_l1_term_is_off_by_default_and_else_adds_the_gradient_of_the_mean_of_all_gates():
    run = tiny_run(l1_weight=3.0)
    causal_loss(run.model, token_batch()).backward()
    gates = list(gates_of(run.model).values())
    before = [gate.grad.clone() for gate in gates]
    run.hook.before_optimizer_step(1)
    penalty = 3.0 * torch.cat([gate.flatten() for gate in gates]).abs().mean()
    for gate, old, push in zip(gates, before, torch.autograd.grad(penalty, gates), strict=True):
        torch.testing.assert_close(gate.grad, old + push)
    plain = tiny_run()
    plain.hook.before_optimizer_step(1)
    assert all(gate.grad is None for gate in gates_of(plain.model).values())


def test_gates_have_a_rate_of_their_own_and_no_decay():
    run = tiny_run(gate_lr=0.5)
    groups = sora.param_groups(run.model, SoRAConfig(gate_lr=0.5), lr=1e-3, weight_decay=0.1)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-3, 0.1), (0.5, 0.0)]
    assert sum(gate.numel() for gate in groups[1]["params"]) == 14 * 4
    trainable = sum(param.requires_grad for param in run.model.parameters())
    assert sum(len(group["params"]) for group in groups) == trainable


def test_surviving_parameters_are_counted_with_each_layers_own_shape():
    model = tiny_run().model
    for name in gates_of(model):
        kill(model, name)
    counted = "model.layers.0.mlp.up_proj"
    with torch.no_grad():
        gates_of(model)[counted][:, :3] = 1.0
    assert sora.num_surviving_parameters(model) == 3 * (32 + 48)


# --- schedule ---


def phased(**settings):
    return SoRAConfig(**{"num_phases": 3, "max_shrinkage": 0.6, "shrinkage": 0.0} | settings)


def test_shrinkage_rises_from_phase_to_phase_up_to_the_largest():
    plan = sora.schedule(phased(), num_steps=12)
    shrinkages = [plan.shrinkage_at(step) for step in range(1, 13)]
    assert shrinkages == pytest.approx([0.0] * 6 + [0.2] * 2 + [0.4] * 2 + [0.6] * 2)


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [
        ("linear", [0.3, 0.5]),
        ("exp_linear", [0.1 * 5**0.5, 0.5]),
        # log of the mean of exp(0.1) and exp(0.5).
        ("log_linear", [0.31986807, 0.5]),
    ],
)
def test_phases_are_spaced_evenly_in_value_in_logarithm_or_in_exponential(spacing, expected):
    config = phased(num_phases=2, shrinkage=0.1, max_shrinkage=0.5, phase_spacing=spacing)
    assert sora.schedule(config, num_steps=8).shrinkages[1:] == pytest.approx(expected)


def test_the_rate_warms_up_and_decays_in_every_phase_and_is_never_zero():
    factor = sora.lr_factor(phased(warmup_share=0.25), num_steps=24)
    first, second = [factor(done) for done in range(12)], [factor(done) for done in range(12, 16)]
    assert first == pytest.approx([0.25, 0.5, 0.75, *(k / 9 for k in range(9, 0, -1))])
    assert second == pytest.approx([0.5, 1.0, 2 / 3, 1 / 3])
    assert second == [factor(done) for done in range(20, 24)]
    assert factor(24) == 0.0


def test_every_phase_trains_a_and_b():
    config = phased(rank=4, max_shrinkage=1e-3)
    run = Run("sora", tiny_llama(), config, num_steps=8)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        run.optimizer, sora.lr_factor(config, num_steps=8)
    )
    layer = gated_layers(run.model)["model.layers.0.mlp.up_proj"]
    for step in range(1, 9):
        before = layer.lora_A["default"].weight.clone(), layer.lora_B["default"].weight.clone()
        run.train([step])
        scheduler.step()
        assert not torch.equal(layer.lora_B["default"].weight, before[1])
        # B is zero at the first step, and so is A's gradient.
        assert step == 1 or not torch.equal(layer.lora_A["default"].weight, before[0])


def test_too_few_steps_for_the_phases_are_refused():
    with pytest.raises(ValueError, match="4 steps are too few for num_phases 3"):
        sora.schedule(phased(), num_steps=4)


# --- resume ---


def test_a_resumed_run_continues_bit_for_bit_across_a_phase():
    settings = {"num_phases": 2, "max_shrinkage": 0.05}
    whole = tiny_run(num_steps=8, **settings).train(range(1, 9))
    half = tiny_run(num_steps=8, **settings).train(range(1, 5))
    resumed = tiny_run(num_steps=8, **settings)
    resumed.load_state_dict(half.state_dict())
    resumed.train(range(5, 9))
    assert_same_state(whole.model, resumed.model)
    assert (all_gates(whole.model) == 0).any()


# --- export ---


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
    torch.testing.assert_close(loaded(inputs), model(inputs), rtol=1e-5, atol=1e-5)


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
    torch.testing.assert_close(model.merge_and_unload()(inputs), gated, rtol=1e-5, atol=1e-5)


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


# --- bad settings ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be"),
        ({"alpha": -1.0}, "alpha must be"),
        ({"gate_init": "zeros"}, "gate_init must be one of normal, ones"),
        ({"threshold": "hard"}, "threshold must be one of soft, official"),
        ({"shrinkage": -1e-3}, "shrinkage must be at least 0"),
        ({"shrinkage_unit": "step"}, "shrinkage_unit must be"),
        ({"num_phases": 2}, "num_phases 2 needs max_shrinkage above shrinkage"),
        ({"max_shrinkage": 1e-3}, "set num_phases too"),
        (
            {"num_phases": 2, "max_shrinkage": 1e-3, "phase_spacing": "exp_linear"},
            "needs a shrinkage above 0",
        ),
        ({"first_phase_share": 1.5}, "first_phase_share must be"),
    ],
)
def test_a_setting_out_of_range_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        SoRAConfig(**settings)


def test_a_target_that_is_not_linear_is_refused():
    with pytest.raises(ValueError, match="SoRA adapts linear layers only.*Embedding"):
        sora.apply(tiny_llama(), SoRAConfig(target_modules=["embed_tokens"]))


def test_a_target_that_matches_nothing_is_refused():
    with pytest.raises(ValueError, match="match no module"):
        sora.apply(tiny_llama(), SoRAConfig(target_modules=["c_attn"]))
