"""Every option is checked when a group is added, and the error says what is wrong with it."""

from __future__ import annotations

import inspect
import math
import re

import pytest
import torch
from torch import nn

from adarankgrad import AdaRankGrad
from adarankgrad.core.projection import layout_of
from adarankgrad.optim.options import resolve_rank


def weight():
    return nn.Parameter(torch.ones(12, 8))


BAD_VALUES = [
    *(("lr", value) for value in (-0.1, math.nan, math.inf, "fast", None)),
    *(("eps", value) for value in (-1e-8, math.nan, "small")),
    *(("weight_decay", value) for value in (-0.1, math.inf)),
    *(("betas", value) for value in ((0.9, 1.0), (-0.1, 0.9), (0.9,), 0.9, ("a", "b"), None)),
    *(("scale", value) for value in (-1.0, math.nan, "large")),
    *(("max_rank", value) for value in (0, -3, 0.0, 1.5, -0.5, True, "8", None)),
    *(("min_rank", value) for value in (0, -1, 1.01, False, "2")),
    *(("energy", value) for value in (0.0, -0.1, 1.1, math.nan, "most")),
    *(("rank_multiple", value) for value in (0, -8, 1.5)),
    *(("oversampling", value) for value in (-1, -0.5, "8")),
    *(("power_iterations", value) for value in (-1, 1.0)),
    *(("refresh_max_gap", value) for value in (0, -5, 2.5)),
    *(("refresh_min_gap", value) for value in (0, 1.5)),
    *(("refresh_norm", value) for value in (-1.0, math.nan)),
    *(("refresh_relative_norm", value) for value in (-0.5, math.inf)),
    *(("refresh_energy", value) for value in (-0.5, 1.5)),
    *(("max_grad_norm", value) for value in (-1.0, math.nan, math.inf, "1")),
    ("nonfinite", "warn"),
    *(("state_dtype", value) for value in ("int4", None, 8)),
    ("basis_dtype", "float16"),
    ("weight_rounding", "up"),
    ("side", "shortest"),
    ("basis", "svd"),
    ("carry", "rotate"),
    ("carry", None),
    ("bias_correction", "none"),
    ("update", "sgd"),
    ("monotone", "no"),
    ("warm_start", 3),
    ("project", "no"),
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES, ids=str)
def test_a_bad_value_raises_and_the_error_names_argument_and_value(name, value):
    with pytest.raises(ValueError) as raised:
        AdaRankGrad([weight()], **{name: value})
    assert re.search(rf"\b{name}\b", str(raised.value))
    assert str(value) in str(raised.value)


@pytest.mark.parametrize(("name", "value"), [("lr", -1.0), ("energy", 2.0), ("carry", "rotate")])
def test_a_bad_value_in_a_group_raises_whenever_the_group_is_added(name, value):
    with pytest.raises(ValueError, match=name):
        AdaRankGrad([{"params": [weight()], name: value}])
    optimizer = AdaRankGrad([weight()])
    with pytest.raises(ValueError, match=name):
        optimizer.add_param_group({"params": [weight()], name: value})
    assert len(optimizer.param_groups) == 1


def test_a_carry_of_variances_needs_an_update_that_keeps_them():
    with pytest.raises(ValueError, match=r"carry='ldadam'.*use carry='squared'"):
        AdaRankGrad([weight()], carry="ldadam", update="orthogonalized")


def test_a_form_of_the_basis_needs_a_basis():
    with pytest.raises(ValueError, match=r"basis_dtype='int8'.*basis='none' keeps none"):
        AdaRankGrad([weight()], basis="none", basis_dtype="int8")
    with pytest.raises(ValueError, match="leave basis_dtype out"):
        AdaRankGrad([{"params": [weight()], "basis": "none"}], basis_dtype="bfloat16")


def test_an_unknown_group_option_raises_and_the_known_ones_are_listed():
    with pytest.raises(ValueError, match=r"unknown option rnak in a parameter group.*max_rank"):
        AdaRankGrad([{"params": [weight()], "rnak": 4}])


def test_a_floor_above_the_ceiling_raises_in_the_same_unit():
    with pytest.raises(ValueError, match="min_rank must not exceed max_rank, got 8 and 4"):
        AdaRankGrad([weight()], min_rank=8, max_rank=4)
    with pytest.raises(ValueError, match=r"got 0\.5 and 0\.25"):
        AdaRankGrad([weight()], min_rank=0.5, max_rank=0.25)
    with pytest.raises(ValueError, match="got 8 and 4"):
        AdaRankGrad([{"params": [weight()], "max_rank": 4}], min_rank=8, max_rank=16)


@pytest.mark.parametrize(
    "good",
    [
        {"lr": 0.0, "eps": 0.0, "weight_decay": 0.0, "betas": (0.0, 0.0), "scale": 0.0},
        {"lr": torch.tensor(0.1), "energy": 1.0, "max_rank": 1.0, "min_rank": 1.0},
        {"max_rank": 1, "min_rank": 1, "rank_multiple": 16, "refresh_norm": 0.0},
        {"betas": [0.9, 0.99], "oversampling": 0, "power_iterations": 0, "refresh_energy": 1.0},
        {"min_rank": 8, "max_rank": 0.01},  # in two units, the ceiling decides for each matrix
    ],
    ids=str,
)
def test_values_at_the_edge_of_what_is_allowed_train(good):
    param = weight()
    optimizer = AdaRankGrad([param], **good)
    for _ in range(3):
        param.grad = torch.randn(12, 8)
        optimizer.step()
    assert torch.isfinite(param).all()


def test_every_option_of_the_constructor_may_be_set_for_a_group():
    options = {
        name: parameter.default
        for name, parameter in inspect.signature(AdaRankGrad.__init__).parameters.items()
        if name not in ("self", "params")
    }
    optimizer = AdaRankGrad([{"params": [weight()], **options}], lr=0.5)
    group = optimizer.param_groups[0]
    assert {name: group[name] for name in options} == options
    kept_beside_options = {"method", "state_version", "num_skipped_steps"}
    assert set(optimizer.defaults) == set(options) | kept_beside_options


@pytest.mark.parametrize(
    ("rank", "columns"),
    [(3, 3), (100, 8), (1.0, 8), (0.25, 2), (0.3, 2), (0.01, 1)],
)
@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
@pytest.mark.parametrize("side", ["short", "long"])
def test_a_rank_is_columns_or_a_share_of_the_short_side(rank, columns, shape, side):
    assert resolve_rank(rank, layout_of(torch.Size(shape), side)) == columns


def test_the_published_preset_is_the_constructor_with_the_papers_options():
    group = AdaRankGrad.published([weight()], lr=0.02, max_rank=4).param_groups[0]
    expected = {
        "lr": 0.02,
        "eps": 1e-6,
        "max_rank": 4,
        "min_rank": 1,
        "oversampling": 1.0,
        "power_iterations": 2,
        "warm_start": False,
        "refresh_max_gap": 200,
        "refresh_min_gap": 1,
        "refresh_norm": 1e-4,
        "carry": "published",
        "bias_correction": "global",
        "monotone": False,
        "side": "short",
    }
    assert {name: group[name] for name in expected} == expected
    assert group["energy"] == pytest.approx(0.96)  # residual 0.2, not squared


def test_the_low_memory_preset_is_the_constructor_with_small_state():
    group = AdaRankGrad.low_memory([weight()], lr=0.02, weight_rounding="corrected").param_groups[0]
    expected = AdaRankGrad(
        [weight()],
        lr=0.02,
        max_rank=12,
        basis="sketched",
        state_dtype="int8",
        basis_dtype="int8",
        weight_rounding="corrected",
    ).param_groups[0]
    assert {**group, "params": []} == {**expected, "params": []}


def test_the_published_preset_can_be_overridden_and_is_checked():
    optimizer = AdaRankGrad.published([weight()], max_rank=4, carry="keep", residual_threshold=0.5)
    assert optimizer.defaults["carry"] == "keep"
    assert optimizer.defaults["energy"] == 0.75
    with pytest.raises(ValueError, match=r"residual must be in \[0, 1\), got 1.5"):
        AdaRankGrad.published([weight()], max_rank=4, residual_threshold=1.5)
    with pytest.raises(ValueError, match="max_rank"):
        AdaRankGrad.published([weight()], max_rank=0)
