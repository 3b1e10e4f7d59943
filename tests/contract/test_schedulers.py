"""Every learning-rate scheduler of torch drives our optimizers as it drives AdamW."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.optim import lr_scheduler

from .cases import with_basis
from .problems import SHAPES, assert_same_bits, make_params, train, weights_of

NUM_STEPS = 10

SCHEDULERS = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 0.9**step),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda step: 0.9),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, step_size=3),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, milestones=[2, 5]),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, factor=0.5, total_iters=4),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, start_factor=0.1, total_iters=6),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, gamma=0.8),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, total_iters=8, power=2.0),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=8),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 4),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(
        opt, base_lr=0.001, max_lr=0.02, step_size_up=3, cycle_momentum=True
    ),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(
        opt, max_lr=0.02, total_steps=NUM_STEPS + 2, cycle_momentum=True
    ),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=1, cooldown=1),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt,
        [
            lr_scheduler.LinearLR(opt, start_factor=0.1, total_iters=3),
            lr_scheduler.CosineAnnealingLR(opt, T_max=6),
        ],
        milestones=[3],
    ),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [
            lr_scheduler.ConstantLR(opt, factor=0.5, total_iters=3),
            lr_scheduler.ExponentialLR(opt, gamma=0.9),
        ],
        optimizer=opt,
    ),
    "SWALR": lambda opt: torch.optim.swa_utils.SWALR(opt, swa_lr=0.05, anneal_epochs=4),
}
CYCLES_MOMENTUM = {"CyclicLR", "OneCycleLR"}


def few_params():
    return make_params(shapes={"wide": SHAPES["wide"], "bias": SHAPES["bias"]})


def advance(scheduler):
    # A loss that does not improve, so that a plateau is seen.
    is_plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
    scheduler.step(*([1.0] if is_plateau else []))


def scheduled(optimizer, params, make_scheduler):
    """Train with a scheduler; return the weights and what (lr, betas) each step used."""
    scheduler = make_scheduler(optimizer)
    used = []
    for step in range(NUM_STEPS):
        group = optimizer.param_groups[0]
        used.append((group["lr"], tuple(group["betas"])))
        train(optimizer, params, [step])
        advance(scheduler)
    return weights_of(params), used


def test_no_scheduler_of_torch_is_forgotten():
    classes = {
        name
        for name, value in inspect.getmembers(lr_scheduler, inspect.isclass)
        if issubclass(value, lr_scheduler.LRScheduler) and not name.startswith("_")
    }
    assert classes - {"LRScheduler"} <= set(SCHEDULERS)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_sets_what_it_sets_for_adamw_and_the_step_uses_it(case, name):
    params = few_params()
    weights, used = scheduled(case.build(params), params, SCHEDULERS[name])
    adamw_params = few_params()
    adamw = torch.optim.AdamW([param for _, param in adamw_params], lr=0.01)
    _, used_by_adamw = scheduled(adamw, adamw_params, SCHEDULERS[name])
    assert used == used_by_adamw
    assert len({lr for lr, _ in used}) > 1
    assert (len({betas for _, betas in used}) > 1) == (name in CYCLES_MOMENTUM)

    by_hand_params = few_params()
    by_hand = case.build(by_hand_params)
    for step, (lr, betas) in enumerate(used):
        by_hand.param_groups[0].update(lr=lr, betas=betas)
        train(by_hand, by_hand_params, [step])
    assert_same_bits(weights, weights_of(by_hand_params))


@pytest.mark.parametrize("changed", [{"lr": 0.002}, {"betas": (0.5, 0.9)}], ids=str)
@with_basis
def test_every_parameter_follows_what_a_scheduler_may_change(case, changed):
    params, expected = few_params(), few_params()
    optimizer, unchanged = case.build(params), case.build(expected)
    train(optimizer, params, range(3))
    optimizer.param_groups[0].update(changed)
    train(optimizer, params, range(3, 6))
    train(unchanged, expected, range(6))
    for (name, param), (_, other) in zip(params, expected, strict=True):
        assert not torch.allclose(param, other, rtol=0, atol=1e-4), name


def test_a_scheduler_and_its_optimizer_resume_together(case):
    whole_params = few_params()
    whole, _ = scheduled(case.build(whole_params), whole_params, SCHEDULERS["OneCycleLR"])

    params = few_params()
    optimizer = case.build(params)
    scheduler = SCHEDULERS["OneCycleLR"](optimizer)
    for step in range(4):
        train(optimizer, params, [step])
        advance(scheduler)
    resumed = case.build(params)
    resumed_scheduler = SCHEDULERS["OneCycleLR"](resumed)
    resumed.load_state_dict(optimizer.state_dict())
    resumed_scheduler.load_state_dict(scheduler.state_dict())
    for step in range(4, NUM_STEPS):
        train(resumed, params, [step])
        advance(resumed_scheduler)
    assert_same_bits(weights_of(params), whole)
