"""Settings survive TOML and flags unchanged, and presets have the sizes they are named for."""

import pytest
import torch

from adarankgrad.train import TrainConfig, UserError
from adarankgrad.train.optimizers import (
    OPTIMIZERS,
    build_optimizer,
    find_optimizer,
    group_parameters,
    measure_state,
    projected_parameters,
)
from adarankgrad.train.presets import LLAMA_SIZES, build_model, plan_model
from adarankgrad.train.run_config import read_toml
from adarankgrad.train.settings import resolve, resolve_device
from adarankgrad.train.values import format_arguments, parse_arguments, parse_rank


def config_for(**changes):
    return TrainConfig.from_settings({"data": "d", "output": "o", "device": "cpu", **changes})


def test_a_config_written_as_toml_reads_back_the_same(tmp_path):
    config = config_for(
        data='a "quoted" \\ path\n',
        lr=1e-5,
        max_rank=0.25,
        min_rank=2,
        steps=7,
        optimizer_args={"betas": (0.9, 0.95), "foreach": None, "carry": "squared"},
        accumulate_in_backward=True,
    )
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml())
    assert TrainConfig.from_settings(read_toml(path, TrainConfig)) == config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("eps=1e-6", {"eps": 1e-6}),
        ("betas=(0.9,0.95),amsgrad=True", {"betas": (0.9, 0.95), "amsgrad": True}),
        ("carry=squared,side='long'", {"carry": "squared", "side": "long"}),
        ("refresh_norm=None,x=-1", {"refresh_norm": None, "x": -1}),
        ("nonfinite=raise, carry=none", {"nonfinite": "raise", "carry": "none"}),
        ("statistics=per-sample,lr=1e-3", {"statistics": "per-sample", "lr": 1e-3}),
        ("eta=inf", {"eta": float("inf")}),
    ],
)
def test_optimizer_arguments_are_python_literals(text, expected):
    assert parse_arguments(text) == expected
    assert parse_arguments(format_arguments(expected)) == expected


@pytest.mark.parametrize("text", ["0.9", "a=b=c", "a=f(1)", "**x", "a=__import__('os')", "a=1;b"])
def test_other_optimizer_arguments_are_refused(text):
    with pytest.raises(UserError, match="optimizer-args"):
        parse_arguments(text)


def test_an_optimizer_argument_given_twice_is_refused():
    with pytest.raises(UserError, match="max_rank=8' has max_rank more than once"):
        parse_arguments("max_rank=4,eps=1e-6,max_rank=8")


def test_a_rank_is_columns_or_a_share():
    assert parse_rank("64") == 64 and isinstance(parse_rank("64"), int)
    assert parse_rank("0.25") == 0.25
    assert isinstance(parse_rank("1.0"), float)


def test_learning_rate_and_warm_up_follow_optimizer_and_steps():
    for name, spec in OPTIMIZERS.items():
        assert resolve(config_for(optimizer=name)).lr == spec.default_lr
    assert resolve(config_for(steps=300)).warmup_steps == 30
    assert resolve(config_for(steps=10**6)).warmup_steps == 1000
    assert resolve(config_for(lr=0.5, warmup_steps=0)).warmup_steps == 0


@pytest.mark.parametrize(
    ("size", "low", "high"),
    [
        ("small-llama", 1.83e6, 1.85e6),
        ("9m", 8e6, 10e6),
        ("20m", 18e6, 21e6),
        ("35m", 33e6, 37e6),
        ("60m", 56e6, 62e6),
        ("71m", 68e6, 74e6),
        ("130m", 128e6, 138e6),
        ("250m", 240e6, 255e6),
        ("350m", 360e6, 375e6),
        ("1b", 1.2e9, 1.4e9),
        ("3b", 2.5e9, 3.5e9),
        ("7b", 6.5e9, 7.0e9),
    ],
)
def test_a_preset_has_the_size_it_is_named_for(size, low, high):
    config = config_for(model=size)
    model = build_model(plan_model(config, None), 0, meta=True)
    assert low < sum(weight.numel() for weight in model.parameters()) < high
    assert model.config._attn_implementation == "sdpa"
    assert len(LLAMA_SIZES) == 12


def test_random_weights_depend_on_the_seed_alone():
    plan = plan_model(config_for(), None)
    first, again, other = (build_model(plan, seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_adamw_decays_matrices_but_not_norms():
    config = resolve(config_for(optimizer="adamw", weight_decay=0.1))
    model = build_model(plan_model(config, None), 0)
    optimizer = build_optimizer(group_parameters(model, config), config)
    decays = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert len(decays) == len(list(model.parameters()))
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            assert decays[id(weight)] == 0, name
        elif "proj" in name:
            assert decays[id(weight)] == 0.1, name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_plain_rate_goes_to_embeddings_head_and_norms(name):
    config = resolve(config_for(optimizer=name, lr=1e-3, plain_lr=5e-3))
    model = build_model(plan_model(config, None), 0)
    groups = group_parameters(model, config)
    matrices = {id(weight) for name, weight in model.named_parameters() if "_proj" in name}
    optimizer = build_optimizer(groups, config)
    for group in optimizer.param_groups:
        for weight in group["params"]:
            assert group["lr"] == (1e-3 if id(weight) in matrices else 5e-3)
    # Logs and the progress bar show the first group's rate.
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_a_rate_that_is_given_alone_applies_to_all_weights():
    for name, spec in OPTIMIZERS.items():
        assert resolve(config_for(optimizer=name, lr=1e-3)).plain_lr == 1e-3
        assert resolve(config_for(optimizer=name)).plain_lr == spec.default_plain_lr


@pytest.mark.filterwarnings("ignore:weight_rounding=.* has no effect:UserWarning")
def test_every_registered_optimizer_trains_and_is_measured():
    for name in OPTIMIZERS:
        is_fixed, has_basis = name in ("galore", "fira"), name != "orthogonalized-sgd"
        rank = {"optimizer_args": {"rank": 8}} if is_fixed else {"max_rank": 8}
        rank = rank if has_basis else {}
        config = resolve(config_for(optimizer=name, **rank))
        model = build_model(plan_model(config, None), 0)
        groups = group_parameters(model, config)
        optimizer = build_optimizer(groups, config)
        ids = torch.arange(32).reshape(2, 16)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        sizes = measure_state(optimizer, projected_parameters(groups))
        has_state = name != "adagrad-norm"  # whose one number is in its groups
        assert (0 <= sizes.projected_state_bytes < sizes.state_bytes) == has_state
        assert (sizes.projected_state_bytes > 0) == (has_basis and has_state)
        embeddings = 2 * 4096 * 128 * find_optimizer(name).projects_embeddings
        matrices = 4 * (4 * 128 * 128 + 3 * 128 * 344)
        assert sizes.adamw_projected_state_bytes == (matrices + embeddings) * 8
        assert (sizes.mean_rank is None) == (name in ("adamw", "adagrad-norm"))


def test_devices_are_named_as_in_torch(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda", 0)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="cuda:2 is not there.*2 CUDA"):
        resolve_device("cuda:2")


def test_powers_survive_a_file_and_a_flag(tmp_path):
    given = {"alpha": 2, "adam_mode": "preconditioned", "exclude": "lm_head"}
    file = tmp_path / "config.toml"
    file.write_text(config_for(powerprop=given).to_toml())
    assert read_toml(file, TrainConfig)["powerprop"] == given
    assert parse_arguments(format_arguments(given)) == given
