"""What is not projected is trained exactly as by `torch.optim.AdamW`."""

from __future__ import annotations

import pytest
import torch

from .problems import (
    assert_same_bits,
    make_params,
    ranks_of,
    skip_where_rounded_at_random,
    skip_where_weights_depend_on_others,
    train,
    weights_of,
)

OPTIONS = [
    {"lr": 0.01},
    {"lr": 0.01, "weight_decay": 0.1},
    {"lr": 0.003, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.01},
]


# GaLore and Fira follow another AdamW by default; that one has its test against their packages.
AS_TORCH = {"adam_convention": "torch"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_group_that_is_not_projected_equals_adamw_bit_for_bit(case, dtype, options):
    params, expected = make_params(dtype), make_params(dtype)
    # The published preset has an eps of its own.
    options = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, **options}
    optimizer = case.build([{"params": params, "project": False}], **options, **AS_TORCH)
    skip_where_rounded_at_random(optimizer, dtype)
    train(optimizer, params, range(10))
    train(torch.optim.AdamW([param for _, param in expected], **options), expected, range(10))
    assert_same_bits(weights_of(params), weights_of(expected))


def test_vectors_equal_adamw_bit_for_bit_beside_projected_matrices(case):
    params, expected = make_params(), make_params()[3:]
    optimizer = case.build(params, weight_decay=0.1, eps=1e-8, **AS_TORCH)
    skip_where_rounded_at_random(optimizer)
    train(optimizer, params, range(10))
    adamw = torch.optim.AdamW([param for _, param in expected], lr=0.01, weight_decay=0.1)
    train(adamw, expected, range(10))
    assert torch.equal(params[3][1], expected[0][1])


def test_groups_with_options_of_their_own_equal_optimizers_of_their_own(case):
    own_options = [
        {"max_rank": 2, "oversampling": 4},
        {"lr": 0.1, "weight_decay": 0.2},
        {"betas": (0.5, 0.9), "scale": 0.5, "refresh_max_gap": 2},
        {"lr": 0.02},
    ]
    params, expected = make_params(), make_params()
    groups = [
        {"params": [member], **case.in_its_words(own)}
        for member, own in zip(params, own_options, strict=True)
    ]
    optimizer = case.build(groups)
    skip_where_weights_depend_on_others(optimizer)
    train(optimizer, params, range(8))
    for member, own in zip(expected, own_options, strict=True):
        train(case.build([member], **own), [member], range(8))
    assert_same_bits(weights_of(params), weights_of(expected))
    assert ranks_of(optimizer)[0] <= 2


def test_a_matrix_that_is_really_a_vector_falls_back_to_adamw_with_one_warning(case):
    param, expected = (torch.nn.Parameter(torch.ones(1, 9)) for _ in range(2))
    optimizer = case.build([("gate", param)], eps=1e-8, **AS_TORCH, state_dtype="float32")
    adamw = torch.optim.AdamW([expected], lr=0.01, weight_decay=0.0)
    for step in range(3):
        param.grad = expected.grad = torch.arange(1.0, 10.0).view(1, 9) - 3 * step
        if step == 0:
            with pytest.warns(UserWarning, match=r"gate \(1, 9\).*plain AdamW"):
                optimizer.step()
        else:
            optimizer.step()
        adamw.step()
    assert torch.equal(param, expected)
