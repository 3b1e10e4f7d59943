"""What works with a torch optimizer works with ours: closures, scalers, hooks, groups."""

from __future__ import annotations

import copy

import torch

from .problems import (
    assert_same_bits,
    assert_same_state,
    gradient,
    make_params,
    ranks_of,
    set_gradients,
    skip_where_weights_depend_on_others,
    state_snapshot,
    train,
    weights_of,
)


def trained(case, num_steps=6, **options):
    params = make_params()
    train(case.build(params, **options), params, range(num_steps))
    return weights_of(params)


def test_a_closure_is_called_once_a_step_with_gradients_enabled(case):
    params = make_params()
    optimizer = case.build(params)
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        set_gradients(params, len(calls))
        calls.append(len(calls))
        return torch.tensor(3.5)

    losses = [optimizer.step(closure) for _ in range(6)]
    assert calls == list(range(6))
    assert losses == [3.5] * 6
    assert_same_bits(weights_of(params), trained(case))


def test_a_step_without_closure_returns_nothing(case):
    params = make_params()
    set_gradients(params, 0)
    assert case.build(params).step() is None


def test_a_loss_scaler_skips_a_step_with_an_infinite_gradient_and_changes_no_other(case):
    params = make_params()
    optimizer = case.build(params)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    for step in range(6):
        for _ in range(2):  # the first attempt overflows at step 3
            loss = sum(
                (param * gradient(name, tuple(param.shape), step)).sum() for name, param in params
            )
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            overflows = step == 3 and scaler.get_scale() == 2.0**10
            if overflows:
                params[0][1].grad[2, 3] = torch.inf
            before, state = weights_of(params), state_snapshot(optimizer)
            scaler.step(optimizer)
            scaler.update()
            if not overflows:
                break
            assert_same_bits(weights_of(params), before)
            assert_same_state(state_snapshot(optimizer), state)
    assert scaler.get_scale() == 2.0**9
    # Scaling by a power of two and back is exact.
    assert_same_bits(weights_of(params), trained(case))


def test_parameters_added_later_are_trained_and_leave_the_others_alone(case):
    params = make_params()
    optimizer = case.build(params[:1])
    skip_where_weights_depend_on_others(optimizer)
    train(optimizer, params[:1], range(3))
    lower = case.in_its_words({"max_rank": 3})
    optimizer.add_param_group({"params": params[1:], **lower})
    train(optimizer, params, range(3, 8))
    assert torch.equal(params[0][1], trained(case, 8)["tall"])

    late = make_params()[1:]
    train(case.build([{"params": late, **lower}]), late, range(3, 8))
    assert_same_bits(weights_of(params[1:]), weights_of(late))
    assert all(rank <= 3 for rank in ranks_of(optimizer)[1:])


def test_parameters_added_after_loading_a_state_are_trained(case):
    params = make_params()
    optimizer = case.build(params[:2])
    train(optimizer, params[:2], range(3))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.add_param_group({"params": params[2:]})
    train(optimizer, params, range(3, 6))
    assert not torch.equal(params[2][1], make_params()[2][1])


def test_a_parameter_unfrozen_after_a_resume_is_trained(case):
    params = make_params()
    optimizer = case.build(params)
    train(optimizer, params[1:], range(3))  # the first has no gradient, as if frozen
    resumed = case.build(params)
    resumed.load_state_dict(optimizer.state_dict())
    before = params[0][1].detach().clone()
    train(resumed, params, range(3, 5))
    assert not torch.equal(params[0][1], before)


def test_step_hooks_run_before_and_after_the_update(case):
    params = make_params()
    optimizer = case.build(params)
    train(optimizer, params, range(case.first_update))
    seen = []
    before = optimizer.register_step_pre_hook(
        lambda *_: seen.append(("before", params[0][1].detach().clone()))
    )
    optimizer.register_step_post_hook(
        lambda *_: seen.append(("after", params[0][1].detach().clone()))
    )
    train(optimizer, params, range(1))
    before.remove()
    train(optimizer, params, range(1, 2))
    assert [name for name, _ in seen] == ["before", "after", "after"]
    assert not torch.equal(seen[0][1], seen[1][1])


def test_state_dict_hooks_see_and_may_replace_what_is_saved(case):
    params = make_params()
    optimizer = case.build(params)
    train(optimizer, params, range(2))
    called = []
    optimizer.register_state_dict_pre_hook(lambda _: called.append("before"))
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "note": 1})
    assert optimizer.state_dict()["note"] == 1
    assert called == ["before"]


def test_load_hooks_may_replace_the_state_and_do_not_change_the_callers_dict(case):
    params = make_params()
    optimizer = case.build(params)
    train(optimizer, params, range(2))
    saved = optimizer.state_dict()
    resumed = case.build(make_params())
    events = []

    def rename(_, state_dict):
        state_dict["note"] = "in place"

    def replace_lr(_, state_dict):
        events.append(state_dict["note"])
        groups = [{**group, "lr": 0.125} for group in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    resumed.register_load_state_dict_pre_hook(rename)
    resumed.register_load_state_dict_pre_hook(replace_lr)
    resumed.register_load_state_dict_post_hook(
        lambda loaded: events.append(loaded.param_groups[0]["lr"])
    )
    resumed.load_state_dict(saved)
    assert events == ["in place", 0.125]
    assert "note" not in saved
    assert saved["param_groups"][0]["lr"] == 0.01
    assert_same_state(state_snapshot(resumed), state_snapshot(optimizer))


def test_unnamed_parameters_train_and_are_reported_by_position(case):
    params = make_params()
    optimizer = case.build([param for _, param in params])
    train(optimizer, params, range(3))
    assert [layer.name for layer in optimizer.report().layers] == [
        "parameter 0",
        "parameter 1",
        "parameter 2",
    ]
    for name, param in params:
        assert not torch.equal(param, dict(make_params())[name]), name


def test_every_option_may_be_changed_between_steps(case):
    params = make_params()
    optimizer = case.build(params)
    train(optimizer, params, range(3))
    for group in optimizer.param_groups:
        group.update(lr=0.001, weight_decay=0.1, max_rank=2)
    train(optimizer, params, range(3, 8))
    assert all(rank <= 2 for rank in ranks_of(optimizer))


def test_the_learning_rate_may_be_a_tensor(case):
    params = make_params()
    train(case.build(params, lr=torch.tensor(0.01)), params, range(6))
    for name, weight in trained(case).items():
        # 0.01 differs in float32 and float64 by a relative 3e-8, and so do the steps.
        torch.testing.assert_close(dict(params)[name].detach(), weight, rtol=1e-5, atol=1e-6)
