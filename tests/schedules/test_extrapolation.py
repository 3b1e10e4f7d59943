"""Gradients are taken ahead of the weights, and steps from where they were, to the bit."""

from __future__ import annotations

import io
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from adarankgrad import AdaGradNorm, Fira, GaLore, param_groups
from adarankgrad.schedules.extrapolation import Extrapolation, ExtrapolationConfig
from allocations import LiveMemory
from same_values import assert_same_values

from .extrapolated_models import (
    OPTIMIZERS,
    batches,
    loss_of,
    net,
    same,
    train,
    train_by_hand,
    train_plainly,
)

SOURCES = {
    "past-local": {"source": "past-local"},
    "fresh": {"source": "fresh"},
    "past-global": {"source": "past-global"},
    "noise": {"source": "noise", "scale": "gradient"},
}


def setup(name="sgd", num_parts=1, step=0.3, **settings):
    model = net()
    optimizer = OPTIMIZERS[name](model)
    config = ExtrapolationConfig(step=step, **settings)
    return model, optimizer, Extrapolation(optimizer, model, config, num_micro_batches=num_parts)


def scalar(value, **options):
    """One weight, float64, with an optimizer of plain gradient steps of 0.1."""
    model = nn.ParameterList([nn.Parameter(torch.tensor([value], dtype=torch.float64))])
    return model, model[0], torch.optim.SGD(model.parameters(), lr=0.1, **options)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_of_zero_is_the_run_without_to_the_bit(name, source):
    plain = net()
    optimizer = OPTIMIZERS[name](plain)
    train_plainly(plain, optimizer, batches(10))
    model, own, extrapolation = setup(name, step=0.0, **SOURCES[source])
    train(model, own, extrapolation, batches(10))
    assert same(plain, model)
    assert_same_values(optimizer.state_dict(), own.state_dict())


@pytest.mark.parametrize("num_parts", [1, 2])
@pytest.mark.parametrize("source", ["past-local", "fresh", "past-global"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_a_copy_that_is_ahead_to_the_bit(name, source, num_parts):
    steps = batches(6, num_parts)
    expected = net()
    by_hand = OPTIMIZERS[name](expected)
    # Two parts: their halves, and twice a half, are exact.
    train_by_hand(expected, by_hand, source, 0.3, steps)
    model, optimizer, extrapolation = setup(name, num_parts, **SOURCES[source])
    train(model, optimizer, extrapolation, steps)
    assert same(expected, model)
    assert_same_values(by_hand.state_dict(), optimizer.state_dict())
    unmoved = net()
    train_plainly(unmoved, OPTIMIZERS[name](unmoved), steps)
    assert not same(unmoved, model)


TORCH_OPTIMIZERS = [
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adamax",
    "ASGD",
    "NAdam",
    "RAdam",
    "RMSprop",
]


@pytest.mark.parametrize("make", [*TORCH_OPTIMIZERS, "Rprop", AdaGradNorm, GaLore, Fira])
def test_any_optimizer_takes_the_steps_of_a_copy_that_is_ahead(make):
    def optimizer_of(model):
        if make in (GaLore, Fira):
            return make(param_groups(model, smallest_side=2), lr=0.02, rank=4)
        chosen = getattr(torch.optim, make) if isinstance(make, str) else make
        return chosen(model.parameters(), lr=0.02)

    expected = net()
    train_by_hand(expected, optimizer_of(expected), "past-local", 0.3, batches(4, 2))
    model = net()
    optimizer = optimizer_of(model)
    extrapolation = Extrapolation(optimizer, model, ExtrapolationConfig(0.3), num_micro_batches=2)
    train(model, optimizer, extrapolation, batches(4, 2))
    assert same(expected, model)


def test_a_fresh_gradient_contracts_a_quadratic_as_computed():
    model, weight, optimizer = scalar(2.0)
    extrapolation = Extrapolation(optimizer, model, ExtrapolationConfig(0.4, "fresh"))

    def backward():
        (0.5 * 3.0 * weight.square()).sum().backward()

    with extrapolation.extrapolate(backward):
        backward()
    optimizer.step()
    # x(1 - γλ + γγ̂λ²) with λ = 3, γ = 0.1, γ̂ = 0.4; a few roundings of float64.
    assert weight.item() == pytest.approx(2.0 * (1 - 0.3 + 0.36), rel=1e-14)


def test_two_steps_by_the_past_gradient_as_computed():
    model, weight, optimizer = scalar(1.0)
    extrapolation = Extrapolation(optimizer, model, ExtrapolationConfig(0.5))
    for expected in (0.8, 0.8 - 0.1 * 2 * (0.8 - 0.5 * 2.0)):
        with extrapolation.extrapolate():
            weight.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        # The first step has no past gradient. A few roundings of float64.
        assert weight.item() == pytest.approx(expected, rel=1e-14)


def test_the_past_gradient_is_not_the_clipped_one():
    shifts = []
    for is_clipped in (False, True):
        for source in ("past-local", "past-global"):
            model, weight, optimizer = scalar(1.0)
            extrapolation = Extrapolation(optimizer, model, ExtrapolationConfig(0.5, source))
            with extrapolation.extrapolate():
                (5.0 * weight).sum().backward()
            if is_clipped:
                nn.utils.clip_grad_norm_([weight], 0.1)
            before = weight.item()
            extrapolation.begin()
            shifts.append(before - weight.item())
            extrapolation.abandon()
    assert shifts == [2.5] * 4


def test_extragradient_contracts_a_bilinear_game_on_which_gradient_descent_diverges():
    norms = []
    for step in (0.0, 0.1):
        x, y = (nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in "xy")
        model = nn.ParameterList([x, y])
        groups = [{"params": [x]}, {"params": [y], "maximize": True}]
        optimizer = torch.optim.SGD(groups, lr=0.1)
        extrapolation = Extrapolation(optimizer, model, ExtrapolationConfig(step, "fresh"))
        for _ in range(50):

            def backward(x=x, y=y):
                (x * y).sum().backward()

            with extrapolation.extrapolate(backward):
                backward()
            optimizer.step()
            optimizer.zero_grad()
        norms.append(math.hypot(x.item(), y.item()) / math.sqrt(2.0))
    # Descent multiplies the norm by √(1 + γ²) a step, extragradient by √(1 - γ² + γ⁴).
    assert norms[0] == pytest.approx(1.01**25, rel=1e-12)
    assert norms[1] == pytest.approx((1 - 0.01 + 0.0001) ** 25, rel=1e-12)


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


@pytest.mark.parametrize("source", ["past-local", "past-global", "noise"])
def test_one_pass_a_step_and_random_numbers_and_buffers_as_without(source):
    states = []
    for step in (0.0, 0.3):
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(3)
        model = nn.Sequential(nn.Linear(12, 3), norm, nn.Dropout(0.5))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        config = ExtrapolationConfig(step, **SOURCES[source])
        extrapolation = Extrapolation(optimizer, model, config)
        for parts in batches(3):
            with extrapolation.extrapolate():
                model(parts[0]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert norm.num_batches_tracked == 3
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


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


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", ["sgd", "bfloat16"])
def test_a_resumed_run_is_the_same_to_the_bit(name, source):
    steps = batches(6, 2)
    whole, optimizer, extrapolation = setup(name, 2, **SOURCES[source])
    train(whole, optimizer, extrapolation, steps)
    model, optimizer, extrapolation = setup(name, 2, **SOURCES[source])
    train(model, optimizer, extrapolation, steps[:3])
    file = io.BytesIO()
    parts = [part.state_dict() for part in (model, optimizer, extrapolation)]
    torch.save([*parts, torch.get_rng_state()], file)
    file.seek(0)
    *parts, rng = torch.load(file, weights_only=True)
    again = setup(name, 2, **SOURCES[source])
    for part, state in zip(again, parts, strict=True):
        part.load_state_dict(state)
    torch.set_rng_state(rng)
    train(*again, steps[3:])
    assert same(whole, again[0])


@pytest.mark.parametrize(
    ("scale", "expected"), [(0.5, 0.5), ("layer", math.sqrt(4.25)), ("filter", None)]
)
@pytest.mark.parametrize("noise", ["gaussian", "uniform"])
def test_noise_has_the_scale_that_was_asked_for(noise, scale, expected):
    model = nn.ParameterList([nn.Parameter(torch.ones(2, 50_000))])
    with torch.no_grad():
        model[0][1] = math.sqrt(7.5)
    before = model[0].detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = ExtrapolationConfig(2.0, "noise", scale, noise)
    extrapolation = Extrapolation(optimizer, model, config)
    shifts = []
    for _ in range(2):
        extrapolation.begin()
        shifts.append((model[0].detach() - before) / 2.0)
        extrapolation.end()
    deviations = [1.0, math.sqrt(7.5)] if scale == "filter" else [expected] * 2
    for row, deviation in zip(shifts[0], deviations, strict=True):
        # A mean of 50,000 has a spread of 0.0045 deviations, a deviation of at most 0.0032: both
        # within five of them.
        assert abs(row.mean().item()) < 0.0225 * deviation
        assert row.std().item() == pytest.approx(deviation, rel=0.016)
    # √3 deviations bound a uniform number; 100,000 normal ones pass 3.
    assert (shifts[0].abs().max() < 1.733 * max(deviations)) == (noise == "uniform")
    assert not torch.equal(*shifts)


def test_noise_follows_the_past_gradient_of_each_weight():
    model, optimizer, extrapolation = setup(step=0.3, source="noise", scale="gradient")
    train(model, optimizer, extrapolation, batches(1))
    past = extrapolation.state_dict()["past"]
    assert sorted(past) == [0, 1, 2, 3]  # not of weights that had no gradient
    loss_of(net(), batches(1)[0][0]).backward()
    twin = net()
    loss_of(twin, batches(1)[0][0]).backward()
    # The norm of 144 squares in another order.
    expected = twin.inner.weight.grad.square().mean().sqrt()
    torch.testing.assert_close(past[0], expected, rtol=1e-5, atol=0)


def test_the_step_follows_the_rate_of_a_scheduler_up_to_its_own_length():
    model, weight, optimizer = scalar(1.0)
    factors = [0.5, 1.0, 3.0, 0.25]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factors[step % 4])
    shifts = []
    for follow in (True, False):
        config = ExtrapolationConfig(1.0, follow_lr=follow)
        extrapolation = Extrapolation(optimizer, model, config)
        extrapolation.load_state_dict(
            {"source": "past-local", "num_draws": 0, "past": {0: torch.ones(1).double()}}
        )
        before = weight.item()
        extrapolation.begin()
        shifts.append(before - weight.item())
        extrapolation.abandon()
    assert shifts == [0.5, 1.0]
    lengths = []
    extrapolation = Extrapolation(optimizer, model, ExtrapolationConfig(1.0))
    while len(lengths) < len(factors):
        before = weight.item()
        with extrapolation.extrapolate():
            lengths.append(before - weight.item())
            weight.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    # The gradient is 1; the first step has none. Differences of numbers near 1 round at 2^-53.
    assert lengths == pytest.approx([0.0, 1.0, 1.0, 0.25], abs=1e-15)


def test_past_gradients_are_free_of_the_loss_scale_and_dropped_when_it_overflows():
    model, weight, optimizer = scalar(1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    extrapolation = Extrapolation(optimizer, model, ExtrapolationConfig(0.5), scaler=scaler)
    kept = []
    for factor in (3.0, math.inf, 3.0):
        with extrapolation.extrapolate():
            scaler.scale((weight * factor).sum()).backward()
        kept.append(extrapolation.state_dict()["past"].get(0))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert kept[0].item() == kept[2].item() == 3.0
    assert kept[1] is None
    assert weight.item() == pytest.approx(1.0 - 2 * 0.1 * 3.0, rel=1e-14)


class PeakMemory(LiveMemory):
    peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.peak = max(self.peak, self.num_bytes())
        return result


@pytest.mark.parametrize("source", SOURCES)
def test_the_memory_is_one_copy_of_the_weights_and_one_weight_more(source):
    peaks, held = [], []
    for step in (0.0, 0.3):
        model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(6)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        config = ExtrapolationConfig(step, **SOURCES[source])
        extrapolation = Extrapolation(optimizer, model, config)
        data = torch.ones(1, 64)

        def backward(model=model, data=data):
            model(data).sum().backward()

        with PeakMemory() as memory:
            for _ in range(3):
                with extrapolation.extrapolate(backward if source == "fresh" else None):
                    backward()
                optimizer.step()
                optimizer.zero_grad()
        peaks.append(memory.peak)
        held.append(memory.num_bytes())
    one = 64 * 64 * 4
    # Up to a KiB for activations and norms.
    assert peaks[1] - peaks[0] <= 7 * one + 1024
    expected = 6 * one if source.startswith("past") else 0
    assert held[1] - held[0] == pytest.approx(expected, abs=1024)


def test_recomputed_activations_change_nothing():
    models = []
    for recomputes in (False, True):
        model, optimizer, extrapolation = setup("adamw")
        if recomputes:
            inner = model.inner.forward
            model.inner.forward = lambda x, inner=inner: checkpoint(inner, x, use_reentrant=False)
        train(model, optimizer, extrapolation, batches(4))
        models.append(model)
    assert same(*models)


@pytest.mark.parametrize("source", ["past-local", "fresh", "noise"])
def test_gradients_projected_in_the_backward_pass_give_the_same_steps(source):
    models = []
    for in_backward in (False, True):
        model, optimizer, extrapolation = setup("adarankgrad", 2, **SOURCES[source])
        for group in optimizer.param_groups:
            group.update(basis="sketched", residual="none")
        if in_backward:
            optimizer.accumulate_in_backward(model)
        train(model, optimizer, extrapolation, batches(6, 2))
        models.append(model)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        # Measurements are summed over parts, not taken of the sum: roundings of float32, over six
        # steps that depend on each other.
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_residual_steps_in_the_backward_pass_are_from_the_real_point_or_refused():
    for num_parts in (1, 2):
        model, optimizer, extrapolation = setup("adarankgrad", num_parts)
        for group in optimizer.param_groups:
            group.update(basis="sketched", residual="normalized")
        optimizer.accumulate_in_backward(model, num_micro_batches=num_parts)
        before = model.inner.weight.clone()
        if num_parts == 1:
            train(model, optimizer, extrapolation, batches(3))
            assert not torch.equal(before, model.inner.weight)
        else:
            train(model, optimizer, extrapolation, batches(1, 2))
            with pytest.raises(RuntimeError, match="weight was changed at the extrapolated point"):
                train(model, optimizer, extrapolation, batches(2, 2))


def test_whole_gradients_that_are_not_kept_are_asked_for_in_vain():
    model, optimizer, extrapolation = setup("adarankgrad", source="past-global")
    for group in optimizer.param_groups:
        group.update(basis="sketched", residual="none")
    optimizer.accumulate_in_backward(model)
    before = model.inner.weight.clone()
    with pytest.raises(NotImplementedError, match="accumulate_in_backward"):
        train(model, optimizer, extrapolation, batches(1))
    assert torch.equal(before, model.inner.weight)


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
