"""Projected accumulation where it meets the rest: clipping, saving, odd models, and refusals.

Small networks in float64, as in `test_accumulation`.
"""

from __future__ import annotations

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from adarankgrad import AdaRankGrad, Fira, GaLore, OrthogonalizedSGD, param_groups
from adarankgrad.optim.projected_grad import ProjectedGrad
from theory.tiny_transformer import TinyTransformer, markov_text

from .accumulated_network import (
    MICRO_BATCHES,
    OPTIONS,
    ROUNDING,
    Network,
    assert_equal,
    batch,
    build,
    loss_of,
    train,
)


@pytest.mark.parametrize(
    "options",
    [
        {"memory_budget": 6000},
        {"stagger": True, "refresh_max_gap": 6},
        {"refresh_energy": 0.9, "refresh_min_gap": 2, "refresh_max_gap": 9},
        {"update": "orthogonalized"},
        {"carry": "reset", "bias_correction": "global", "side": "long"},
    ],
    ids=["budget", "stagger", "criterion", "update", "carry"],
)
def test_every_option_acts_as_it_does_without_hooks(options):
    expected_model, expected_optimizer = build(in_backward=False, **options)
    model, optimizer = build(in_backward=True, **options)
    assert_equal(train(model, optimizer), train(expected_model, expected_optimizer))
    report, expected = optimizer.report(), expected_optimizer.report()
    assert report.layers == expected.layers
    if "memory_budget" in options:
        assert report.projected_state_bytes <= 6000
        assert any(layer.rank < layer.max_rank for layer in report.layers)


def test_clipping_by_the_optimizer_is_clipping_by_torch_at_the_norm_that_it_reports():
    max_norm = 0.05
    by_optimizer = build(in_backward=True, max_grad_norm=max_norm)
    by_torch = build(in_backward=True)
    norms, reported = [], []
    expected = train(
        *by_torch,
        after_backward=lambda model, _: norms.append(
            float(nn.utils.clip_grad_norm_(model.parameters(), max_norm))
        ),
    )
    by_optimizer[1].register_step_post_hook(
        lambda optimizer, *_: reported.append(optimizer.report().last_grad_norm)
    )
    assert_equal(train(*by_optimizer), expected, atol=ROUNDING)
    # The same sums in another order.
    assert reported == pytest.approx(norms, rel=1e-12)
    assert max(norms) > max_norm


def test_clipped_micro_batches_train_as_the_clipped_large_batch_does():
    """The norm is of the sum, since every micro-batch of a step meets the same probes."""
    options = {"max_grad_norm": 0.05}
    expected = train(*build(in_backward=True, **options))
    result = train(*build(in_backward=True, **options), num_micro_batches=MICRO_BATCHES)
    assert_equal(result, expected, atol=ROUNDING)


class TiedModel(nn.Module):
    """One weight that embeds and that makes logits."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(20, 12)
        self.middle = nn.Linear(12, 12)
        self.lm_head = nn.Linear(12, 20, bias=False)
        self.lm_head.weight = self.tokens.weight

    def forward(self, text):
        logits = self.lm_head(torch.tanh(self.middle(self.tokens(text[:, :-1]))))
        return nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())


def test_a_projected_head_tied_to_the_embedding_has_its_whole_gradient_measured():
    results = []
    for in_backward in (False, True):
        torch.manual_seed(0)
        model = TiedModel().double()
        groups = param_groups(model, include="tokens", smallest_side=2)
        optimizer = AdaRankGrad(groups, **OPTIONS)
        if in_backward:
            optimizer.accumulate_in_backward(model)
        for step in range(8):
            generator = torch.Generator().manual_seed(step)
            model(torch.randint(20, (6, 9), generator=generator)).backward()
            assert isinstance(model.tokens.weight.grad, ProjectedGrad) == in_backward
            optimizer.step()
            optimizer.zero_grad()
        results.append(dict(model.named_parameters()))
    assert_equal(*results)


class ConvolutionsAndExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(4, 6, 3)
        self.experts = nn.Parameter(torch.randn(3, 6, 8))

    def forward(self, images):
        hidden = torch.tanh(self.convolution(images)).mean((-2, -1))
        return torch.einsum("bi,eio->beo", hidden, self.experts).square().mean()


def test_convolutions_and_stacked_experts_are_measured_where_they_lie():
    results = []
    for in_backward in (False, True):
        torch.manual_seed(0)
        model = ConvolutionsAndExperts().double().to(memory_format=torch.channels_last)
        groups = [
            {"params": [model.convolution.weight, model.convolution.bias]},
            {"params": [model.experts], "stacked": True},
        ]
        optimizer = AdaRankGrad(groups, **OPTIONS)
        if in_backward:
            optimizer.accumulate_in_backward(model)
        for step in range(8):
            generator = torch.Generator().manual_seed(step)
            model(torch.randn(5, 4, 6, 6, generator=generator, dtype=torch.float64)).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(dict(model.named_parameters()))
    assert_equal(*results)


def test_in_a_transformer_too_no_more_than_one_gradient_is_alive():
    model = TinyTransformer()
    optimizer = AdaRankGrad(param_groups(model, smallest_side=2), **OPTIONS)
    alive, most = weakref.WeakSet(), []

    def before_it_is_held(param):
        alive.add(param.grad)
        most.append(len(alive))

    projected = [p for group in optimizer.param_groups if group["project"] for p in group["params"]]
    for param in projected:  # hooks run in order of registration
        param.register_post_accumulate_grad_hook(before_it_is_held)
    optimizer.accumulate_in_backward(model)
    gc.disable()
    try:
        model(markov_text(4)).backward()
    finally:
        gc.enable()
    assert most == [1] * len(projected) and len(projected) == 12
    assert all(isinstance(param.grad, ProjectedGrad) for param in projected)


def test_gradients_set_to_zero_after_a_step_are_measured_anew():
    expected = train(*build(in_backward=True))

    def without_none(optimizer):
        zero_grad = optimizer.zero_grad
        optimizer.zero_grad = lambda: zero_grad(set_to_none=False)
        return optimizer

    model, optimizer = build(in_backward=True)
    assert_equal(train(model, without_none(optimizer)), expected)
    assert model.first.weight.grad.parts == ()


@pytest.mark.parametrize("again", ["backward", "step"])
def test_a_gradient_that_was_stepped_cannot_be_used_again(again):
    model, optimizer = build(in_backward=True)
    loss_of(model, *batch(0)).backward()
    optimizer.step()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    with pytest.raises(RuntimeError, match=r"call optimizer.zero_grad\(\)"):
        loss_of(model, *batch(1)).backward() if again == "backward" else optimizer.step()
    assert_equal(dict(model.named_parameters()), before)


def test_a_gradient_of_before_a_loaded_state_is_not_stepped():
    model, optimizer = build(in_backward=True)
    train(model, optimizer, num_steps=3)
    saved = copy.deepcopy(optimizer.state_dict())
    loss_of(model, *batch(3)).backward()
    optimizer.load_state_dict(saved)
    with pytest.raises(RuntimeError, match=r"load_state_dict.*call optimizer.zero_grad\(\)"):
        optimizer.step()
    optimizer.zero_grad()
    loss_of(model, *batch(3)).backward()
    optimizer.step()


def test_a_loaded_state_that_needs_whole_gradients_is_refused():
    _, other = build(in_backward=False, basis="randomized")
    _, optimizer = build(in_backward=True)
    with pytest.raises(ValueError, match="needs basis='sketched', got 'randomized'"):
        optimizer.load_state_dict(other.state_dict())


def test_after_loading_the_residual_follows_the_schedule():
    """Loading replaces the groups, which the hooks have to look up each time."""
    options = {"residual": "normalized", "num_micro_batches": 1}

    def train_on(model, optimizer, steps):
        for step in steps:
            loss_of(model, *batch(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] *= 0.8

    model, optimizer = build(in_backward=True, **options)
    train_on(model, optimizer, range(8))
    part, optimizer = build(in_backward=True, **options)
    train_on(part, optimizer, range(4))
    resumed, fresh = build(in_backward=True, **options)
    resumed.load_state_dict(part.state_dict())
    fresh.load_state_dict(optimizer.state_dict())
    train_on(resumed, fresh, range(4, 8))
    assert_equal(dict(resumed.named_parameters()), dict(model.named_parameters()))


def test_the_later_of_two_calls_counts():
    options = {"residual": "normalized"}
    expected = train(*build(in_backward=True, num_micro_batches=2, **options), num_micro_batches=2)
    model, optimizer = build(in_backward=True, num_micro_batches=1, **options)
    optimizer.accumulate_in_backward(model, num_micro_batches=2)
    assert_equal(train(model, optimizer, num_micro_batches=2), expected)
    assert len(model.first.weight._post_accumulate_grad_hooks) == 1


def test_a_step_of_fewer_micro_batches_can_be_announced():
    model, optimizer = build(in_backward=False, residual="normalized")
    handle = optimizer.accumulate_in_backward(model, num_micro_batches=4)
    handle.num_micro_batches = 1
    expected = train(*build(in_backward=True, residual="normalized", num_micro_batches=1))
    assert_equal(train(model, optimizer), expected)


def test_more_backward_passes_than_a_residual_was_divided_by_are_refused():
    model, optimizer = build(in_backward=True, residual="orthogonalized", num_micro_batches=2)
    train(model, optimizer, num_micro_batches=2, num_steps=3)
    with pytest.raises(ValueError, match=r"got 3 gradients since zero_grad.*num_micro_batches=2"):
        train(model, optimizer, num_micro_batches=4, num_steps=1)


def test_a_shared_weight_in_reentrant_checkpoints_is_refused_with_a_residual():
    class Twice(Network):
        def middle(self, hidden):
            for layer in (self.shared, self.tied):
                hidden = checkpoint(layer, torch.tanh(hidden), use_reentrant=True)
            return hidden

    model = Twice().double()
    optimizer = AdaRankGrad(model.named_parameters(), **{**OPTIONS, "residual": "normalized"})
    optimizer.accumulate_in_backward(model, num_micro_batches=1)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        loss_of(model, *batch(0)).backward()


def test_frozen_weights_are_passed_over():
    model = Network().double()
    model.sometimes.weight.requires_grad_(False)
    optimizer = AdaRankGrad(list(model.named_parameters()), **OPTIONS)
    optimizer.accumulate_in_backward(model)
    frozen = model.sometimes.weight.detach().clone()
    train(model, optimizer, num_steps=3)
    assert torch.equal(model.sometimes.weight, frozen)


def test_models_with_held_gradients_can_be_copied_and_saved():
    model, optimizer = build(in_backward=True)
    train(model, optimizer, num_steps=3)
    loss_of(model, *batch(3)).backward()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    twin, twin_optimizer = copy.deepcopy(model), copy.deepcopy(optimizer)
    for other in (loaded["model"], twin.state_dict()):
        assert_equal(other, model.state_dict())
    assert twin.first.weight.grad is None
    assert twin_optimizer.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    with pytest.raises(NotImplementedError, match="in projection"):
        copy.deepcopy(model.first.weight.grad)
    optimizer.step()


def test_a_model_that_is_dropped_between_backward_and_step_is_freed():
    model, optimizer = build(in_backward=True, residual="normalized", num_micro_batches=1)
    loss_of(model, *batch(0)).backward()
    references = [weakref.ref(model.first.weight), weakref.ref(optimizer)]
    del model, optimizer
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def groups_of(model):
    return param_groups(model, smallest_side=2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda groups: GaLore(groups, lr=1e-3, rank=4), "needs basis='sketched', got 'exact'"),
        (lambda groups: Fira(groups, lr=1e-3, rank=4), "needs basis='sketched', got 'exact'"),
        (lambda groups: OrthogonalizedSGD(groups, lr=1e-3), "needs basis='sketched', got 'none'"),
        (
            lambda groups: AdaRankGrad.published(groups, lr=1e-3, max_rank=4),
            "needs basis='sketched', got 'randomized'",
        ),
        (
            lambda groups: AdaRankGrad(groups, basis="sketched", residual="fira_official"),
            "residual='fira_official' needs the whole gradient",
        ),
    ],
    ids=["galore", "fira", "orthogonalized-sgd", "published", "fira_official"],
)
def test_methods_that_need_whole_gradients_are_refused(make, message):
    model = Network()
    with pytest.raises(ValueError, match=message):
        make(groups_of(model)).accumulate_in_backward(model)


def test_the_published_method_can_take_its_bases_from_sketches():
    model = Network()
    optimizer = AdaRankGrad.published(groups_of(model), max_rank=4, basis="sketched")
    optimizer.accumulate_in_backward(model)
    loss_of(model, *(part.float() for part in batch(0))).backward()
    optimizer.step()


@pytest.fixture
def one_process_group():
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_a_model_in_a_data_parallel_wrapper_is_refused(one_process_group):
    model, optimizer = build(in_backward=False)
    wrapped = nn.Sequential(nn.parallel.DistributedDataParallel(model))
    with pytest.raises(ValueError, match="0 is in DistributedDataParallel: .*one process"):
        optimizer.accumulate_in_backward(wrapped)


def test_one_of_several_processes_is_refused(one_process_group, monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="one of 2 processes: .*before they are averaged"):
        build(in_backward=True)


def test_a_broken_gradient_is_skipped_and_counted():
    model, optimizer = build(in_backward=True)
    train(model, optimizer, num_steps=3)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    inputs, targets = batch(3)
    loss_of(model, inputs * float("inf"), targets).backward()
    optimizer.step()
    optimizer.zero_grad()
    assert_equal(dict(model.named_parameters()), before)
    assert optimizer.report().num_skipped_steps == 1
