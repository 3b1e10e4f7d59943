"""State is bound late, and drawn from generators that seed and name decide."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from adarankgrad import AdaRankGrad, GaLore

# A cold sketch without help, so that its random columns decide the basis.
RANDOM = {
    "max_rank": 2,
    "min_rank": 2,
    "oversampling": 0,
    "power_iterations": 0,
    "warm_start": False,
    "refresh_max_gap": 2,
}


def gradients(num_steps=4):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(20, 16, generator=generator) for _ in range(num_steps)]


def trained(name="weight", **options):
    param = nn.Parameter(torch.ones(20, 16))
    optimizer = AdaRankGrad([(name, param)], lr=0.01, **{**RANDOM, **options})
    bases = []
    for grad in gradients():
        param.grad = grad.clone()
        optimizer.step()
        bases.append(optimizer.state[param]["basis"].clone())
    return param.detach(), bases


def test_nothing_is_bound_at_construction():
    param = nn.Parameter(torch.ones(20, 16))
    optimizer = AdaRankGrad([param])
    assert not optimizer.state
    assert not param._backward_hooks
    assert optimizer.state_dict()["state"] == {}


def test_parameters_may_be_swapped_before_the_first_step():
    # FSDP2 and Accelerate do so after the optimizer is built, with parameters of other shapes.
    optimizer = AdaRankGrad([("weight", nn.Parameter(torch.ones(40, 40)))], lr=0.01, **RANDOM)
    param = nn.Parameter(torch.ones(20, 16))
    optimizer.param_groups[0]["params"][0] = param
    for grad in gradients():
        param.grad = grad.clone()
        optimizer.step()
    assert torch.equal(param, trained()[0])


def test_another_seed_gives_another_basis():
    assert not torch.allclose(trained(seed=0)[1][0], trained(seed=1)[1][0], atol=1e-2)


def test_another_name_gives_another_basis():
    assert not torch.allclose(trained("one")[1][0], trained("two")[1][0], atol=1e-2)


def test_every_refresh_draws_anew():
    param = nn.Parameter(torch.ones(20, 16))
    optimizer = AdaRankGrad([param], **{**RANDOM, "refresh_max_gap": 1})
    bases = []
    for _ in range(2):
        param.grad = gradients()[0]
        optimizer.step()
        bases.append(optimizer.state[param]["basis"])
    assert not torch.allclose(*bases, atol=1e-2)


def test_a_basis_is_replaced_at_the_maximum_gap_and_not_before():
    bases = trained()[1]
    assert torch.equal(bases[0], bases[1])
    assert not torch.equal(bases[1], bases[2])
    assert torch.equal(bases[2], bases[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_every_basis_is_orthonormal(dtype):
    param = nn.Parameter(torch.ones(20, 16, dtype=dtype))
    optimizer = AdaRankGrad([param], max_rank=8, min_rank=8, refresh_max_gap=2)
    for grad in gradients():
        param.grad = grad.to(dtype)
        optimizer.step()
        basis = optimizer.state[param]["basis"].double()
        # Some tens of roundings of float32, whatever the weights' dtype: 20 * 1.2e-7.
        identity = torch.eye(8, dtype=torch.float64)
        torch.testing.assert_close(basis.mT @ basis, identity, rtol=0, atol=20 * 1.2e-7)


def test_a_basis_at_its_ceiling_moves_to_a_stronger_direction_that_it_cannot_see():
    """The new direction is orthogonal to the basis and to the moment's rows."""
    old = torch.zeros(20, 16)
    old[0, 0] = 1.0
    new = old.clone()
    new[1, 1] = 5.0
    param = nn.Parameter(torch.ones(20, 16))
    optimizer = AdaRankGrad([param], max_rank=1, min_rank=1, refresh_max_gap=2)
    for grad in (old, old, new):
        param.grad = grad.clone()
        optimizer.step()
    # The rows of a square or wide weight's gradient, the columns of a tall one's.
    assert optimizer.state[param]["basis"][1].abs().item() > 0.99


def test_a_stacked_matrix_that_was_silent_is_searched_in_full():
    """An expert without tokens has a moment of zero, which is no start."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(2, 3, 32, 8, generator=generator)
    grad = factors[0] @ factors[1].mT
    param = nn.Parameter(torch.ones(3, 32, 32))
    options = {"stacked": True, "max_rank": 8, "min_rank": 8, "refresh_max_gap": 3}
    optimizer = AdaRankGrad([{"params": [param], **options}], oversampling=2)
    for step in range(4):
        param.grad = grad.clone()
        if step < 3:
            param.grad[1:] = 0.0
        optimizer.step()
    basis = optimizer.state[param]["basis"]
    coords = grad @ basis  # the right side of a square weight
    captured = coords.square().sum((-2, -1)) / grad.square().sum((-2, -1))
    torch.testing.assert_close(captured, torch.ones(3), rtol=1e-5, atol=0)


def test_a_moment_that_is_not_finite_never_reaches_a_factorisation():
    param = nn.Parameter(torch.ones(20, 16))
    optimizer = AdaRankGrad([param], nonfinite="ignore", **RANDOM)
    for step, grad in enumerate(gradients()):
        param.grad = grad.clone()
        if step == 1:
            param.grad[0, 0] = torch.nan
        optimizer.step()
    assert optimizer.report().layers[0].num_refreshes == 2
    assert optimizer.state[param]["basis"].isfinite().all()


def test_the_step_after_a_reset_is_bias_corrected_like_a_first_step():
    param = nn.Parameter(torch.zeros(20, 16))
    full = {"max_rank": 16, "min_rank": 16, "basis": "exact", "refresh_max_gap": 3}
    optimizer = AdaRankGrad([param], lr=0.5, eps=0.0, carry="reset", residual="none", **full)
    for grad in gradients():
        param.grad = grad.clone()
        before = param.detach().clone()
        optimizer.step()
    # A first step of Adam is lr times a sign for every coordinate, so its norm is known; float32
    # roundings of 320 entries are far below 1e-4.
    moved = (param.detach() - before).norm().item()
    assert moved == pytest.approx(0.5 * (16 * 20) ** 0.5, rel=1e-4)
    assert optimizer.state[param]["step"] == 1


def test_a_pickle_of_an_older_version_goes_on_without_what_it_did_not_have():
    """Not with the defaults of today: it would resume as another algorithm."""
    weight = nn.Parameter(torch.randn(20, 16))
    optimizer = AdaRankGrad([weight], carry="ldadam", residual="none")
    newer = ("residual", "residual_scale", "adam_convention", "memory_budget", "stagger")
    for options in (optimizer.defaults, *optimizer.param_groups):
        for name in newer:
            del options[name]
    restored = pickle.loads(pickle.dumps(optimizer))
    assert restored.param_groups[0]["residual"] == "none"
    assert restored.param_groups[0]["carry"] == "ldadam"
    restored.param_groups[0]["params"][0].grad = torch.randn(20, 16)
    restored.step()
    restored.add_param_group({"params": [nn.Parameter(torch.randn(4, 4))]})
    assert restored.report().layers[0].rank > 0


def test_a_saved_state_of_an_older_version_goes_on_without_what_it_did_not_have():
    saved = AdaRankGrad([nn.Parameter(torch.ones(20, 16))]).state_dict()
    for name in ("rank_multiple", "residual"):
        del saved["param_groups"][0][name]
    optimizer = AdaRankGrad([nn.Parameter(torch.ones(20, 16))], rank_multiple=8)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["rank_multiple"] == 1
    assert optimizer.param_groups[0]["residual"] == "none"


def test_options_that_were_saved_are_those_that_count_after_loading():
    saved = AdaRankGrad([nn.Parameter(torch.ones(20, 16))], lr=0.25, max_rank=3, min_rank=1)
    optimizer = AdaRankGrad([nn.Parameter(torch.ones(20, 16))], lr=0.5)
    optimizer.load_state_dict(saved.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert optimizer.param_groups[0]["max_rank"] == 3


def test_repr_shows_the_options():
    assert "max_rank: 3" in repr(
        AdaRankGrad([nn.Parameter(torch.ones(20, 16))], max_rank=3, min_rank=1)
    )


def test_a_state_of_another_method_is_refused_with_both_names():
    param = nn.Parameter(torch.ones(20, 16))
    saved = GaLore([param]).state_dict()
    with pytest.raises(ValueError, match="is of GaLore, this optimizer is AdaRankGrad"):
        AdaRankGrad([param]).load_state_dict(saved)


def test_a_state_of_a_newer_version_is_refused():
    optimizer = AdaRankGrad([nn.Parameter(torch.ones(20, 16))])
    saved = optimizer.state_dict()
    saved["param_groups"][0]["state_version"] += 1
    with pytest.raises(ValueError, match="saved by a newer one; update adarankgrad"):
        optimizer.load_state_dict(saved)


def test_a_state_of_another_optimizer_or_shape_is_refused_by_name():
    def weight(*shape):
        param = torch.nn.Parameter(torch.ones(shape))
        param.grad = torch.randn(shape)
        return param

    adamw = torch.optim.AdamW([weight(12, 8)])
    adamw.step()
    optimizer = AdaRankGrad([weight(12, 8)])
    with pytest.raises(ValueError, match=r"parameter 0 \(12, 8\) is of another optimizer"):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": adamw.state_dict()["state"]})
    optimizer.step()
    other = AdaRankGrad([weight(10, 8)])
    with pytest.raises(ValueError, match="of another optimizer, shape, side or form"):
        other.load_state_dict(optimizer.state_dict())


def test_large_float16_gradients_do_not_overflow_in_the_projection():
    """64 entries of 2e4 add up to more than float16 holds."""
    param = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.float16))
    optimizer = AdaRankGrad([param], lr=1e-3, max_rank=8)
    for _ in range(3):
        param.grad = torch.full((64, 64), 2e4, dtype=torch.float16)
        optimizer.step()
    assert torch.isfinite(param).all()
    assert torch.isfinite(optimizer.state[param]["exp_avg_sq"]).all()


def test_a_complex_matrix_is_trained_by_plain_adamw():
    param = torch.nn.Parameter(torch.ones(6, 5, dtype=torch.complex64))
    param.grad = torch.ones_like(param)
    optimizer = AdaRankGrad([param], lr=0.1)
    with pytest.warns(UserWarning, match="is complex; it is trained by plain AdamW"):
        optimizer.step()
    assert "basis" not in optimizer.state[param]


def test_staggered_refreshes_come_one_by_one_and_then_keep_their_gap():
    """Eight weights, a gap of eight: all need a first basis, and no two are due together again."""
    weights = [nn.Parameter(torch.randn(12, 10)) for _ in range(8)]
    optimizer = AdaRankGrad(weights, refresh_max_gap=8, stagger=True)
    due: list[list[int]] = []
    before = [0] * 8
    for _ in range(26):
        for weight in weights:
            weight.grad = torch.randn(12, 10)
        optimizer.step()
        counts = [layer.num_refreshes for layer in optimizer.report().layers]
        due.append([i for i in range(8) if counts[i] > before[i]])
        before = counts
    assert due[0] == list(range(8)) and due[1:9] != [[]] * 8
    assert max(len(layers) for layers in due[1:]) <= 2
    assert sum(len(layers) for layers in due[1:9]) == 8
    assert due[9:17] == due[1:9] and due[17:25] == due[1:9]
