"""SoRA: phases of rising shrinkage, and a run that resumes across one."""

from __future__ import annotations

import pytest
import torch

from adarankgrad.adapters import SoRAConfig, sora
from adarankgrad.adapters.sora.gates import gated_layers

from .models import tiny_llama
from .sora_runs import all_gates, tiny_run
from .training import Run, assert_same_state


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


def test_a_resumed_run_continues_bit_for_bit_across_a_phase():
    settings = {"num_phases": 2, "max_shrinkage": 0.05}
    whole = tiny_run(num_steps=8, **settings).train(range(1, 9))
    half = tiny_run(num_steps=8, **settings).train(range(1, 5))
    resumed = tiny_run(num_steps=8, **settings)
    resumed.load_state_dict(half.state_dict())
    resumed.train(range(5, 9))
    assert_same_state(whole.model, resumed.model)
    assert (all_gates(whole.model) == 0).any()
