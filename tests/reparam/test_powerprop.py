"""A model trained by powers: the same function, the right gradients, a plain model at the end."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from adarankgrad import AdaRankGrad, param_groups
from adarankgrad.reparam import PowerpropConfig, export_plain, powered_weights, powerpropagate

from .networks import batch, mlp, train


def powered(alpha: float, model: nn.Module | None = None, **options) -> nn.Module:
    return powerpropagate(model or mlp(), PowerpropConfig(alpha=alpha, **options))


def test_alpha_1_gives_the_plain_layers_20_steps_to_the_bit():
    plain, neutral = mlp(), powered(1.0)
    for model in (plain, neutral):
        train(model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1), 20)
    inputs, _ = batch(99)
    assert torch.equal(plain(inputs), neutral(inputs))
    trained, kept = export_plain(neutral).state_dict(), plain.state_dict()
    assert all(torch.equal(trained[name], kept[name]) for name in kept)


@pytest.mark.parametrize("alpha", [1.25, 2.0, 3.0])
def test_the_function_is_kept_at_the_start(alpha):
    plain, model = mlp(), powered(alpha)
    for each in powered_weights(model):
        before = plain.get_parameter(each.name).detach()
        # theta is rounded to half a unit, which the power multiplies by alpha; root and power add
        # less than two units each.
        bound = (alpha + 8) * 2**-24 * before.abs()
        assert bool(((each.weight() - before).abs() <= bound).all())
        assert float((each.weight() - before).abs().max()) <= 1e-7
    inputs, _ = batch(0)
    # Sums of at most 20 terms below 1, each off by the bound above, through three layers.
    assert torch.allclose(model(inputs), plain(inputs), rtol=0.0, atol=3 * 20 * 11 * 2**-24)


@pytest.mark.parametrize("alpha", [1.0, 1.25, 1.5, 2.0, 3.0])
def test_gradients_are_the_slope_times_the_weights_gradient_and_finite_at_zero(alpha):
    layer = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        layer.weight[0] = 0.0
    powered(alpha, layer)
    theta = layer.parametrizations.weight.original
    coefficients = torch.randn(3, 4)
    (layer.weight * coefficients).sum().backward()
    slope = alpha * theta.detach().double().abs() ** (alpha - 1)
    # Two products and a power in float32.
    assert torch.allclose(theta.grad.double(), slope * coefficients, rtol=6 * 2**-24, atol=0.0)
    at_zero = coefficients[0] if alpha == 1 else torch.zeros(4)
    assert torch.equal(theta.grad[0], at_zero)


def test_float16_parameters_get_gradients_that_float16_powers_would_lose():
    layer = powered(4.0, nn.Linear(1, 1, bias=False).half())
    theta = layer.parametrizations.weight.original
    with torch.no_grad():
        theta.fill_(1e-3)
    (layer.weight * 1000).sum().backward()
    # 4e-9 * 1000 = 4e-6; theta^3 = 1e-9 alone is 0 in float16. Half of its smallest step, and
    # the rounding of theta, 3 * 2^-11.
    assert theta.grad.item() == pytest.approx(4e-6, abs=2**-25 + 4e-6 * 3 * 2**-11)


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_a_weight_of_zero_stays_zero_above_alpha_1_and_moves_at_1(alpha):
    model = mlp()
    with torch.no_grad():
        model[0].weight[:, 0] = 0.0
    powered(alpha, model)
    train(model, torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9), 5)
    assert bool((model[0].weight[:, 0] == 0).all()) == (alpha > 1)


def test_the_exported_model_is_plain_and_computes_the_same():
    model = powered(3.0)
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), 3)
    copied = copy.deepcopy(model)
    inputs, _ = batch(5)
    expected = model(inputs)
    params = {id(param) for param in model.parameters()}
    assert export_plain(model) is model
    assert torch.equal(model(inputs), expected)
    assert set(model.state_dict()) == set(mlp().state_dict())
    assert {id(param) for param in model.parameters()} == params
    assert type(model[0]) is nn.Linear and not parametrize.is_parametrized(model[0])
    # A copy made before is still parametrized, and not broken by the export.
    assert torch.equal(copied(inputs), expected) and len(powered_weights(copied)) == 3
    plain = mlp(1)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(inputs), expected)


def test_tied_weights_are_refused_and_may_be_left_out():
    def tied():
        model = nn.ModuleDict({"embedding": nn.Embedding(9, 4), "head": nn.Linear(4, 9)})
        model["body"] = nn.Linear(4, 4)
        model["head"].weight = model["embedding"].weight
        return model

    model = tied()
    before = model["embedding"].weight.detach().clone()
    with pytest.raises(ValueError, match=r"head\.weight is tied to embedding\.weight"):
        powered(2.0, model)
    assert torch.equal(model["embedding"].weight, before)
    powered(2.0, model, exclude="head")
    assert [each.name for each in powered_weights(model)] == ["body.weight"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.9}, r"alpha must be at least 1 and finite, got 0\.9"),
        ({"alpha": float("nan")}, "alpha must be"),
        ({"adam_mode": "both"}, "adam_mode must be one of theta, preconditioned"),
        ({"decay_on": "w"}, "decay_on must be one of theta, weight"),
        ({"include": "nothing"}, "include pattern 'nothing' matches no"),
        ({"exclude": "weight"}, "no weight of a linear or convolution layer left"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        powerpropagate(mlp(), PowerpropConfig(**options))


def test_a_weight_is_powered_once():
    with pytest.raises(ValueError, match=r"0\.weight is parametrized already"):
        powered(2.0, powered(2.0))


def test_powers_are_projected_under_the_names_of_their_weights():
    def network():
        return nn.Sequential(nn.Conv1d(12, 10, 3), nn.ReLU(), nn.Linear(12, 16))

    plain = param_groups(network())
    groups = param_groups(powered(2.0, network()))
    assert [[name for name, _ in group["params"]] for group in groups] == [
        [name for name, _ in group["params"]] for group in plain
    ]
    assert [group["project"] for group in groups] == [True, False]
    included = param_groups(powered(2.0, mlp()), include=r"^2\.weight$")
    assert [name for name, _ in included[0]["params"]] == ["2.weight"]


def test_adarankgrad_at_alpha_1_gives_the_plain_layers_to_the_bit():
    plain, neutral = mlp(), powered(1.0)
    for model in (plain, neutral):
        optimizer = AdaRankGrad(param_groups(model, smallest_side=4), lr=1e-2, weight_decay=0.1)
        train(model, optimizer, 5)
    trained, kept = export_plain(neutral).state_dict(), plain.state_dict()
    assert all(torch.equal(trained[name], kept[name]) for name in kept)


def test_the_excess_kurtosis_of_trained_weights_grows_with_alpha():
    """The digits measurement of the specification, reduced: a teacher of few weights."""
    kurtosis = []
    for alpha in (1.0, 2.0, 4.0):
        torch.manual_seed(0)
        inputs = torch.randn(256, 12)
        labels = (inputs[:, 0] * inputs[:, 1] > 0).long()
        model = powered(alpha, mlp(sizes=(12, 64, 2)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        for _ in range(300):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
        weights = model[0].weight.detach().flatten()
        deviations = weights - weights.mean()
        kurtosis.append(float((deviations**4).mean() / (deviations**2).mean() ** 2 - 3))
    # 5, 15 and 136 here: a factor of 2 each is far inside what seeds change.
    assert kurtosis[1] > 2 * kurtosis[0] and kurtosis[2] > 2 * kurtosis[1]
