"""Masks of the largest weights: exact counts, nested, and dense at density 1."""

import pytest
import torch
from torch import nn

from adarankgrad.reparam import PowerpropConfig, magnitude_masks, powerpropagate, sparsify

from .networks import batch, mlp, tied_mlp


@pytest.fixture(params=[1.0, 3.0], ids=["alpha 1", "alpha 3"])
def model(request):
    return powerpropagate(mlp(), PowerpropConfig(alpha=request.param))


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_counts_are_exact_and_lower_densities_lie_inside_higher_ones(model, scope):
    sizes = {"0.weight": 240, "2.weight": 320, "4.weight": 96}
    smaller: dict[str, torch.Tensor] = {}
    for density in (0.01, 0.1, 0.25, 1.0):
        masks = magnitude_masks(model, density, scope=scope)
        counts = {name: int(mask.sum()) for name, mask in masks.items()}
        if scope == "layer":
            assert counts == {name: int(density * size + 0.5) for name, size in sizes.items()}
        else:
            assert sum(counts.values()) == int(density * 656 + 0.5)
        assert all(bool((masks[name] >= mask).all()) for name, mask in smaller.items())
        smaller = masks


def test_equal_magnitudes_are_nested_too():
    layer = nn.Linear(10, 10)
    nn.init.ones_(layer.weight)
    masks = [magnitude_masks(layer, density)["weight"] for density in (0.29, 0.3, 0.31)]
    assert [int(mask.sum()) for mask in masks] == [29, 30, 31]
    assert bool((masks[0] <= masks[1]).all()) and bool((masks[1] <= masks[2]).all())


def test_the_largest_are_kept():
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([[0.1, -0.4, 0.3, -0.2]])
    powerpropagate(layer, PowerpropConfig(alpha=2))
    sparsify(layer, 0.5)
    # 0.4 and 0.3 through a root and a square, each rounded to half a unit or two.
    expected = torch.tensor([[0.0, -0.4, 0.3, 0.0]])
    assert torch.allclose(layer.weight, expected, rtol=10 * 2**-24, atol=0.0)


def test_density_1_is_the_dense_model_and_a_lower_one_has_zeros_elsewhere(model):
    inputs, _ = batch(0)
    expected = model(inputs)
    sparsify(model, 1.0)
    assert torch.equal(model(inputs), expected)
    masks = sparsify(model, 0.2)
    for index in (0, 2, 4):
        assert torch.equal(model[index].weight != 0, masks[f"{index}.weight"])


def test_the_output_layer_keeps_twice_the_share():
    for density, kept in ((0.25, 48), (0.75, 96)):
        for scope in ("layer", "global"):
            masks = magnitude_masks(mlp(), density, scope=scope, output_layer="4")
            assert int(masks["4.weight"].sum()) == kept
            assert sum(int(mask.sum()) for mask in masks.values()) == int(density * 560) + kept


def test_what_is_excluded_stays_as_it_is():
    model = mlp()
    masks = sparsify(model, 0.1, exclude=r"^4\.")
    assert masks.keys() == {"0.weight", "2.weight"}
    assert bool((model[4].weight != 0).all())


def test_a_global_choice_compares_powers_not_parameters():
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False))
    model[0].weight.data = torch.tensor([[0.5, 0.3]])
    model[1].weight.data = torch.tensor([[0.4]])
    powerpropagate(model, PowerpropConfig(alpha=4, include=r"^0\."))  # thetas of 0.84 and 0.74
    masks = magnitude_masks(model, 0.67, scope="global")
    assert [mask.flatten().tolist() for mask in masks.values()] == [[True, False], [True]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, r"density must be in \(0, 1\] and finite, got 0\.0"),
        ({"density": 1.1}, r"density must be in \(0, 1\]"),
        ({"density": 0.5, "scope": "row"}, "scope must be one of layer, global"),
        ({"density": 0.5, "output_layer": "head"}, "output_layer 'head' is no linear"),
        ({"density": 0.5, "exclude": "head"}, "exclude pattern 'head' matches no"),
        ({"density": 0.5, "exclude": "weight"}, "no weight of a linear or convolution layer"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        magnitude_masks(mlp(), **options)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("density", [0.1, 0.25, 0.47])
def test_a_weight_that_two_layers_share_counts_once(scope, density):
    model = tied_mlp()
    masks = sparsify(model, density, scope=scope)
    assert masks.keys() == {"0.weight", "4.weight"}
    assert model[2].weight is model[0].weight
    assert torch.equal(model[2].weight != 0, masks["0.weight"])
    num_kept = sum(int(mask.sum()) for mask in masks.values())
    assert abs(num_kept - density * (144 + 72)) <= 1  # of two roundings


def test_a_shared_weight_cannot_keep_twice_the_share():
    with pytest.raises(ValueError, match="output_layer '2' shares its weight with '0'"):
        magnitude_masks(tied_mlp(), 0.5, output_layer="2")
