"""Tasks packed one after the other: earlier ones stay as they are, to the bit."""

import copy

import pytest
import torch
from torch import nn

from adarankgrad import AdaRankGrad, param_groups
from adarankgrad.reparam import EfficientPackNet, PowerpropConfig, powerpropagate

from .networks import batch, mlp, tied_mlp, train, values


def network() -> nn.Sequential:
    model = mlp()
    model.insert(1, nn.BatchNorm1d(20))
    return powerpropagate(model, PowerpropConfig(alpha=2))


def packed(model: nn.Module, **options) -> EfficientPackNet:
    return EfficientPackNet(model, densities=(0.5, 0.25), **options)


def learn(packnet: EfficientPackNet, start: int, make=None) -> None:
    """One task; a score that any pruning keeps."""
    packnet.begin_task()
    model = packnet.model.train()
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = make(model) if make else torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    packnet.protect(optimizer)
    train(model, optimizer, 6, start)
    packnet.finish_task(lambda _: 1.0)
    model.eval()


def outputs(packnet: EfficientPackNet, task: int) -> torch.Tensor:
    packnet.use_task(task)
    return packnet.model(batch(100)[0])


def test_a_task_that_was_trained_without_protection_is_refused_and_can_be_given_up():
    packnet = packed(network(), own=r"^5\.")
    learn(packnet, 0)
    first, saved = outputs(packnet, 1), copy.deepcopy(packnet.state_dict())
    packnet.begin_task()
    model = packnet.model.train()
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), 3, 10)
    with pytest.raises(ValueError, match=r"earlier tasks were changed in 0\..*call protect"):
        packnet.finish_task(lambda _: 1.0)
    packnet.load_state_dict(saved)
    model.eval()
    assert torch.equal(outputs(packnet, 1), first)


OPTIMIZERS = {
    "adamw": None,
    "adarankgrad": lambda model: AdaRankGrad(
        param_groups(model, smallest_side=4), lr=1e-2, weight_decay=0.1
    ),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_earlier_tasks_stay_as_they_are_to_the_bit(optimizer):
    packnet = packed(network(), own=r"^5\.")
    learn(packnet, 0)
    first = outputs(packnet, 1)
    learn(packnet, 10, OPTIMIZERS[optimizer])
    second = outputs(packnet, 2)
    learn(packnet, 20, OPTIMIZERS[optimizer])
    assert torch.equal(outputs(packnet, 1), first)
    assert torch.equal(outputs(packnet, 2), second)
    assert not torch.equal(first, second)


def test_later_tasks_train_free_weights_alone_and_all_of_them():
    packnet = packed(network())
    learn(packnet, 0)
    packnet.begin_task()
    before = packnet._packed["0.weight"].detach().clone()
    trained = [param for param in packnet.model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    packnet.protect(optimizer)
    train(packnet.model.train(), optimizer, 3)
    has_moved = packnet._packed["0.weight"] != before
    assert torch.equal(has_moved, packnet.owners["0.weight"] == 0)
    assert torch.equal(optimizer.state[packnet._packed["0.weight"]]["exp_avg"] != 0, has_moved)


def test_each_task_owns_the_largest_share_of_what_was_free():
    packnet = packed(network())
    for start in (0, 10, 20):
        learn(packnet, start)
    owners = packnet.owners["0.weight"].flatten().tolist()
    # A quarter of 240, of 180 and of 135 (33.75, rounded to 34).
    assert [owners.count(task) for task in (1, 2, 3)] == [60, 45, 34]
    packnet.use_task(2)
    shown = packnet.model[0].weight != 0
    assert torch.equal(shown, (packnet.owners["0.weight"] > 0) & (packnet.owners["0.weight"] < 3))


def test_the_search_stops_at_the_first_density_that_fails():
    packnet = EfficientPackNet(mlp(), gamma=0.9, densities=(0.5, 0.3, 0.2, 0.1))
    packnet.begin_task()

    def share_left(model):  # 1, then 0.95 at a density of 0.5, 0.93 at 0.3, and 0.5 below
        density = float((model[0].weight != 0).float().mean())
        return 1.0 if density > 0.6 else 0.95 if density > 0.4 else 0.93 if density > 0.25 else 0.5

    assert packnet.finish_task(share_left) == 0.3


def test_a_saved_state_continues():
    packnet = packed(network())
    learn(packnet, 0)
    expected = outputs(packnet, 1)
    other = packed(network())
    other.model.load_state_dict(packnet.model.state_dict())
    other.load_state_dict(packnet.state_dict())
    other.model.eval()
    assert torch.equal(outputs(other, 1), expected)
    for each in (packnet, other):
        learn(each, 10)
    assert torch.equal(outputs(other, 2), outputs(packnet, 2))
    assert all(
        torch.equal(*p) for p in zip(values(packnet.model), values(other.model), strict=True)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 0.0}, r"gamma must be in \(0, 1\]"),
        ({"densities": (0.5, 2.0)}, r"densities must be in \(0, 1\]"),
        ({"own": "nothing"}, "own pattern 'nothing' matches no"),
        ({"own": "weight"}, "leaves no weight of a layer to pack"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EfficientPackNet(mlp(), **options)


def test_tasks_that_are_not_there_and_negative_scores_are_refused():
    packnet = packed(network())
    with pytest.raises(ValueError, match="task must be one of the 0 finished ones"):
        packnet.use_task(1)
    packnet.begin_task()
    with pytest.raises(ValueError, match="the score must be at least 0"):
        packnet.finish_task(lambda _: -1.0)


def test_tasks_come_one_after_the_other():
    packnet = packed(network())
    optimizer = torch.optim.AdamW(packnet.model.parameters())
    for early in (lambda: packnet.protect(optimizer), lambda: packnet.finish_task(lambda _: 1.0)):
        with pytest.raises(ValueError, match=r"call begin_task\(\) first"):
            early()
    learn(packnet, 0)
    saved = packnet.state_dict()
    packnet.begin_task()
    for what, late in {
        "begin a task": packnet.begin_task,
        "use a task": lambda: packnet.use_task(1),
        "save": packnet.state_dict,
    }.items():
        with pytest.raises(ValueError, match=f"cannot {what} while task 2 is being trained"):
            late()
    packnet.load_state_dict(saved)
    packnet.use_task(1)
    packnet.begin_task()


def test_what_was_trained_is_there_after_an_evaluation_that_failed():
    packnet = packed(network())
    packnet.begin_task()
    trained = [value.clone() for value in values(packnet.model)]
    scores = iter([1.0, 1.0, -1.0])
    with pytest.raises(ValueError, match="the score must be at least 0"):
        packnet.finish_task(lambda _: next(scores))
    assert all(torch.equal(*pair) for pair in zip(values(packnet.model), trained, strict=True))
    assert packnet.finish_task(lambda _: 1.0) == 0.25


def test_a_weight_that_two_layers_share_is_packed_once():
    packnet = packed(tied_mlp())
    assert packnet.owners.keys() == {"0.weight", "4.weight"}
    learn(packnet, 0)
    assert int((packnet.owners["0.weight"] == 1).sum()) == 36  # a quarter of 144
    first = outputs(packnet, 1)
    learn(packnet, 10)
    assert torch.equal(outputs(packnet, 1), first)
