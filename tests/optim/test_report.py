"""What `report` and `log_reports` tell about a training."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from adarankgrad import AdaRankGrad, log_reports

OPTIONS = {"max_rank": 4, "min_rank": 1, "energy": 0.9, "refresh_max_gap": 3, "eps": 1e-8}


def low_rank(rows, cols, rank):
    return torch.randn(rows, rank) @ torch.randn(rank, cols)


@pytest.fixture
def params():
    return [
        ("first", nn.Parameter(torch.randn(12, 8))),
        ("second", nn.Parameter(torch.randn(6, 20))),
        ("bias", nn.Parameter(torch.randn(8))),
    ]


def step(optimizer, params, rank=2):
    for _, param in params:
        is_matrix = param.dim() == 2
        param.grad = low_rank(*param.shape, rank) if is_matrix else torch.randn(param.shape)
    optimizer.step()


def test_before_the_first_step_there_is_nothing_to_report(params):
    report = AdaRankGrad(params, **OPTIONS).report()
    assert report.layers == ()
    assert (report.state_bytes, report.mean_rank, report.projected_share) == (0, 0, 0)


def test_a_layer_is_reported_with_its_numbers(params):
    optimizer = AdaRankGrad(params, **OPTIONS)
    step(optimizer, params, rank=1)
    first, second = optimizer.report().layers
    assert (first.name, first.shape, first.rank, first.max_rank) == ("first", (12, 8), 1, 4)
    assert (second.name, second.shape) == ("second", (6, 20))
    assert first.state_bytes == (8 + 2 * 12 + 1) * 4
    assert second.state_bytes == (6 + 2 * 20 + 1) * 4
    assert first.captured_energy == pytest.approx(1.0, abs=1e-5)  # rank one, float32
    assert (first.refresh_reason, first.num_refreshes, first.num_skipped_refreshes) == (
        "first",
        1,
        0,
    )
    assert first.steps_since_refresh == 1


def test_captured_energy_is_the_share_of_the_gradient_in_the_basis(params):
    optimizer = AdaRankGrad(params, **{**OPTIONS, "max_rank": 2, "basis": "exact"})
    _, param = params[0]
    param.grad = torch.randn(12, 8)
    optimizer.step()
    values = torch.linalg.svdvals(param.grad.double()).square()
    expected = (values[:2].sum() / values.sum()).item()
    # A few sums of a hundred float32 squares: 100 * 6e-8.
    assert optimizer.report().layers[0].captured_energy == pytest.approx(expected, rel=1e-5)


def test_totals_are_the_sums_of_their_parts(params):
    optimizer = AdaRankGrad(params, **OPTIONS)
    step(optimizer, params, rank=2)
    report = optimizer.report()
    assert report.projected_state_bytes == sum(layer.state_bytes for layer in report.layers)
    assert report.plain_state_bytes == 2 * 8 * 4
    assert report.state_bytes == report.projected_state_bytes + report.plain_state_bytes
    assert report.adamw_projected_state_bytes == 2 * (12 * 8 + 6 * 20) * 4
    assert report.projected_share == (12 * 8 + 6 * 20) / (12 * 8 + 6 * 20 + 8)
    assert report.mean_rank == sum(layer.rank for layer in report.layers) / 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["first", "first", "first", "max_gap"]),
        ({"refresh_norm": 1e6, "refresh_min_gap": 2}, ["first", "first", "norm", "norm"]),
        ({"refresh_energy": 1.0, "refresh_min_gap": 1}, ["first", "energy", "energy", "energy"]),
    ],
)
def test_the_rule_that_fired_last_is_reported(params, options, expected):
    optimizer = AdaRankGrad(params[:1], **{**OPTIONS, **options})
    reasons, ages = [], []
    for _ in range(4):
        params[0][1].grad = torch.randn(12, 8)
        optimizer.step()
        (layer,) = optimizer.report().layers
        reasons.append(layer.refresh_reason)
        ages.append(layer.steps_since_refresh)
    assert reasons == expected
    assert ages[0] == 1
    assert max(ages) <= 3


def test_a_skipped_first_refresh_is_reported_as_no_reason_and_rank_zero(params):
    optimizer = AdaRankGrad(params[:1], nonfinite="ignore", **OPTIONS)
    params[0][1].grad = torch.full((12, 8), torch.nan)
    optimizer.step()
    report = optimizer.report()
    (layer,) = report.layers
    assert (layer.rank, layer.refresh_reason, layer.captured_energy) == (0, "none", 0.0)
    assert layer.num_skipped_refreshes == report.num_skipped_refreshes == 1
    assert layer.num_refreshes == 0
    assert layer.state_bytes == 0


def test_a_report_is_a_snapshot_that_later_steps_do_not_change(params):
    optimizer = AdaRankGrad(params, **OPTIONS)
    step(optimizer, params)
    report = optimizer.report()
    before = report.as_dict()
    step(optimizer, params, rank=4)
    assert report.as_dict() == before
    with pytest.raises(AttributeError):
        report.layers[0].rank = 3


def test_the_ceiling_of_a_stack_and_of_a_share_is_in_columns():
    stack, matrix = nn.Parameter(torch.randn(3, 12, 8)), nn.Parameter(torch.randn(16, 40))
    optimizer = AdaRankGrad(
        [{"params": [stack], "stacked": True, "max_rank": 3}, {"params": [matrix]}],
        max_rank=0.25,
        min_rank=1,
    )
    stack.grad, matrix.grad = torch.randn(3, 12, 8), torch.randn(16, 40)
    optimizer.step()
    assert [layer.max_rank for layer in optimizer.report().layers] == [3, 4]
    assert [layer.shape for layer in optimizer.report().layers] == [(3, 12, 8), (16, 40)]


def test_as_dict_is_plain_json_with_every_number(params):
    optimizer = AdaRankGrad(params, **OPTIONS)
    step(optimizer, params)
    report = optimizer.report()
    plain = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert plain["state_bytes"] == report.state_bytes
    assert plain["mean_rank"] == report.mean_rank
    assert plain["projected_share"] == report.projected_share
    assert plain["num_skipped_refreshes"] == 0
    layer = plain["layers"][0]
    assert layer["name"] == "first"
    assert layer["shape"] == [12, 8]
    assert set(layer) == {
        "name",
        "shape",
        "rank",
        "max_rank",
        "captured_energy",
        "steps_since_refresh",
        "refresh_reason",
        "num_refreshes",
        "num_skipped_refreshes",
        "state_bytes",
    }


def test_reports_are_logged_at_the_cadence_until_removed(params):
    optimizer = AdaRankGrad(params, **OPTIONS)
    logged = []
    handle = log_reports(
        optimizer, lambda at, report: logged.append((at, report.mean_rank)), every_steps=3
    )
    for _ in range(7):
        step(optimizer, params, rank=1)
    assert logged == [(3, 1.0), (6, 1.0)]
    handle.remove()
    for _ in range(6):
        step(optimizer, params)
    assert len(logged) == 2


def test_reports_are_logged_every_hundred_steps_by_default(params):
    optimizer = AdaRankGrad([{"params": params, "project": False}], lr=0.0)
    logged = []
    log_reports(optimizer, lambda at, _: logged.append(at))
    for _ in range(200):
        step(optimizer, params[2:])
    assert logged == [100, 200]


def test_a_cadence_below_one_step_raises(params):
    with pytest.raises(ValueError, match="every_steps must be at least 1, got 0"):
        log_reports(AdaRankGrad(params), print, every_steps=0)


def test_a_report_prints_as_a_table_with_totals(params):
    optimizer = AdaRankGrad(params, **OPTIONS)
    step(optimizer, params, rank=1)
    lines = str(optimizer.report()).splitlines()
    assert len(lines) == 1 + 2 + 1
    assert lines[1].split()[:4] == ["first", "12x8", "1", "4"]
    assert "first" in lines[1] and "second" in lines[2]
    assert lines[-1].startswith("mean rank 1.0;")
    assert "skipped steps: 0, refreshes: 0" in lines[-1]
