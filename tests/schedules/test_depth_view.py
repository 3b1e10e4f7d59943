"""A model at a virtual depth: the same as one that has those layers, and whole again afterwards."""

import pytest
import torch
from torch import nn

from adarankgrad import AdaRankGrad, param_groups
from adarankgrad.core.measurement import measure
from adarankgrad.schedules.depth import DepthConfig, DepthView, ProgressiveDepth, find_layers

from .depth_models import LISTS, batch, build, checkpoint_layers, layers_of, with_layers

KINDS = ("llama", "gpt2", "bert")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer_map", ["interpolate", "stack"])
def test_growing_makes_real_what_ran_before_and_both_are_the_deep_model(kind, layer_map):
    model = build(kind).eval()
    config = DepthConfig(layers=(2, 5, 6), starts=(0, 1, 2), layer_map=layer_map)
    positions = config.map_layers(2, 5)
    with torch.no_grad():
        deep = with_layers(model, positions).eval()(**batch()).logits
        view = DepthView(model)
        view.use(positions)
        virtual = model(**batch()).logits
        depth = ProgressiveDepth(model, config)
        depth.begin_step(0)
        depth.begin_step(1)
        grown = model(**batch()).logits
    assert torch.equal(virtual, deep)
    assert torch.equal(grown, deep)


@pytest.mark.parametrize("kind", KINDS)
def test_the_list_is_found_and_a_layer_gets_the_sum_of_its_uses_gradients(kind):
    model = build(kind).double()
    assert find_layers(model).name == LISTS[kind]
    positions = [0, 0, 1, 1, 1]
    deep = with_layers(model, positions)
    deep(**batch()).loss.backward()
    DepthView(model).use(positions)
    model(**batch()).loss.backward()
    for number, layer in enumerate(layers_of(model)):
        uses = [each for at, each in zip(positions, layers_of(deep), strict=True) if at == number]
        for name, weight in layer.named_parameters():
            if not uses:
                assert weight.grad is None
                continue
            expected = sum(use.get_parameter(name).grad for use in uses)
            # Sums of up to three float64 terms, in another order.
            torch.testing.assert_close(weight.grad, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_layers_get_the_same_gradients(kind):
    grads = []
    for is_checkpointed in (False, True):
        model = build(kind)
        if is_checkpointed:
            checkpoint_layers(model)
        DepthView(model).use([0, 0, 1, 1])
        model(**batch()).loss.backward()
        grads.append([weight.grad for weight in model.parameters() if weight.grad is not None])
    assert len(grads[0]) == len(grads[1])
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_gradients_projected_in_the_backward_pass_are_of_all_uses_together(is_checkpointed):
    whole, held = (build("llama"), build("llama"))
    for model in (whole, held):
        if is_checkpointed:
            checkpoint_layers(model)
        DepthView(model).use([0, 0, 0, 1])
    optimizer = AdaRankGrad(param_groups(held, max_rank=4), basis="sketched", residual="none")
    optimizer.accumulate_in_backward(held)
    for model in (whole, held):
        model(**batch()).loss.backward()
    pairs = [[*layers_of(model)[0].parameters()] for model in (held, whole)]
    for weight, other in zip(*pairs, strict=True):
        if weight.dim() < 2:
            continue
        assert weight.grad.num_added == 1
        matrix = weight.grad.matrix_layout.view(other.grad)
        expected = measure(matrix, weight.grad.measurement)
        assert all(map(torch.equal, weight.grad.measured, expected))


def test_evaluation_runs_other_layers_and_the_model_is_whole_between_passes():
    model = build("gpt2")
    names = list(model.state_dict())
    view = DepthView(model)
    view.use(training=[0, 0, 1], evaluation=[0, 1])
    runs: list[int] = []
    for number, layer in enumerate(layers_of(model)):
        layer.register_forward_hook(lambda *_, number=number: runs.append(number))
    model(**batch())
    model.eval()(**batch())
    model.train()(**batch())
    assert runs == [0, 0, 1, 0, 1, 0, 0, 1]
    assert list(model.state_dict()) == names
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 2), 999))
    assert len(layers_of(model)) == 6
    view.remove()
    runs.clear()
    model(**batch())
    assert runs == [0, 1, 2, 3, 4, 5]


def test_a_cache_that_counts_layers_is_never_filled():
    model, other = build("gpt2").eval(), build("gpt2").eval()
    positions = [0, 0, 1, 1]
    expected = with_layers(other, positions).eval()(**batch()).logits
    DepthView(model).use(positions)
    with torch.no_grad():
        for options in ({}, {"use_cache": True}):
            output = model(**batch(), **options)
            assert torch.equal(output.logits, expected)
            assert output.past_key_values is None
            assert model.config.use_cache is True  # again
    with pytest.raises(ValueError, match="past_key_values hold one entry a layer"):
        model(**batch(), past_key_values=other(**batch(), use_cache=True).past_key_values)


class Towers(nn.Module):
    def __init__(self, lengths: tuple[int, ...]) -> None:
        super().__init__()
        self.towers = nn.ModuleDict(
            {
                f"tower{i}": nn.ModuleList(nn.Linear(4, 4) for _ in range(length))
                for i, length in enumerate(lengths)
            }
        )

    def forward(self, hidden):
        for layer in self.towers["tower0"]:
            hidden = layer(hidden)
        return hidden


def test_a_model_without_a_configuration_names_its_list():
    model = Towers((3, 3))
    with pytest.raises(ValueError, match="does not say how many layers.*layer_list"):
        DepthView(model)
    hidden = torch.ones(1, 4)
    DepthView(model, "towers.tower0").use([0, 0])
    first = model.towers["tower0"][0]
    assert torch.equal(model(hidden), first(first(hidden)))


class Config:
    def __init__(self, **values) -> None:
        vars(self).update(values)


@pytest.mark.parametrize(
    ("lengths", "config", "layer_list", "message"),
    [
        ((3, 3), {"num_hidden_layers": 3}, None, "several lists of 3 layers"),
        ((3,), {"n_layer": 4}, None, "one list of its 4 layers, and has none"),
        ((3,), {}, "towers.absent", "no list of layers of Towers, which has towers.tower0"),
        ((3,), {}, "towers", "no list of layers"),
        ((3,), {"layer_types": ["a", "b", "a"]}, "towers.tower0", "layer_types.*tells layers"),
    ],
)
def test_a_list_that_is_missing_or_not_the_only_one_is_refused(
    lengths, config, layer_list, message
):
    model = Towers(lengths)
    model.config = Config(**config)
    with pytest.raises(ValueError, match=message):
        DepthView(model, layer_list)


def differing(change):
    model = Towers((2,))
    change(model.towers["tower0"])
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tower: setattr(tower[1], "window", 4), "window is None in layer 0 and 4"),
        (lambda tower: tower.__setitem__(1, nn.Linear(4, 4, bias=False)), "the shape of bias"),
        (lambda tower: tower.__setitem__(1, nn.Tanh()), "the class of a layer is Linear in layer"),
        (lambda tower: tower.__setitem__(1, tower[0]), "share weights already"),
    ],
)
def test_layers_that_cannot_stand_in_for_one_another_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DepthView(differing(change), "towers.tower0")


def test_attention_scaled_by_position_is_refused():
    with pytest.raises(ValueError, match="attn.scaling is|scale_attn_by_inverse_layer_idx"):
        DepthView(build("gpt2", scale_attn_by_inverse_layer_idx=True))
