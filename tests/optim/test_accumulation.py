"""Projected accumulation: the same training, with no gradient kept.

Small networks in float64, so that two orders of summation agree to 1e-10 of a step.
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from adarankgrad import AdaRankGrad
from adarankgrad.optim.projected_grad import ProjectedGrad

from .accumulated_network import (
    MICRO_BATCHES,
    OPTIONS,
    ROUNDING,
    Network,
    assert_equal,
    batch,
    build,
    loss_of,
    train,
)


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8"])
def test_it_is_training_without_hooks_bit_for_bit(form):
    forms = {"state_dtype": form, "basis_dtype": form}
    expected = train(*build(in_backward=False, **forms))
    assert_equal(train(*build(in_backward=True, **forms)), expected)


@pytest.mark.parametrize("in_backward", [False, True])
def test_micro_batches_train_as_the_large_batch_does(in_backward):
    expected = train(*build(in_backward=False))
    model, optimizer = build(in_backward=in_backward)
    result = train(model, optimizer, num_micro_batches=MICRO_BATCHES)
    assert_equal(result, expected, atol=ROUNDING)
    refreshes = [layer.num_refreshes for layer in optimizer.report().layers]
    assert min(refreshes) >= 3


@pytest.mark.parametrize("residual", ["orthogonalized", "normalized"])
def test_with_one_micro_batch_a_residual_steps_as_without_hooks(residual):
    """The residual's step is divided by the decay that follows it: two roundings a step."""
    expected = train(*build(in_backward=False, residual=residual))
    pair = build(in_backward=True, residual=residual, num_micro_batches=1)
    assert_equal(train(*pair), expected, atol=485 * ROUNDING)


def test_with_several_each_takes_its_share_of_the_residual_step():
    """Two micro-batches of the same samples take the step of one."""

    def doubled(model, optimizer):
        inputs, targets = batch(99)
        for _ in range(2):
            (loss_of(model, inputs, targets) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()

    def single(model, optimizer):
        loss_of(model, *batch(99)).backward()
        optimizer.step()
        optimizer.zero_grad()

    results = {}
    for take_step, count in ((doubled, 2), (single, 1)):
        model, optimizer = build(
            in_backward=True, residual="orthogonalized", num_micro_batches=count, lr=1e-6
        )
        for _ in range(3):
            take_step(model, optimizer)
        results[take_step] = model.first.weight.detach().clone()
    start = build(in_backward=False)[0].first.weight.detach()
    moved = torch.dist(results[single], start)
    # The second micro-batch sees weights that are 1e-6 further on.
    assert torch.dist(results[doubled], results[single]) < 1e-3 * moved


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(use_reentrant):
    expected = train(*build(in_backward=True))
    options = {"use_checkpoints": use_reentrant}
    result = train(*build(in_backward=True, model_options=options))
    assert_equal(result, expected, atol=ROUNDING)


def test_clipping_with_torch_scales_by_a_norm_that_is_nearly_the_gradients():
    model, optimizer = build(in_backward=True)
    exact_model, exact_optimizer = build(in_backward=False)
    for step in range(6):
        for each in (model, exact_model):
            each.zero_grad()
            loss_of(each, *batch(step)).backward()
        estimated = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        exact = nn.utils.clip_grad_norm_(exact_model.parameters(), 0.01)
        # Eight probes: the energy outside is known to 50 % at worst, and most of it is inside.
        assert estimated == pytest.approx(exact, rel=0.25)
        clipped = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        assert clipped == pytest.approx(0.01, rel=1e-4)
        optimizer.step()
        exact_optimizer.step()
    assert torch.isfinite(model.first.weight).all()


def test_gradient_scaling_changes_nothing_but_rounding():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=5)
    expected = train(*build(in_backward=False), num_steps=8)
    model, optimizer = build(in_backward=True)
    for step in range(8):
        scaler.scale(loss_of(model, *batch(step))).backward()
        if step % 2:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    result = {name: param.detach() for name, param in model.named_parameters()}
    assert_equal(result, expected, atol=ROUNDING)


def test_an_overflow_found_by_gradient_scaling_skips_the_step():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model, optimizer = build(in_backward=True)
    train(model, optimizer, num_steps=3)
    before = model.first.weight.detach().clone()
    inputs, targets = batch(0)
    scaler.scale(loss_of(model, inputs * float("inf"), targets)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(model.first.weight, before)
    assert scaler.get_scale() == 2.0**9


def test_a_schedule_acts_as_it_does_without_hooks():
    results = []
    for in_backward in (False, True):
        model, optimizer = build(in_backward=in_backward)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        for step in range(8):
            loss_of(model, *batch(step)).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        results.append({name: param.detach() for name, param in model.named_parameters()})
    assert_equal(*results)


def test_a_weight_without_gradient_stays_and_the_others_train():
    results = []
    for in_backward in (False, True):
        model, optimizer = build(in_backward=in_backward)
        start = model.sometimes.weight.detach().clone()
        for step in range(6):
            loss_of(model, *batch(step), with_extra=step >= 4).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step < 4:
                assert torch.equal(model.sometimes.weight, start)
        results.append({name: param.detach() for name, param in model.named_parameters()})
    assert_equal(*results)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_forgets_what_was_accumulated(set_to_none):
    expected = train(*build(in_backward=True), num_steps=5)
    model, optimizer = build(in_backward=True)
    for step in range(5):
        loss_of(model, *batch(1000 + step)).backward()
        optimizer.zero_grad(set_to_none=set_to_none)
        loss_of(model, *batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    result = {name: param.detach() for name, param in model.named_parameters()}
    assert_equal(result, expected)


def test_two_backward_calls_through_one_graph_add_up():
    results = []
    for in_backward in (False, True):
        model, optimizer = build(in_backward=in_backward)
        for step in range(6):
            loss = loss_of(model, *batch(step))
            loss.backward(retain_graph=True)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append({name: param.detach() for name, param in model.named_parameters()})
    assert_equal(*results, atol=ROUNDING)


def test_no_more_than_one_gradient_of_a_projected_weight_is_alive_in_the_backward_pass():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(6)))
    optimizer = AdaRankGrad(model.named_parameters(), **OPTIONS)
    optimizer.accumulate_in_backward(model)
    alive, most = weakref.WeakSet(), []

    def before_the_hook(param):
        if not isinstance(param.grad, ProjectedGrad):
            alive.add(param.grad)
            most.append(len(alive))

    for param in model.parameters():  # hooks run in order of registration, so these ones first
        hooks = list(param._post_accumulate_grad_hooks.values())
        param._post_accumulate_grad_hooks.clear()
        param.register_post_accumulate_grad_hook(before_the_hook)
        for hook in hooks:
            param.register_post_accumulate_grad_hook(hook)
    gc.disable()
    try:
        for _ in range(3):
            model(torch.randn(4, 32)).square().mean().backward()
            assert len(alive) == 0
            assert all(isinstance(param.grad, ProjectedGrad) for param in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
    finally:
        gc.enable()
    assert most == [1] * 18


def test_what_is_held_is_small_and_goes_with_zero_grad():
    weight = nn.Parameter(torch.randn(64, 64))
    layer = nn.Linear(64, 64, bias=False)
    layer.weight = weight
    optimizer = AdaRankGrad([("weight", weight)], **{**OPTIONS, "energy": 1.0, "max_rank": 4})
    optimizer.accumulate_in_backward(layer)
    for step in range(3):
        layer(torch.randn(128, 64)).square().mean().backward()
        held = weight.grad
        num_elements = sum(part.numel() for part in held.measured)
        # Rank 4, eight probes; at the first step a sketch of 4 + 2 columns, then its coordinates.
        assert num_elements == 64 * {0: 8 + 6, 1: 6 + 8, 2: 4 + 8}[step]
        optimizer.step()
        reference = weakref.ref(held)
        del held
        optimizer.zero_grad()
        assert reference() is None


def test_removing_the_handle_ends_it():
    model, optimizer = build(in_backward=False)
    handle = optimizer.accumulate_in_backward(model)
    loss_of(model, *batch(0)).backward()
    assert isinstance(model.first.weight.grad, ProjectedGrad)
    optimizer.step()
    optimizer.zero_grad()
    handle.remove()
    loss_of(model, *batch(1)).backward()
    assert not isinstance(model.first.weight.grad, ProjectedGrad)
    optimizer.step()


def test_resuming_between_a_sketch_and_its_refresh_is_bit_for_bit():
    expected = train(*build(in_backward=True), num_steps=9)
    for stop in range(1, 9):
        model, optimizer = build(in_backward=True)
        train(model, optimizer, num_steps=stop)
        resumed, fresh = build(in_backward=True)
        resumed.load_state_dict(model.state_dict())
        fresh.load_state_dict(optimizer.state_dict())
        for step in range(stop, 9):
            loss_of(resumed, *batch(step)).backward()
            fresh.step()
            fresh.zero_grad()
        assert_equal(dict(resumed.named_parameters()), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"basis": "randomized"}, "needs basis='sketched', got 'randomized'"),
        ({"residual": "fira"}, "residual='fira' needs the whole gradient"),
        ({"residual": "orthogonalized"}, "num_micro_batches"),
    ],
)
def test_what_needs_whole_gradients_is_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        build(in_backward=True, **options)


@pytest.mark.parametrize("count", [0, -1, 1.5, True])
def test_a_number_of_micro_batches_that_is_none_is_refused(count):
    with pytest.raises(ValueError, match="num_micro_batches must be an int of at least 1"):
        build(in_backward=True, residual="orthogonalized", num_micro_batches=count)


def test_a_model_of_other_weights_is_refused():
    _, optimizer = build(in_backward=False)
    with pytest.raises(ValueError, match="the model has no projected weight of this optimizer"):
        optimizer.accumulate_in_backward(Network())


@pytest.mark.parametrize(
    "operation",
    [
        lambda grad: grad.abs(),
        lambda grad: grad.norm(1),
        lambda grad: grad + torch.ones_like(grad),
        lambda grad: grad.clamp_(-1, 1),
    ],
)
def test_what_needs_single_entries_is_refused_with_a_reason(operation):
    model, _ = build(in_backward=True)
    loss_of(model, *batch(0)).backward()
    with pytest.raises(NotImplementedError, match=r"in projection"):
        operation(model.first.weight.grad)
