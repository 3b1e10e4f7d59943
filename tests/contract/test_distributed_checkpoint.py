"""`torch.distributed.checkpoint` in one process: any ranks into an optimizer that never stepped."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from adarankgrad.integrations.distributed_checkpoint import SubspaceLoadPlanner

from .cases import CASES, Case
from .problems import (
    assert_same_bits,
    assert_same_state,
    make_params,
    set_gradients,
    state_snapshot,
    train,
    weights_of,
)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
NUM_STEPS = 9
BREAK_AT = 5
OPTIONS = [StateDictOptions(), StateDictOptions(flatten_optimizer_state_dict=True)]


class Model(torch.nn.Module):
    def __init__(self, params):
        super().__init__()
        for name, param in params:
            self.register_parameter(name, param)


def build(case: Case, dtype=torch.float32):
    params = make_params(dtype)
    return params, Model(params), case.build(params)


def save(model, optimizer, folder, options=None):
    weights, state = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)


def load(model, optimizer, folder, options=None):
    weights, state = get_state_dict(model, optimizer, options=options)
    loaded = {"model": weights, "optimizer": state}
    dcp.load(loaded, checkpoint_id=folder, planner=SubspaceLoadPlanner())
    set_state_dict(
        model,
        optimizer,
        model_state_dict=loaded["model"],
        optim_state_dict=loaded["optimizer"],
        options=options,
    )


@pytest.mark.parametrize("options", OPTIONS, ids=["nested", "flattened"])
def test_training_goes_on_bit_for_bit_in_a_model_and_optimizer_that_are_new(
    case, options, tmp_path
):
    # bfloat16 weights under float32 bases: a cast of either would show.
    whole_params, _, whole = build(case, torch.bfloat16)
    train(whole, whole_params, range(NUM_STEPS))

    params, model, optimizer = build(case, torch.bfloat16)
    train(optimizer, params, range(BREAK_AT))
    state = state_snapshot(optimizer)
    save(model, optimizer, tmp_path, options)
    assert_same_state(state_snapshot(optimizer), state)

    resumed_params, resumed_model, resumed = build(case, torch.bfloat16)
    load(resumed_model, resumed, tmp_path, options)
    train(resumed, resumed_params, range(BREAK_AT, NUM_STEPS))
    assert_same_bits(weights_of(resumed_params), weights_of(whole_params))
    assert_same_state(state_snapshot(resumed), state_snapshot(whole))


def test_state_of_other_ranks_is_replaced(tmp_path):
    params, model, optimizer = build(CASES[0])
    train(optimizer, params, range(BREAK_AT))
    save(model, optimizer, tmp_path)
    other_params, other_model, other = build(CASES[0])
    train(other, other_params, range(3), salt="other")
    load(other_model, other, tmp_path)
    assert_same_state(state_snapshot(other), state_snapshot(optimizer))


def test_a_weight_that_never_got_a_gradient_is_saved_and_loaded_without_state(tmp_path):
    params, model, optimizer = build(CASES[0])
    set_gradients(params, 0)
    params[0][1].grad = None
    optimizer.step()
    not_strict = StateDictOptions(strict=False)
    save(model, optimizer, tmp_path, not_strict)
    resumed_params, resumed_model, resumed = build(CASES[0])
    load(resumed_model, resumed, tmp_path, not_strict)
    assert resumed_params[0][1] not in resumed.state
    assert_same_state(state_snapshot(resumed), state_snapshot(optimizer))


def test_a_weight_of_another_shape_stays_an_error(tmp_path):
    params, model, optimizer = build(CASES[0])
    train(optimizer, params, range(2))
    save(model, optimizer, tmp_path)
    other_params = make_params(shapes={name: (30, 16) for name, _ in params})
    with pytest.raises(dcp.api.CheckpointException, match="Size mismatch.*model.tall"):
        load(Model(other_params), CASES[0].build(other_params), tmp_path)
