"""Which weights `param_groups` projects, and what `describe` says about them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adarankgrad import AdaRankGrad, describe, param_groups


def names_by_kind(groups):
    """Names of the projected matrices, projected stacks, plain and undecayed parameters."""
    kinds = {"matrices": [], "stacks": [], "plain": [], "undecayed": []}
    for group in groups:
        if group["project"]:
            kind = "stacks" if group["stacked"] else "matrices"
        else:
            kind = "undecayed" if group.get("weight_decay") == 0.0 else "plain"
        kinds[kind] += [name for name, _ in group["params"]]
    return kinds


def names(groups):
    return [name for group in groups for name, _ in group["params"]]


class Block(nn.Module):
    """A linear layer, a norm with a two-dimensional weight, and a table without a module."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.mix = nn.Linear(16, 24)
        self.norm = nn.LayerNorm((4, 6))
        self.table = nn.Parameter(torch.randn(16, 16))
        self.lm_head = nn.Linear(24, 32, bias=False)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 16, 24))
        self.gate = nn.Linear(16, 3, bias=False)


def test_linear_weights_are_projected_and_the_rest_is_plain():
    kinds = names_by_kind(param_groups(Block()))
    assert kinds == {
        "matrices": ["mix.weight"],
        "stacks": [],
        "plain": ["table", "embed.weight", "lm_head.weight"],
        "undecayed": ["mix.bias", "norm.weight", "norm.bias"],
    }


def test_embeddings_and_head_are_projected_in_a_group_of_their_own_where_asked_for():
    groups = param_groups(Block(), embeddings={"lr": 0.5}, max_rank=4, exclude="lm_head")
    assert [[name for name, _ in group["params"]] for group in groups] == [
        ["mix.weight"],
        ["embed.weight"],
        ["table", "lm_head.weight"],
        ["mix.bias", "norm.weight", "norm.bias"],
    ]
    matrices, embeddings, *_ = groups
    assert {**matrices, "params": embeddings["params"], "lr": 0.5} == embeddings


def test_tied_embeddings_are_projected_once():
    model = Block()
    model.lm_head = nn.Linear(16, 32, bias=False)
    model.lm_head.weight = model.embed.weight
    assert names(param_groups(model, embeddings={}))[:2] == ["mix.weight", "embed.weight"]


def test_embeddings_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match=r"embeddings {} asks for .* and none has two axes"):
        param_groups(nn.Sequential(nn.Linear(16, 16)), embeddings={})


def test_two_ways_to_say_what_is_projected_are_refused():
    with pytest.raises(ValueError, match="include 'mix' and embeddings {} both say"):
        param_groups(Block(), include="mix", embeddings={})


def test_norms_and_biases_get_no_decay_where_the_others_do():
    groups = param_groups(Block(), weight_decay=0.1)
    decay = {name: group["weight_decay"] for group in groups for name, _ in group["params"]}
    assert decay == {
        "mix.weight": 0.1,
        "embed.weight": 0.1,
        "table": 0.1,
        "lm_head.weight": 0.1,
        "mix.bias": 0.0,
        "norm.weight": 0.0,
        "norm.bias": 0.0,
    }
    optimizer = AdaRankGrad(param_groups(Block()), weight_decay=0.3)
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.3, 0.3]


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Conv1d(8, 16, 3), ["0.weight"]),
        (nn.Conv2d(8, 16, 3), ["0.weight"]),
        (nn.Conv3d(8, 16, 2), ["0.weight"]),
        (nn.Conv2d(16, 16, 3, groups=16), ["0.weight"]),  # 16 x 9 as a matrix
        (nn.Conv2d(3, 4, 3), []),  # too small
        (nn.Embedding(64, 32), []),
        (nn.Linear(4, 64), []),  # a side below 8
        (nn.Linear(8, 64), ["0.weight"]),
        (nn.MultiheadAttention(16, 2), ["0.out_proj.weight"]),
    ],
    ids=str,
)
def test_layers_are_projected_when_both_sides_are_large_enough(module, expected):
    kinds = names_by_kind(param_groups(nn.Sequential(module)))
    assert kinds["matrices"] == expected
    assert kinds["stacks"] == []


def test_the_smallest_side_can_be_chosen():
    model = nn.Sequential(nn.Linear(4, 64))
    assert names_by_kind(param_groups(model, smallest_side=4))["matrices"] == ["0.weight"]
    with pytest.raises(ValueError, match="smallest_side must be at least 2, got 1"):
        param_groups(model, smallest_side=1)


def test_stacked_experts_are_projected_as_stacks_and_a_small_router_is_not():
    kinds = names_by_kind(param_groups(Experts()))
    assert kinds["stacks"] == ["up"]
    assert kinds["plain"] == ["gate.weight"]


def test_a_weight_tied_to_an_embedding_is_plain_and_appears_once():
    model = Block()
    model.lm_head = nn.Linear(16, 32, bias=False)
    model.lm_head.weight = model.embed.weight
    model.other = nn.Linear(16, 32, bias=False)  # no name of a head gives this one away
    model.other.weight = model.embed.weight
    groups = param_groups(model)
    assert names(groups).count("embed.weight") == 1
    assert not {"lm_head.weight", "other.weight"} & set(names(groups))
    assert "embed.weight" in names_by_kind(groups)["plain"]


def test_a_layer_that_lends_its_weight_to_a_later_embedding_is_plain():
    layer, table = nn.Linear(16, 32, bias=False), nn.Embedding(32, 16)
    table.weight = layer.weight
    kinds = names_by_kind(param_groups(nn.Sequential(layer, table)))
    assert kinds["matrices"] == []
    assert kinds["plain"] == ["0.weight"]


def test_two_linear_layers_that_share_a_weight_are_projected_once():
    first, second = nn.Linear(16, 16), nn.Linear(16, 16)
    second.weight = first.weight
    groups = param_groups(nn.Sequential(first, second))
    assert names_by_kind(groups)["matrices"] == ["0.weight"]
    AdaRankGrad(groups)  # torch refuses a parameter that appears twice


def test_frozen_parameters_are_left_out():
    model = Block()
    model.mix.weight.requires_grad_(False)
    assert "mix.weight" not in names(param_groups(model))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        param_groups(model)


def test_every_trainable_parameter_is_in_exactly_one_group():
    model = nn.ModuleList([Block(), Experts(), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16)])
    found = names(param_groups(model))
    assert sorted(found) == sorted(name for name, _ in model.named_parameters())
    assert len(set(found)) == len(found)


def test_a_bare_layer_is_a_model_too():
    assert names_by_kind(param_groups(nn.Linear(16, 16)))["matrices"] == ["weight"]


def test_include_projects_what_matches_and_nothing_else():
    model = nn.ModuleDict({"block": Block(), "tail": nn.Linear(16, 16)})
    kinds = names_by_kind(param_groups(model, include=r"embed|table"))
    assert kinds["matrices"] == ["block.table", "block.embed.weight"]
    assert "tail.weight" in kinds["plain"]


def test_exclude_takes_weights_out():
    model = nn.ModuleDict({"block": Block(), "tail": nn.Linear(16, 16)})
    assert names_by_kind(param_groups(model, exclude=[r"^tail"]))["matrices"] == [
        "block.mix.weight"
    ]
    kinds = names_by_kind(param_groups(model, include="weight", exclude=["norm", "embed", "head"]))
    assert kinds["matrices"] == ["block.mix.weight", "tail.weight"]


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_raises(argument):
    with pytest.raises(ValueError, match=rf"{argument} pattern 'q_porj' matches no .*table"):
        param_groups(Block(), **{argument: ["mix", "q_porj"]})


def test_an_included_transposed_convolution_is_not_a_stack_of_experts():
    model = nn.Sequential(nn.ConvTranspose2d(16, 12, 3))
    kinds = names_by_kind(param_groups(model, include="weight"))
    assert kinds["stacks"] == []


def test_options_reach_the_projected_groups_only():
    groups = param_groups(Block(), max_rank=4, min_rank=2, energy=0.5, side="long")
    assert {key: groups[0][key] for key in ("max_rank", "min_rank", "energy", "side")} == {
        "max_rank": 4,
        "min_rank": 2,
        "energy": 0.5,
        "side": "long",
    }
    for group in groups[1:]:
        assert not {"max_rank", "min_rank", "energy", "side"} & set(group)
    assert "max_rank" not in param_groups(Block())[0]


def test_the_groups_build_an_optimizer_that_trains_every_parameter():
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 8))
    before = [param.detach().clone() for param in model.parameters()]
    optimizer = AdaRankGrad(param_groups(model, max_rank=4), lr=0.1)
    model(torch.randn(32, 16)).square().sum().backward()
    optimizer.step()
    for param, old in zip(model.parameters(), before, strict=True):
        assert not torch.equal(param, old)


def table_of(text):
    """Rows of `describe`, cells split: name, shape, rank, state MiB, AdamW MiB."""
    lines = text.splitlines()
    return [line.split() for line in lines[1:-2]], lines[-2], lines[-1]


def wide_model(dtype=torch.float32):
    return nn.Sequential(nn.Linear(512, 1024), nn.Linear(1024, 256)).to(dtype)


def test_describe_gives_bytes_at_the_ceiling_beside_those_of_adamw():
    rows, projected, plain = table_of(describe(param_groups(wide_model(), max_rank=64)))
    # Short side 512: 64 * (512 + 2 * 1024 + 1) * 4 bytes = 0.6252 MiB; 2 * 512 * 1024 * 4 = 4 MiB.
    assert rows[0] == ["0.weight", "1024x512", "64", "0.63", "4.00"]
    # Short side 256: 64 * (256 + 2 * 1024 + 1) * 4 bytes = 0.5627 MiB.
    assert rows[1] == ["1.weight", "256x1024", "64", "0.56", "2.00"]
    assert projected == (
        "projected: 786,432 weights in 2 matrices, at most 1.19 MiB of state, 20% of AdamW's "
        "6.00 MiB"
    )
    assert plain == "plain AdamW: 1,280 weights, 0.01 MiB of state"


def test_describe_takes_ranks_as_shares_and_sides():
    rows, _, _ = table_of(describe(param_groups(wide_model(), max_rank=0.25, side="long")))
    # Long side 1024: 128 * (1024 + 2 * 512 + 1) * 4 bytes = 1.0005 MiB.
    assert rows[0][2:4] == ["128", "1.00"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_what_describe_says_is_what_training_at_the_ceiling_holds(dtype):
    model = wide_model(dtype)
    groups = param_groups(model, max_rank=64, min_rank=64)
    optimizer = AdaRankGrad(groups)
    rows, _, _ = table_of(describe(optimizer))
    assert describe(optimizer) == describe(groups)
    for param in model.parameters():
        param.grad = torch.randn(param.shape).to(dtype)
    optimizer.step()
    report = optimizer.report()
    assert [row[3] for row in rows] == [f"{x.state_bytes / 2**20:.2f}" for x in report.layers]
    adamw_mib = sum(float(row[4]) for row in rows)
    assert adamw_mib == report.adamw_projected_state_bytes / 2**20


def test_describe_counts_a_stack_with_all_its_matrices():
    model = nn.Module()
    model.up = nn.Parameter(torch.empty(4, 256, 512))
    rows, _, _ = table_of(describe(param_groups(model, max_rank=32)))
    # 4 * 32 * (256 + 2 * 512 + 1) * 4 bytes = 0.6255 MiB; 4 * 256 * 512 * 8 bytes = 4 MiB.
    assert rows == [["up", "4x256x512", "32", "0.63", "4.00"]]


def test_describe_takes_plain_parameters_in_a_group_by_hand():
    weight = nn.Parameter(torch.empty(512, 512))
    rows, _, _ = table_of(describe([{"params": [weight], "max_rank": 16}]))
    assert rows[0][:3] == ["parameter", "0", "512x512"]


def test_an_include_that_matches_nothing_large_enough_raises():
    with pytest.raises(ValueError, match="include '0' matches no weight that can be projected"):
        param_groups(nn.Sequential(nn.Linear(64, 4)), include="0")


def test_a_position_embedding_of_three_axes_is_no_stack_of_experts():
    model = nn.Module()
    model.position_embeddings = nn.Parameter(torch.zeros(2, 20, 16))
    model.experts = nn.Parameter(torch.zeros(2, 20, 16))
    kinds = names_by_kind(param_groups(model))
    assert kinds["stacks"] == ["experts"]
