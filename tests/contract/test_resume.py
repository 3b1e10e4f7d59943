"""Saving and resuming: bit for bit, across rank changes, with torch's safe loader."""

from __future__ import annotations

import copy
import functools
import io
import pickle

import pytest
import torch

from .cases import with_basis
from .problems import (
    MATRICES,
    assert_same_bits,
    assert_same_state,
    make_params,
    ranks_of,
    skip_at_fixed_rank,
    state_snapshot,
    train,
    weights_of,
)

DTYPES = [torch.float32, torch.bfloat16]
NUM_STEPS = 12


def through_a_file(state_dict):
    """What `torch.save` and today's default `torch.load` make of it."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def copies_of(params):
    return [(name, torch.nn.Parameter(param.detach().clone())) for name, param in params]


@functools.cache
def uninterrupted(case, dtype=torch.float32):
    params = make_params(dtype)
    optimizer = case.build(params)
    train(optimizer, params, range(NUM_STEPS))
    return optimizer, params


def test_ranks_change_in_the_training_that_is_resumed(case):
    params = make_params()
    optimizer = case.build(params)
    skip_at_fixed_rank(optimizer)
    seen = set()
    for step in range(NUM_STEPS):
        train(optimizer, params, [step])
        seen.add(tuple(ranks_of(optimizer)))
    for ranks_of_one_matrix in zip(*seen, strict=True):
        assert len(set(ranks_of_one_matrix)) > 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("break_at", [1, 5])
def test_resume_into_an_optimizer_that_never_stepped_is_bit_for_bit(case, dtype, break_at):
    whole, whole_params = uninterrupted(case, dtype)

    params = make_params(dtype)
    optimizer = case.build(params)
    train(optimizer, params, range(break_at))
    resumed_params = copies_of(params)
    resumed = case.build(resumed_params)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_same_state(state_snapshot(resumed), state_snapshot(optimizer))

    train(resumed, resumed_params, range(break_at, NUM_STEPS))
    assert_same_bits(weights_of(resumed_params), weights_of(whole_params))
    assert_same_state(state_snapshot(resumed), state_snapshot(whole))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@with_basis
def test_resume_into_an_optimizer_at_other_ranks_is_bit_for_bit(case, dtype):
    _, whole_params = uninterrupted(case, dtype)

    params = make_params(dtype)
    optimizer = case.build(params)
    train(optimizer, params, range(4))
    resumed_params = make_params(dtype)
    resumed = case.build(resumed_params, lr=0.5, max_rank=3)
    train(resumed, resumed_params, range(5), salt="other")
    assert ranks_of(resumed) != ranks_of(optimizer)

    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    with torch.no_grad():
        for (_, to), (_, source) in zip(resumed_params, params, strict=True):
            to.copy_(source)
    train(resumed, resumed_params, range(4, NUM_STEPS))
    assert_same_bits(weights_of(resumed_params), weights_of(whole_params))


def test_state_saved_before_any_step_resumes(case):
    _, whole_params = uninterrupted(case)
    params = make_params()
    optimizer = case.build(params)
    optimizer.load_state_dict(through_a_file(case.build(make_params()).state_dict()))
    train(optimizer, params, range(NUM_STEPS))
    assert_same_bits(weights_of(params), weights_of(whole_params))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_loading_keeps_the_dtype_of_every_state_tensor(case, dtype):
    optimizer, params = uninterrupted(case, dtype)
    resumed = case.build(make_params(dtype))
    resumed.load_state_dict(optimizer.state_dict())
    for position, (name, param) in enumerate(params):
        state = resumed.state_dict()["state"][position]
        for key, value in optimizer.state[param].items():
            assert type(state[key]) is type(value), key
            if isinstance(value, torch.Tensor):
                assert state[key].dtype == value.dtype, key
        if name in MATRICES:
            # Factorisations need float32 at the least, whatever the weights are kept in.
            wide = torch.promote_types(dtype, torch.float32)
            forms = {"float32": wide, "bfloat16": torch.bfloat16, "int8": torch.int8}
            assert state["basis"].dtype == forms[optimizer.defaults["basis_dtype"]]
            assert state["exp_avg"].dtype == forms[optimizer.defaults["state_dtype"]]
            assert state["seen"].dtype == wide


def test_state_is_tensors_and_plain_numbers_only(case):
    optimizer, _ = uninterrupted(case)
    for state in optimizer.state_dict()["state"].values():
        for key, value in state.items():
            assert isinstance(value, torch.Tensor) or type(value) in (bool, int, float), key


def test_a_loaded_state_shares_no_memory_with_the_saved_one(case):
    optimizer, params = uninterrupted(case)
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved["state"])
    other_params = copies_of(params)
    other = case.build(other_params)
    other.load_state_dict(saved)
    train(other, other_params, range(NUM_STEPS, NUM_STEPS + 4))
    assert_same_state(
        {f"{at}/{key}": value for at, one in before.items() for key, value in one.items()},
        state_snapshot(optimizer),
    )


def test_saving_does_not_change_the_training(case):
    _, whole_params = uninterrupted(case)
    params = make_params()
    optimizer = case.build(params)
    for step in range(NUM_STEPS):
        train(optimizer, params, [step])
        through_a_file(optimizer.state_dict())
    assert_same_bits(weights_of(params), weights_of(whole_params))


def test_loading_into_groups_of_other_sizes_is_a_clear_error(case):
    optimizer, _ = uninterrupted(case)
    fewer = case.build(make_params()[:2])
    with pytest.raises(ValueError, match=r"saved \[4\], here \[2\]"):
        fewer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_continues_like_the_original_and_apart_from_it(case, duplicate):
    params = make_params()
    optimizer = case.build(params)
    train(optimizer, params, range(5))
    other, other_params = duplicate((optimizer, params))
    assert_same_state(state_snapshot(other), state_snapshot(optimizer))

    train(other, other_params, range(5, NUM_STEPS))
    at_the_break = weights_of(params)
    train(optimizer, params, range(5, NUM_STEPS))
    assert_same_bits(weights_of(other_params), weights_of(params))
    assert not torch.equal(at_the_break["tall"], params[0][1])


def test_an_optimizer_without_names_continues_one_with_names(case):
    _, whole_params = uninterrupted(case)
    params = make_params()
    optimizer = case.build(params)
    train(optimizer, params, range(5))
    unnamed = case.build([param for _, param in params])
    unnamed.load_state_dict(through_a_file(optimizer.state_dict()))
    train(unnamed, params, range(5, NUM_STEPS))
    assert_same_bits(weights_of(params), weights_of(whole_params))


def test_an_optimizer_with_names_keeps_them_when_it_loads_one_without(case):
    params = make_params()
    unnamed = case.build([param for _, param in params])
    train(unnamed, params, range(5))
    named = case.build(make_params())
    named.load_state_dict(unnamed.state_dict())
    assert [layer.name for layer in named.report().layers] == list(MATRICES)
