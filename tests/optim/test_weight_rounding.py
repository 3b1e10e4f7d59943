"""Updates far below what bfloat16 resolves arrive: on average, or to the 16th bit."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from adarankgrad import AdaRankGrad, describe
from adarankgrad.core.rounding import split_correction
from adarankgrad.optim import plain_step, weight_rounding
from adarankgrad.optim.weight_rounding import WEIGHT_ROUNDINGS
from allocations import Allocations

NUM_STEPS = 100
LR = 1e-4
"""Adam moves a weight by this much a step under a constant gradient: half of bfloat16's spacing
just below 1 is 2⁻⁹, twenty times as much."""

MOVE = NUM_STEPS * LR
KINDS = {
    # What Adam does to one direction is spread over the side that the basis spans.
    "projected": {"residual": "none", "scale": math.sqrt(48)},
    "projected, other side": {"residual": "none", "scale": math.sqrt(64), "side": "left"},
    "outside the basis": {"basis": "none", "residual": "normalized", "residual_scale": 5.0},
    "plain": {"project": False},
}
"""`normalized` steps are 0.2 a weight here: five times that is as long as Adam's."""


def as_seen(optimizer, param):
    model = nn.Module()
    model.weight = param
    return optimizer.master_weights(model)["weight"].float()


def moved(rounding, options, dtype=torch.bfloat16):
    """Weights of 1 after many equal steps, as the optimizer sees them."""
    param = nn.Parameter(torch.ones(64, 48, dtype=dtype))
    optimizer = AdaRankGrad(
        [("weight", param)],
        lr=LR,
        max_rank=1,
        refresh_max_gap=30,
        weight_rounding=rounding,
        **options,
    )
    for _ in range(NUM_STEPS):
        param.grad = torch.ones(64, 48, dtype=dtype)
        optimizer.step()
    return optimizer, param


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_to_the_nearest_loses_tiny_updates(kind):
    _, param = moved("nearest", KINDS[kind])
    assert torch.equal(param, torch.ones_like(param))


@pytest.mark.parametrize("kind", KINDS)
def test_a_correction_keeps_tiny_updates(kind):
    optimizer, param = moved("corrected", KINDS[kind])
    # Below 1, 16 significant bits are 2⁻¹⁶ apart: half of it a step. A gradient of one direction is
    # rounded to bfloat16 in the products that project it, 2⁻⁸ of a step.
    bound = NUM_STEPS * 2**-17 + 2**-8 * MOVE
    torch.testing.assert_close(
        as_seen(optimizer, param), torch.full((64, 48), 1 - MOVE), rtol=0, atol=bound
    )
    # The weight itself is the nearest that bfloat16 has: half a spacing away.
    assert (param.float() - as_seen(optimizer, param)).abs().max() <= 2**-9


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_at_random_keeps_tiny_updates_on_average(kind):
    _, param = moved("stochastic", KINDS[kind])
    # A step δ between numbers 2⁻⁸ apart adds a variance of δ·2⁻⁸ at most, independently for each
    # weight. Five standard deviations of the mean, and 2⁻⁸ of the way as above.
    deviation = math.sqrt(MOVE * 2**-8)
    bound = 5 * deviation / math.sqrt(param.numel()) + 2**-8 * MOVE
    assert param.float().mean().item() == pytest.approx(1 - MOVE, abs=bound)
    assert (param.float() - (1 - MOVE)).abs().max() <= 6 * deviation


@pytest.mark.parametrize("rounding", ["stochastic", "corrected"])
def test_steps_within_the_backward_pass_are_rounded_as_well(rounding):
    """The residual of one micro-batch is subtracted in a hook; see `step_outside`."""
    changes = {}
    for name in ("nearest", rounding):
        layer = nn.Linear(48, 64, bias=False).bfloat16()
        nn.init.ones_(layer.weight)
        optimizer = AdaRankGrad(
            [("weight", layer.weight)],
            lr=0.0,
            basis="sketched",
            residual="normalized",
            max_rank=1,
            weight_rounding=name,
        )
        optimizer.accumulate_in_backward(layer, num_micro_batches=2)
        for step in range(2):  # a basis of a single direction, lr 0: the weight is as it was
            backward(layer, step)
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(layer.weight, torch.ones_like(layer.weight))
        for _ in range(20):
            optimizer.param_groups[0]["lr"] = LR
            for micro_batch in range(2):
                backward(layer, micro_batch)
            optimizer.param_groups[0]["lr"] = 0.0  # only the backward pass moves the weight
            optimizer.step()
            optimizer.zero_grad()
        changes[name] = as_seen(optimizer, layer.weight) - 1.0
    assert not changes["nearest"].any()
    # Columns of 0.2 a weight, twice (residual_scale), half of it each (two micro-batches): 40 steps
    # of 0.2·lr that repeat every second time, so a column adds up to no more and a good part of it.
    size = torch.linalg.vector_norm(changes[rounding], dim=0) / math.sqrt(64)
    assert (
        0.2 * 40 * 0.2 * LR < size.median() < 1.5 * 40 * 0.2 * LR + 5 * math.sqrt(40 * LR * 2**-8)
    )


def backward(layer, step):
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(16, 48, generator=generator).bfloat16()
    targets = torch.randn(16, 64, generator=generator).bfloat16()
    (layer(inputs) * targets).sum().backward()


@pytest.mark.parametrize("kind", ["projected", "plain"])
@pytest.mark.parametrize("rounding", ["stochastic", "corrected"])
def test_large_weights_are_stepped_in_parts(monkeypatch, rounding, kind):
    """Parts change nothing but the order of random numbers, and bound what is allocated."""
    monkeypatch.setattr(weight_rounding, "CHUNK", 512)
    monkeypatch.setattr(plain_step, "CHUNK", 512)
    param = nn.Parameter(torch.ones(64, 96, dtype=torch.bfloat16))
    param.grad = torch.randn(64, 96).bfloat16()
    options = {"residual": "none", "max_rank": 2, "project": kind == "projected"}
    options["state_dtype"] = "int8"
    optimizer = AdaRankGrad([param], weight_rounding=rounding, **options)
    optimizer.step()
    held = [value for value in optimizer.state[param].values() if isinstance(value, Tensor)]
    with Allocations(known=[param, param.grad, *held]) as allocations:
        optimizer.step()
    # The largest part is 512 weights, and the moments of a projected weight are 2 x 96.
    assert 0 < allocations.largest <= 512


@pytest.mark.parametrize("kind", ["projected", "plain"])
def test_parts_do_not_change_a_corrected_weight(monkeypatch, kind):
    options = {"lr": 0.01, "weight_decay": 0.1, "project": kind == "projected", "max_rank": 4}
    results = []
    for chunk in (2**20, 512):
        monkeypatch.setattr(weight_rounding, "CHUNK", chunk)
        monkeypatch.setattr(plain_step, "CHUNK", chunk)
        param = nn.Parameter(torch.ones(64, 96, dtype=torch.bfloat16))
        optimizer = AdaRankGrad([param], weight_rounding="corrected", **options)
        for step in range(5):
            param.grad = torch.randn(
                64, 96, generator=torch.Generator().manual_seed(step)
            ).bfloat16()
            optimizer.step()
        results.append(as_seen(optimizer, param))
    # Products of other shapes: float32 rounding of a weight of 1, and then half a unit of 2⁻¹⁵.
    torch.testing.assert_close(*results, rtol=0, atol=5 * (2**-22 + 2**-15))


@pytest.mark.filterwarnings("ignore:weight_rounding=.* has no effect")
@pytest.mark.parametrize("rounding", WEIGHT_ROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_weights_are_trained_as_ever(dtype, rounding):
    results = []
    for name in ("nearest", rounding):
        param = nn.Parameter(torch.ones(12, 8, dtype=dtype))
        optimizer = AdaRankGrad([param], weight_rounding=name)
        param.grad = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
        optimizer.step()
        assert "correction" not in optimizer.state[param]
        results.append(param.detach())
    assert torch.equal(*results)


def stepped(*weights, rounding):
    """Step twice, as only the first step should warn."""
    optimizer = AdaRankGrad(list(weights), weight_rounding=rounding)
    for _ in range(2):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()


@pytest.mark.parametrize("rounding", ["stochastic", "corrected"])
def test_rounding_without_any_weight_to_round_is_warned_of_once(rounding):
    matrix, vector = (nn.Parameter(torch.ones(shape)) for shape in ((12, 8), (8,)))
    message = f"weight_rounding='{rounding}' has no effect.*these are torch.float32; train in"
    with pytest.warns(UserWarning, match=message) as caught:
        stepped(matrix, vector, rounding=rounding)
    assert len(caught) == 1


def test_one_wider_weight_beside_others_is_not_warned_of():
    norm = nn.Parameter(torch.ones(8))
    stepped(norm, nn.Parameter(torch.ones(12, 8, dtype=torch.bfloat16)), rounding="stochastic")
    stepped(norm, rounding="nearest")


@pytest.mark.parametrize("rounding", ["stochastic", "corrected"])
def test_float16_weights_are_refused(rounding):
    param = nn.Parameter(torch.ones(12, 8, dtype=torch.float16))
    with pytest.raises(ValueError, match=rf"weight_rounding='{rounding}'.*\(12, 8\) is float16"):
        AdaRankGrad([param], weight_rounding=rounding)


def tied_model():
    model = nn.Module()
    model.embedding = nn.Embedding(20, 16)
    model.hidden = nn.Linear(16, 16)
    model.head = nn.Linear(16, 20, bias=False)
    model.head.weight = model.embedding.weight
    model.register_buffer("positions", torch.arange(4))
    model.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    torch.manual_seed(0)
    for param in (model.hidden.weight, model.hidden.bias, model.head.weight):
        nn.init.normal_(param)
    return model.bfloat16()


def trained_model():
    model = tied_model()
    trained = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    optimizer = AdaRankGrad(trained, lr=1e-3, max_rank=4, weight_rounding="corrected")
    for step in range(6):
        for _, param in trained:
            generator = torch.Generator().manual_seed(step)
            param.grad = torch.randn(param.shape, generator=generator).bfloat16()
        optimizer.step()
    return model, optimizer


def test_master_weights_are_a_state_dict_whose_nearest_bfloat16_is_the_model():
    model, optimizer = trained_model()
    weights = optimizer.master_weights(model)
    assert weights.keys() == model.state_dict().keys()
    assert weights["head.weight"] is weights["embedding.weight"]
    assert torch.equal(weights["positions"], model.positions)
    assert weights["frozen"].dtype == torch.bfloat16
    assert not any(weight.requires_grad for weight in weights.values())
    for name in ("hidden.weight", "hidden.bias", "head.weight"):
        assert weights[name].dtype == torch.float32
        rounded, correction = split_correction(weights[name])
        assert torch.equal(rounded, model.state_dict()[name])
        assert correction.any()
    wide = copy.deepcopy(model).float()
    wide.load_state_dict(weights)
    assert torch.equal(wide.hidden.weight, weights["hidden.weight"])


def test_a_weight_that_is_loaded_without_its_optimizer_is_off_by_half_a_unit_at_most():
    model, optimizer = trained_model()
    with torch.no_grad():
        model.hidden.weight.fill_(1.0)
        model.hidden.bias.zero_()
    weights = optimizer.master_weights(model)
    # Above 1 bfloat16 numbers are 2⁻⁷ apart; above 0 by its smallest number.
    assert (weights["hidden.weight"] - 1.0).abs().max() <= 2**-8
    assert (weights["hidden.bias"].abs() <= 2**-133).all()


def test_without_corrections_master_weights_are_the_state_dict():
    model = tied_model()
    weights = AdaRankGrad([model.hidden.weight]).master_weights(model)
    for name, weight in model.state_dict().items():
        assert torch.equal(weights[name], weight)


def test_a_report_counts_corrections_apart_and_names_them():
    model, optimizer = trained_model()
    report = optimizer.report()
    num_corrected = 20 * 16 + 16 * 16 + 16
    assert report.correction_bytes == num_corrected
    parts = report.projected_state_bytes + report.plain_state_bytes
    assert report.state_bytes == parts + num_corrected
    assert "corrections 0.00 MiB" in str(report)
    assert "corrections: 0.00 MiB" in describe(optimizer)
