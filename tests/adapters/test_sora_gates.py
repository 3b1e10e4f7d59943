"""SoRA: gates on LoRA's ranks, shrunk to exact zeros."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from adarankgrad.adapters import AdapterError, SoRAConfig, sora
from adarankgrad.adapters.sora.gates import gates_of

from .models import causal_loss, logits, tiny_llama, token_batch
from .sora_runs import all_gates, kill, tiny_run


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
    run = tiny_run(gate_init="ones", train_gates=False).train([1])
    assert torch.equal(all_gates(run.model), torch.ones(14 * 4))


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


@pytest.mark.parametrize(
    ("settings", "is_warned"),
    [
        # The default is 0.6745 / 20 = 0.034 a step.
        ({"gate_lr": 0.03}, True),
        ({"gate_lr": 0.04}, False),
        ({"gate_lr": 8e-4, "shrinkage": 3e-4}, False),
        ({"gate_lr": 8e-4, "num_phases": 2, "max_shrinkage": 1e-3}, True),
        ({"gate_lr": 0.04, "shrinkage": 2.0, "shrinkage_unit": "lr"}, True),
        ({"gate_lr": 0.04, "shrinkage": 0.5, "shrinkage_unit": "lr"}, False),
        ({"train_gates": False}, False),
    ],
)
def test_a_shrinkage_above_the_gates_rate_warns_that_no_gate_can_hold(settings, is_warned):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tiny_run(num_steps=20, **settings)
    assert any("is above the gates' rate" in str(each.message) for each in caught) is is_warned


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
        ({"first_phase_share": 0.0}, r"first_phase_share must be in \(0, 1\)"),
        ({"first_phase_share": 1.0}, r"first_phase_share must be in \(0, 1\)"),
        ({"warmup_share": 1.0}, r"warmup_share must be in \[0, 1\)"),
        ({"train_gates": False, "shrinkage": 1e-3}, "nothing that shrinkage 0.001 could move"),
        ({"train_gates": False, "l1_weight": 10.0}, "nothing that l1_weight 10.0 could move"),
        ({"train_gates": False, "gate_lr": 1e-3}, "nothing that gate_lr 0.001 could move"),
        (
            {"train_gates": False, "num_phases": 2, "max_shrinkage": 1e-3},
            "nothing that max_shrinkage 0.001 could move",
        ),
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
