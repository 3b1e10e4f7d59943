"""What must only happen at the real weights is refused, and they come back after an error."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from adarankgrad.schedules.extrapolation import Extrapolation, ExtrapolationConfig

from .extrapolated_models import batches, loss_of, setup, train


@pytest.mark.parametrize("name", ["sgd", "bfloat16"])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_weights_are_back_to_the_bit_after_an_error(name, where):
    model, optimizer, extrapolation = setup(name, step=7.0)
    train(model, optimizer, extrapolation, batches(2))
    before = [param.clone() for param in model.parameters()]
    handles = []
    part = batches(1)[0][0]
    with pytest.raises(KeyboardInterrupt), extrapolation.extrapolate():
        moved = [not torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True)]
        assert sum(moved) == 4  # all but the two weights that are not used
        loss = loss_of(model, part)
        if where == "backward":
            # The outer layer is back by then, the inner one is not.
            handles.append(model.inner.bias.register_hook(interrupt))
            loss.backward()
        interrupt()
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    assert not extrapolation.state_dict()["past"]
    for handle in handles:
        handle.remove()
    model.zero_grad()
    train(model, optimizer, extrapolation, batches(1))


def interrupt(*_):
    raise KeyboardInterrupt


def test_an_error_in_the_fresh_pass_leaves_weights_and_gradients_alone():
    model, _, extrapolation = setup(source="fresh")
    before = [param.clone() for param in model.parameters()]
    kept = model.outer.bias.grad = torch.ones(3)
    with pytest.raises(KeyboardInterrupt), extrapolation.extrapolate(interrupt):
        pass
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    assert model.outer.bias.grad is kept and model.inner.bias.grad is None


def test_only_training_is_possible_ahead_of_the_weights():
    model, optimizer, extrapolation = setup()
    train(model, optimizer, extrapolation, batches(1))
    part = batches(1)[0][0]
    places = [param.data_ptr() for param in model.parameters()]
    extrapolation.begin()
    with torch.no_grad():
        model(part)  # a policy's or a teacher's pass, in training
        with pytest.raises(RuntimeError, match="cannot evaluate while"):
            model.eval()(part)
    model.train()
    for forbidden in (model.state_dict, extrapolation.state_dict):
        with pytest.raises(RuntimeError, match="cannot save while"):
            forbidden()
    with pytest.raises(RuntimeError, match="cannot step while"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="call end"):
        extrapolation.begin()
    extrapolation.end()
    assert places == [param.data_ptr() for param in model.parameters()]
    model.state_dict()
    with torch.no_grad():
        model.eval()(part)


@pytest.mark.parametrize(("declared", "taken"), [(2, 1), (1, 2)])
def test_another_number_of_backward_passes_is_refused_with_the_weights_back(declared, taken):
    model, _, extrapolation = setup(num_parts=declared)
    extrapolation.load_state_dict(
        extrapolation.state_dict() | {"past": {0: torch.ones_like(model.inner.weight)}}
    )
    before = model.inner.weight.clone()
    with pytest.raises(ValueError, match="num_micro_batches"), extrapolation.extrapolate():
        for _ in range(taken):
            loss_of(model, batches(1)[0][0]).backward()
    assert torch.equal(before, model.inner.weight)


def test_closures_and_sparse_gradients_are_refused():
    model, optimizer, extrapolation = setup()
    lbfgs = torch.optim.LBFGS(model.parameters())
    with pytest.raises(ValueError, match="LBFGS evaluates the loss by a closure"):
        Extrapolation(lbfgs, model, ExtrapolationConfig(0.1))
    train(model, optimizer, extrapolation, batches(1))
    with pytest.raises(ValueError, match="not a closure"):
        optimizer.step(lambda: 0.0)
    extrapolation.remove()
    optimizer.step(lambda: 0.0)
    table = nn.Embedding(5, 2, sparse=True)
    sparse = Extrapolation(
        torch.optim.SGD(table.parameters(), lr=0.1), table, ExtrapolationConfig(0.1)
    )
    with pytest.raises(ValueError, match="weight has a sparse gradient"), sparse.extrapolate():
        table(torch.tensor([1])).sum().backward()


def test_a_fresh_gradient_is_asked_for_where_it_is_used_and_only_there():
    with pytest.raises(ValueError, match="needs extrapolate"):
        setup(source="fresh")[2].begin()
    with pytest.raises(ValueError, match="source is 'past-local'"):
        setup()[2].begin(lambda: None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"source": "fresh"}, "source='fresh'"),
        ({"past": {0: torch.ones(5)}}, "fits no weight"),
        ({"past": {9: torch.ones(5)}}, "fits no weight"),
    ],
)
def test_another_state_is_refused(change, said):
    _, _, extrapolation = setup()
    with pytest.raises(ValueError, match=said):
        extrapolation.load_state_dict(extrapolation.state_dict() | change)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"step": -0.1}, "step must be at least 0 and finite, got -0.1"),
        ({"step": math.inf}, "step must be"),
        ({"source": "past"}, "past-local, fresh, past-global, noise, got 'past'"),
        ({"source": "noise"}, "needs a scale"),
        ({"source": "noise", "scale": 0}, "scale must be at least 0"),
        ({"source": "noise", "scale": "row"}, "gradient, layer, filter, got 'row'"),
        ({"scale": 1.0}, "are of source='noise'"),
        ({"noise": "uniform"}, "are of source='noise'"),
        ({"noise": "laplace"}, "gaussian, uniform"),
        ({"follow_lr": 1}, "follow_lr"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        ExtrapolationConfig(**{"step": 0.1, **settings})
