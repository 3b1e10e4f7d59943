"""Peaks by hand: what exists together, phase by phase."""

from __future__ import annotations

import numpy as np

from adarankgrad.memory_plan.costs import Costs, Stage
from adarankgrad.memory_plan.predict import LARGEST_BATCH, Training
from adarankgrad.memory_plan.trace import Gradient, Trace

# Two sequences of 50 bytes at most; two gradients of 30 and 20 bytes, alive at moments 2 and 4.
TRACE = Trace(
    constant=np.array([0, 0, 30, 0, 20, 0]),
    per_sequence=np.array([10, 50, 40, 30, 20, 0]),
    gradients=(Gradient(2, "head", 30), Gradient(4, "body", 20)),
)
WEIGHTS = 1000


def training(held=None, *, state=0, workspace=0, beside=None, micro_batches=1):
    costs = Costs((Stage(held or {}, state, state),), workspace, beside or {})
    return Training(WEIGHTS, TRACE, costs, micro_batches)


def test_gradients_grow_while_activations_shrink():
    """Batch 2: 100 at moment 1, 110 at 2, 60 + 30 at 3, 60 + 30 at 4."""
    assert training().predict(2).peak == WEIGHTS + 110
    assert training().predict(2).gradients == 50


def test_with_micro_batches_all_gradients_are_there_all_the_time():
    assert training(micro_batches=2).predict(2).peak == WEIGHTS + 110 + 50


def test_gradients_of_one_micro_batch_do_not_meet_all_activations_but_the_step():
    """Batch 1: 70 in the backward pass; the step holds gradients, 50, state and workspace."""
    step = training(state=8, workspace=40).predict(1)
    assert (step.peak, step.peak_phase) == (WEIGHTS + 50 + 8 + 40, "step")
    backward = training(state=8, workspace=5).predict(1)
    assert (backward.peak, backward.peak_phase) == (WEIGHTS + 70 + 8, "backward")


def test_a_projected_gradient_is_there_beside_the_dense_one_it_is_made_of():
    """Batch 1 at moment 2: 70 alive, 4 held and 7 of workspace; 24 remain, 4 and the body's 20."""
    predicted = training({"head": 4}, beside={"head": 7}).predict(1)
    assert predicted.peak == WEIGHTS + 70 + 4 + 7
    assert predicted.gradients == 4 + 20 + 30


def test_the_largest_stage_decides():
    stages = (Stage({}, 5, 5), Stage({"head": 100}, 1, 1))
    assert Training(WEIGHTS, TRACE, Costs(stages, 0)).predict(1).peak == WEIGHTS + 1 + 70 + 100


def test_the_largest_batch_is_the_last_that_fits():
    plan = training()
    largest = plan.largest_batch(WEIGHTS + 500)
    assert plan.predict(largest).peak <= WEIGHTS + 500 < plan.predict(largest + 1).peak
    assert plan.largest_batch(WEIGHTS) == 0
    assert plan.largest_batch(10**12) == LARGEST_BATCH
