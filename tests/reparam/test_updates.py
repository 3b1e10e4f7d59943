"""Decay on theta or on the weight, and steps of the optimizer taken in the weight's space."""

import pytest
import torch
from torch import nn

from adarankgrad import AdaRankGrad, param_groups
from adarankgrad.reparam import (
    PowerpropConfig,
    PowerUpdates,
    powered_weights,
    powerpropagate,
    split_groups,
)

from .networks import mlp, train, values

LR, DECAY = 0.1, 0.1


def decayed(decay_on: str, alpha: float, optimizer_class: type = torch.optim.AdamW):
    """A weight before and after a step whose gradient is zero."""
    config = PowerpropConfig(alpha=alpha, decay_on=decay_on)
    layer = powerpropagate(nn.Linear(6, 5, bias=False).double(), config)
    optimizer = optimizer_class(layer.parameters(), lr=LR, weight_decay=DECAY)
    if config.changes_updates:
        PowerUpdates(optimizer, layer, config)
    before = layer.weight.detach().clone()
    (layer.weight * 0.0).sum().backward()
    optimizer.step()
    return before, layer.weight.detach()


@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.5])
def test_decay_of_theta_is_alpha_times_applied_to_the_weight(alpha):
    before, after = decayed("theta", alpha)
    # 0.99^alpha; float64 rounds a dozen times at most.
    assert torch.allclose(after, before * (1 - LR * DECAY) ** alpha, rtol=12 * 2**-53, atol=0.0)


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("alpha", [1.0, 3.5])
def test_decay_of_the_weight_is_decoupled_for_any_optimizer(alpha, optimizer_class):
    before, after = decayed("weight", alpha, optimizer_class)
    assert torch.allclose(after, before * (1 - LR * DECAY), rtol=12 * 2**-53, atol=0.0)


def test_a_preconditioned_step_is_the_optimizers_own_times_the_slope():
    config = PowerpropConfig(alpha=3, adam_mode="preconditioned")
    layer = powerpropagate(nn.Linear(6, 5, bias=False).double(), config)
    (powered,) = powered_weights(layer)
    start = powered.theta.detach().clone()
    coefficients = torch.randn(5, 6, dtype=torch.float64)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, weight_decay=0.0, eps=0.0)
    PowerUpdates(optimizer, layer, config)
    (layer.weight * coefficients).sum().backward()
    assert torch.equal(powered.theta.grad, coefficients)  # by w, not by theta
    optimizer.step()
    # Adam's first step is lr times the gradient's sign. The difference of two thetas below 1
    # leaves float64's rounding of theta, four operations deep.
    expected = -1e-2 * coefficients.sign() * 3 * start**2
    assert torch.allclose(powered.theta - start, expected, rtol=0.0, atol=4 * 2**-53)


@pytest.mark.parametrize("adam_mode", ["theta", "preconditioned"])
def test_at_alpha_1_both_modes_follow_the_plain_layer(adam_mode):
    plain, model = mlp(), mlp()
    config = PowerpropConfig(alpha=1, adam_mode=adam_mode)
    powerpropagate(model, config)
    optimizers = [
        torch.optim.AdamW(each.parameters(), lr=1e-2, weight_decay=0.0) for each in (plain, model)
    ]
    PowerUpdates(optimizers[1], model, config)
    for each, optimizer in zip((plain, model), optimizers, strict=True):
        train(each, optimizer, 5)
    assert torch.equal(model[0].weight, plain[0].weight)


def adarankgrad(model: nn.Module, config: PowerpropConfig) -> AdaRankGrad:
    groups = param_groups(model, smallest_side=4, weight_decay=0.1)
    optimizer = AdaRankGrad(split_groups(groups, model), lr=1e-2)
    PowerUpdates(optimizer, model, config)
    return optimizer


CONFIG = PowerpropConfig(alpha=2, adam_mode="preconditioned", decay_on="weight")


def test_a_skipped_step_changes_nothing():
    model = powerpropagate(mlp(), CONFIG)
    optimizer = adarankgrad(model, CONFIG)
    train(model, optimizer, 2)
    before = values(model)
    for param in model.parameters():
        param.grad.fill_(float("nan"))
    optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(values(model), before, strict=True))


def test_training_resumes_to_the_bit():
    whole = powerpropagate(mlp(), CONFIG)
    optimizer = adarankgrad(whole, CONFIG)
    train(whole, optimizer, 3)
    weights, state = whole.state_dict(), optimizer.state_dict()
    resumed = powerpropagate(mlp(1), CONFIG)
    resumed.load_state_dict({name: value.clone() for name, value in weights.items()})
    other = adarankgrad(resumed, CONFIG)
    other.load_state_dict(state)
    for model, each in ((whole, optimizer), (resumed, other)):
        train(model, each, 3, start=3)
    assert all(torch.equal(*pair) for pair in zip(values(whole), values(resumed), strict=True))


def test_weights_added_later_are_decayed_as_the_others():
    config = PowerpropConfig(alpha=2, decay_on="weight")
    model = powerpropagate(mlp().double(), config)
    first, second = (powered.theta for powered in powered_weights(model)[:2])
    optimizer = torch.optim.SGD([first], lr=LR, weight_decay=DECAY)
    PowerUpdates(optimizer, model, config)
    optimizer.add_param_group({"params": [second]})
    before = model[2].weight.detach().clone()
    (model[2].weight * 0.0).sum().backward()
    optimizer.step()
    expected = before * (1 - LR * DECAY)
    assert torch.allclose(model[2].weight, expected, rtol=12 * 2**-53, atol=0.0)


def test_taking_the_hooks_away_restores_the_gradient_by_theta():
    model = powerpropagate(mlp(), CONFIG)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    PowerUpdates(optimizer, model, CONFIG).remove()
    assert not any(each.power.passes_gradient for each in powered_weights(model))
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_what_cannot_be_done_is_refused():
    plain, model = mlp(), powerpropagate(mlp(), CONFIG)
    with pytest.raises(ValueError, match="no weight of the model is trained by its power"):
        PowerUpdates(torch.optim.SGD(plain.parameters(), lr=0.1), plain, CONFIG)
    mixed = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    with pytest.raises(ValueError, match="divide the groups with split_groups"):
        PowerUpdates(mixed, model, CONFIG)
    half = powerpropagate(mlp().bfloat16(), CONFIG)
    with pytest.raises(ValueError, match=r"needs float32 weights, and 0\.weight is bfloat16"):
        PowerUpdates(torch.optim.SGD(half.parameters(), lr=0.1), half, CONFIG)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    PowerUpdates(optimizer, model, CONFIG)
    with pytest.raises(ValueError, match="not a closure"):
        optimizer.step(lambda: 0.0)
