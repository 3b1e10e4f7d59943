"""Stages: what trains, what waits, what is copied, and what a resume needs."""

import copy

import pytest
import torch
from torch import nn

from adarankgrad import AdaRankGrad, param_groups
from adarankgrad.schedules.depth import DepthConfig, ProgressiveDepth
from same_values import assert_same_values

from .depth_models import build, checkpoint_layers, layers_of, take_step

TWO_THEN_FOUR = {"layers": (2, 4), "starts": (0, 3)}


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), **{"lr": 1e-2, "weight_decay": 0.1, **options})


def subspace(model, **options):
    groups = param_groups(model, max_rank=4)
    return AdaRankGrad(groups, lr=1e-2, weight_decay=0.1, refresh_max_gap=2, **options)


def grow(model, optimizer, num_steps=4, **options):
    """Train into the second stage; returns the depth."""
    depth = ProgressiveDepth(
        model, DepthConfig(**{**TWO_THEN_FOUR, **options}), optimizers=optimizer
    )
    for step in range(num_steps):
        depth.begin_step(step)
        take_step(model, optimizer, seed=step)
    return depth


def weights_of(layer):
    return [weight.detach().clone() for weight in layer.parameters()]


def test_layers_change_when_their_stage_begins_and_not_before():
    config = DepthConfig(layers=(1, 3, 6), starts=(0, 10, 25))
    assert [config.layers_at(step) for step in (0, 9, 10, 24, 25, 900)] == [1, 1, 3, 3, 6, 6]


@pytest.mark.parametrize("make_optimizer", [adamw, subspace])
def test_layers_that_wait_have_no_gradient_no_decay_and_no_state(make_optimizer):
    model = build("llama", 4)
    before = [weights_of(layer) for layer in layers_of(model)]
    optimizer = make_optimizer(model)
    grow(model, optimizer, num_steps=3, sampling="constant_high")
    for number, layer in enumerate(layers_of(model)):
        is_waiting = number >= 2
        assert all(map(torch.equal, weights_of(layer), before[number])) == is_waiting
        assert all((weight in optimizer.state) != is_waiting for weight in layer.parameters())


def test_copies_are_tensors_of_their_own_from_top_to_bottom_and_draw_nothing():
    model = build("gpt2", 4)
    depth = ProgressiveDepth(model, DepthConfig(layers=(3, 4), starts=(0, 1), layer_map="stack"))
    layers = layers_of(model)
    before = [weights_of(layer) for layer in layers]
    with torch.no_grad():
        layers[2].attn.register_buffer("extra", torch.ones(2))
        layers[3].attn.register_buffer("extra", torch.zeros(2))
    state = torch.get_rng_state()
    depth.begin_step(0)
    depth.begin_step(1)
    assert torch.equal(torch.get_rng_state(), state)
    for number, source in enumerate((0, 1, 2, 2)):
        assert all(map(torch.equal, weights_of(layers[number]), before[source]))
    assert torch.equal(layers[3].attn.extra, torch.ones(2))
    with torch.no_grad():
        for weight in layers[3].parameters():
            weight.add_(1)
    assert all(map(torch.equal, weights_of(layers[2]), before[2]))


def test_a_stage_that_no_step_begins_in_is_passed_over_and_none_comes_back():
    depth = ProgressiveDepth(build("gpt2", 4), DepthConfig(layers=(1, 2, 4), starts=(0, 3, 5)))
    depth.begin_step(2)
    depth.begin_step(7)
    assert depth.num_layers == depth.depth == 4
    with pytest.raises(ValueError, match="step 4 is of a stage with 2 layers.*grown to 4"):
        depth.begin_step(4)


def test_stages_by_tokens_need_the_tokens():
    config = DepthConfig(layers=(1, 4), starts=(0, 100), unit="tokens")
    depth = ProgressiveDepth(build("gpt2", 4), config)
    depth.begin_step(60, 99)
    assert depth.num_layers == 1
    depth.begin_step(61, 100)
    assert depth.num_layers == 4
    with pytest.raises(ValueError, match="say how many were seen with num_tokens"):
        depth.begin_step(62)


OPTIMIZERS = {
    "adamw": adamw,
    "subspace": subspace,
    "sketched": lambda model: subspace(model, basis="sketched", residual="normalized"),
    "compact": lambda model: subspace(model, state_dtype="int8", basis_dtype="int8"),
    "corrected": lambda model: subspace(
        model, state_dtype="int8", weight_rounding="corrected", basis_dtype="bfloat16"
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("optimizer_state", ["copied", "fresh", "kept"])
def test_state_follows_the_weights_or_starts_anew_or_stays(name, optimizer_state):
    model = build("llama", 4)
    if name == "corrected":
        model.bfloat16()
    optimizer = OPTIMIZERS[name](model)
    depth = grow(model, optimizer, num_steps=3, optimizer_state=optimizer_state)
    before = [
        [copy.deepcopy(optimizer.state.get(weight)) for weight in layer.parameters()]
        for layer in layers_of(model)
    ]
    depth.begin_step(3)
    for number, layer in enumerate(layers_of(model)):
        after = [optimizer.state.get(weight) for weight in layer.parameters()]
        source = {"copied": number // 2, "fresh": 0 if number == 0 else 2, "kept": number}
        assert_same_values(after, before[source[optimizer_state]])
    first, second = ([*layer.parameters()] for layer in layers_of(model)[:2])
    tensors = [
        {
            value.data_ptr()
            for weight in of
            for value in optimizer.state.get(weight, {}).values()
            if isinstance(value, torch.Tensor) and value.numel()
        }
        for of in (first, second)
    ]
    assert not tensors[0] & tensors[1]
    take_step(model, optimizer, seed=3)
    saved = copy.deepcopy(optimizer.state_dict())
    other = OPTIMIZERS[name](model)
    other.load_state_dict(saved)
    assert_same_values(other.state_dict(), saved)


def test_copies_of_state_draw_numbers_of_their_own():
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(2))
    optimizer = AdaRankGrad(param_groups(model), state_dtype="int8", residual="none")
    config = DepthConfig(
        layers=(1, 2), starts=(0, 1), optimizer_state="copied", layer_list="layers"
    )
    depth = ProgressiveDepth(model, config, optimizers=optimizer)
    first, second = (layer.weight for layer in model.layers)
    depth.begin_step(0)
    first.grad = torch.randn(16, 16)
    optimizer.step()
    depth.begin_step(1)
    first.grad = second.grad = torch.randn(16, 16)
    optimizer.step()
    states = [optimizer.state[weight] for weight in (first, second)]
    assert torch.equal(states[0]["basis"], states[1]["basis"])
    assert not torch.equal(states[0]["exp_avg"], states[1]["exp_avg"])


def test_state_within_a_budget_is_not_multiplied():
    model = build("llama", 4)
    optimizer = subspace(model, memory_budget=0.5)
    with pytest.raises(ValueError, match="multiply state that memory_budget holds"):
        grow(model, optimizer)
    grow(model, optimizer, optimizer_state="fresh")
    assert optimizer.report().projected_state_bytes > 0


@pytest.mark.parametrize("make_optimizer", [adamw, subspace])
def test_full_depth_from_the_start_is_plain_training_to_the_bit(make_optimizer):
    plain, other = build("llama", 4), build("llama", 4)
    optimizers = [make_optimizer(plain), make_optimizer(other)]
    for step in range(4):
        take_step(plain, optimizers[0], seed=step)
    grow(other, optimizers[1], layers=(4, 4))
    assert_same_values(plain.state_dict(), other.state_dict())


def test_a_resume_in_the_middle_of_a_stage_needs_nothing_but_its_state():
    options = {"layers": (1, 2, 6), "starts": (0, 2, 7), "sampling": "uniform"}
    config = DepthConfig(**options)
    whole, parts = build("llama"), build("llama")
    seen: list[list[int]] = []
    for model, stop in ((whole, None), (parts, 5)):
        optimizer = adamw(model)
        depth = ProgressiveDepth(model, config, seed=3, optimizers=optimizer)
        seen.append([])
        for step in range(9):
            if step == stop:
                saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
                model = parts = build("llama")
                optimizer = adamw(model)
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
                state = depth.state_dict()
                depth = ProgressiveDepth(model, config, seed=3, optimizers=optimizer)
                depth.load_state_dict(state)
                torch.manual_seed(step)
            depth.begin_step(step)
            seen[-1].append(depth.depth)
            take_step(model, optimizer, seed=step)
    assert seen[0] == seen[1] and len(set(seen[0])) > 2
    assert_same_values(whole.state_dict(), parts.state_dict())


def test_state_of_other_stages_is_refused():
    depth = ProgressiveDepth(build("gpt2", 4), DepthConfig(**TWO_THEN_FOUR))
    with pytest.raises(ValueError, match="had grown to 3 layers, and the stages have 2, 4"):
        depth.load_state_dict({"num_layers": 3})


def test_data_parallel_training_takes_reused_checkpointed_layers(tmp_path):
    """One process is enough for DDP's count of how often a weight was ready."""
    model = checkpoint_layers(build("llama", 4))
    depth = ProgressiveDepth(model, DepthConfig(**TWO_THEN_FOUR, sampling="constant_high"))
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        optimizer = adamw(model)
        for step in range(4):
            depth.begin_step(step)
            take_step(wrapped, optimizer, seed=step)
    finally:
        torch.distributed.destroy_process_group()
    alone = checkpoint_layers(build("llama", 4))
    grow(alone, adamw(alone), sampling="constant_high", optimizer_state="kept")
    assert_same_values(model.state_dict(), alone.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 3}, r"layers must be a list with an entry a stage, such as \(3, 6, 12\), got"),
        ({"layers": ()}, "layers must be a list"),
        ({"layers": (0, 4)}, "layers must be an int of at least 1, got 0"),
        ({"layers": (2, 2.5)}, "layers must be an int of at least 1, got 2.5"),
        ({"layers": (3, 2)}, "layers must not fall from stage to stage, got 3, 2"),
        ({"layers": (4,)}, "one entry a stage, got 1 and 2"),
        ({"starts": (0, 0)}, "starts must rise from stage to stage, got 0, 0"),
        ({"starts": (1, 5)}, "starts must begin with 0, got 1, 5"),
        ({"starts": (0, 0.5)}, "starts must be an int of at least 0, got 0.5"),
        ({"unit": "epochs"}, "unit must be one of steps, tokens"),
        ({"layer_map": "blend"}, "layer_map must be one of interpolate, stack"),
        ({"sampling": "low"}, "sampling must be one of low_value"),
        ({"optimizer_state": "new"}, "optimizer_state must be one of copied, kept, fresh"),
        ({"layers": (2, 6)}, "layers must end with the 4 layers of the model, got 6"),
        ({"layers": (2, 3)}, "layers must end with the 4 layers of the model, got 3"),
    ],
)
def test_stages_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ProgressiveDepth(build("gpt2", 4), DepthConfig(**{**TWO_THEN_FOUR, **options}))
