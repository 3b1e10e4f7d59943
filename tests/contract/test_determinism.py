"""The same seed gives the same weights, and nobody else's random numbers are used or disturbed."""

from __future__ import annotations

import random

import numpy as np
import torch

from .problems import (
    assert_same_bits,
    make_params,
    skip_where_weights_depend_on_others,
    train,
    weights_of,
)


def trained(case, **options):
    params = make_params()
    train(case.build(params, **options), params, range(8))
    return weights_of(params)


def test_the_same_seed_gives_the_same_weights(case):
    assert_same_bits(trained(case), trained(case))


def test_the_global_generators_are_left_untouched(case):
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    trained(case)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]
    assert all(np.array_equal(left, right) for left, right in zip(before[2], after[2], strict=True))


def test_the_global_seed_has_no_influence(case):
    torch.manual_seed(1)
    first = trained(case)
    torch.manual_seed(2)
    assert_same_bits(first, trained(case))


def test_the_order_of_the_parameters_has_no_influence_when_they_have_names(case):
    params = make_params()
    optimizer = case.build(params[::-1])
    skip_where_weights_depend_on_others(optimizer)
    train(optimizer, params, range(8))
    assert_same_bits(weights_of(params), trained(case))


def test_training_one_parameter_does_not_depend_on_the_others(case):
    params = make_params()
    optimizer = case.build(params[1:2])
    skip_where_weights_depend_on_others(optimizer)
    train(optimizer, params[1:2], range(8))
    assert torch.equal(params[1][1], trained(case)["wide"])
