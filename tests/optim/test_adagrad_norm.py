"""One sum of squares for all weights, decoupled decay, and a state of plain numbers."""

import copy
import io

import pytest
import torch
from torch import nn

from adarankgrad import AdaGradNorm


def weights(dtype=torch.float32):
    generator = torch.Generator().manual_seed(4)
    return [
        nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((3, 4), (5,))
    ]


def set_grads(params, step):
    generator = torch.Generator().manual_seed(step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def test_two_steps_by_hand():
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = AdaGradNorm([weight], lr=1.0)
    weight.grad = torch.tensor([3.0, 4.0]).double()
    optimizer.step()
    # A step of length lr along the gradient, up to rounding of the norm in float64.
    assert weight.tolist() == pytest.approx([-0.6, -0.8], rel=1e-15)
    weight.grad = torch.tensor([0.0, 12.0]).double()
    optimizer.step()
    assert optimizer.sum_of_squares == pytest.approx(25 + 144, rel=1e-15)
    assert weight.tolist() == pytest.approx([-0.6, -0.8 - 12 / 13], rel=1e-15)


def test_the_sum_is_one_number_over_all_weights_and_groups():
    # The authors' code has one for each output row, and gives vectors the rows of another weight.
    params = weights(torch.float64)
    optimizer = AdaGradNorm([{"params": params[:1]}, {"params": params[1:], "lr": 0.5}], lr=1.0)
    before = [param.detach().clone() for param in params]
    set_grads(params, 1)
    optimizer.step()
    flat = torch.cat([param.grad.flatten() for param in params])
    for param, old, lr in zip(params, before, (1.0, 0.5), strict=True):
        assert torch.allclose(param, old - lr * param.grad / flat.norm(), rtol=1e-14)


def test_decay_is_decoupled_and_acts_without_a_gradient():
    # The authors' code multiplies the gradient by it, so that nothing decays at zero gradient.
    params = weights()
    optimizer = AdaGradNorm(params, lr=0.5, weight_decay=0.1)
    before = [param.detach().clone() for param in params]
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for param, old in zip(params, before, strict=True):
        assert torch.equal(param, old * (1 - 0.5 * 0.1))


def test_a_weight_without_gradient_stays_as_it_is():
    params = weights()
    set_grads(params[:1], 1)
    before = params[1].detach().clone()
    AdaGradNorm(params, weight_decay=0.1).step()
    assert torch.equal(params[1], before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_left_out_and_counted(bad):
    params = weights()
    optimizer = AdaGradNorm(params, weight_decay=0.1)
    before = [param.detach().clone() for param in params]
    set_grads(params, 1)
    params[1].grad[0] = bad
    optimizer.step()
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))
    assert optimizer.param_groups[0]["num_skipped_steps"] == 1
    assert optimizer.sum_of_squares == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_resumes_to_the_bit(dtype):
    whole, first = weights(dtype), weights(dtype)
    optimizer = AdaGradNorm(whole, lr=0.3, weight_decay=0.1)
    for step in range(6):
        set_grads(whole, step)
        optimizer.step()
    half = AdaGradNorm(first, lr=0.3, weight_decay=0.1)
    for step in range(3):
        set_grads(first, step)
        half.step()
    file = io.BytesIO()
    torch.save(half.state_dict(), file)
    file.seek(0)
    second = [nn.Parameter(param.detach().clone()) for param in first]
    resumed = AdaGradNorm(second)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for step in range(3, 6):
        set_grads(second, step)
        resumed.step()
    assert all(torch.equal(one, other) for one, other in zip(whole, second, strict=True))
    assert resumed.sum_of_squares == optimizer.sum_of_squares


def test_copies_closures_schedulers_and_added_groups_work():
    params = weights()
    optimizer = AdaGradNorm(params[:1], lr=0.3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    set_grads(params, 1)
    assert optimizer.step(lambda: 2.5) == 2.5
    scheduler.step()
    optimizer.add_param_group({"params": params[1:]})
    assert optimizer.param_groups[1]["sum_of_squares"] == optimizer.sum_of_squares > 0
    assert copy.deepcopy(optimizer).sum_of_squares == optimizer.sum_of_squares
    assert optimizer.param_groups[0]["lr"] == 0.15


def test_a_starting_sum_shortens_the_first_step():
    weight = nn.Parameter(torch.zeros(1))
    weight.grad = torch.tensor([3.0])
    AdaGradNorm([weight], initial_sum=16.0).step()
    assert weight.item() == pytest.approx(-3 / 5, rel=2**-23)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"lr": -1.0}, "lr"), ({"weight_decay": -0.1}, "weight_decay"), ({"initial_sum": -1}, "sum")],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AdaGradNorm(weights(), **options)


def test_a_sparse_gradient_is_refused():
    table = nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        AdaGradNorm(table.parameters()).step()
