"""SaRA: the low-rank term, and the second selection at half time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adarankgrad.adapters import SaRAConfig, sara
from adarankgrad.adapters.sara.small_weights import sites
from adarankgrad.adapters.sara.steps import rank_loss_gradient, selected_matrix

from .models import causal_loss, logits, token_batch
from .sara_runs import THRESHOLD, merged, tiny_run, weights
from .training import Run


def nuclear_norms(model):
    return sum(
        float(torch.linalg.svdvals(selected_matrix(site)).sum()) for site in matrices_of(model)
    )


def matrices_of(model):
    return [site for site in sites(model) if "embed_tokens" not in site.name]


def test_the_low_rank_term_reaches_the_trained_values():
    run = tiny_run(rank_loss_weight=3.0, rank_loss_scope="all", rank_loss_min_side=8)
    causal_loss(run.model, token_batch()).backward()
    before = {site.name: site.small.values.grad.clone() for site in sites(run.model)}
    run.hook.before_optimizer_step(1)
    for site in sites(run.model):
        matrix = selected_matrix(site).double().requires_grad_()
        if "embed_tokens" in site.name:
            assert torch.equal(site.small.values.grad, before[site.name])
            continue
        (gradient,) = torch.autograd.grad(torch.linalg.svdvals(matrix).sum(), matrix)
        push = 3.0 * gradient.take(site.small.indices.long()).float()
        # Singular vectors of small singular values are known to eps * largest / smallest.
        torch.testing.assert_close(
            site.small.values.grad - before[site.name], push, rtol=0, atol=3e-4
        )


def test_the_low_rank_term_lowers_the_nuclear_norm():
    settings = {"rank_loss_scope": "all", "rank_loss_min_side": 8}
    without = tiny_run(**settings)
    # What one step of Adam by the term alone takes off, to first order: a fifth of the norms. Of
    # eight steps, to whose gradients the term adds more than the loss does, one is little to ask.
    pulls = [rank_loss_gradient(site).abs().sum() for site in matrices_of(without.model)]
    one_step = 1e-3 * sum(pulls)
    with_term = tiny_run(rank_loss_weight=0.1, **settings).train(range(1, 9))
    without.train(range(1, 9))
    assert nuclear_norms(with_term.model) < nuclear_norms(without.model) - one_step


class Words(nn.Module):
    """An embedding and a layer large enough for the low-rank term, and a head before them."""

    def __init__(self, *, tie: bool = False) -> None:
        super().__init__()
        self.head = nn.Linear(72, 100, bias=False)
        self.embedding = nn.Embedding(100, 72)
        self.hidden = nn.Linear(72, 72)
        if tie:
            self.embedding.weight = self.head.weight

    def forward(self, words):
        return self.head(self.hidden(self.embedding(words)).tanh())


def test_rows_of_an_embedding_that_no_batch_uses_stay_as_they_are_at_the_defaults():
    torch.manual_seed(0)
    model = Words()
    start = model.embedding.weight.detach().clone()
    used = torch.arange(10)

    def batch_loss(model, step):
        return model(used).square().mean()

    # A run as long as it takes to draw each of three matrices several times.
    run = Run("sara", model, SaRAConfig(quantile=0.5), num_steps=12, batch_loss=batch_loss)
    end = weights(run.train(range(1, 13)).model)
    assert torch.equal(end["embedding.weight"][10:], start[10:])
    assert not torch.equal(end["embedding.weight"][:10], start[:10])


@pytest.mark.parametrize("tie", [False, True])
def test_the_low_rank_term_leaves_embeddings_out_also_where_a_head_is_tied_to_them(tie):
    config = SaRAConfig(quantile=0.5, rank_loss_scope="all")
    run = Run("sara", Words(tie=tie), config)
    run.hook.before_optimizer_step(1)
    pushed = {site.name for site in sites(run.model) if site.small.values.grad is not None}
    assert pushed == {"hidden.weight"} | (set() if tie else {"head.weight"})


def test_one_random_matrix_a_step_is_the_same_for_the_same_seed_and_step():
    def pushed(seed, step):
        run = tiny_run(rank_loss_weight=1.0, rank_loss_min_side=8, seed=seed)
        run.hook.before_optimizer_step(step)
        return [site.name for site in sites(run.model) if site.small.values.grad is not None]

    names = [pushed(0, step) for step in range(1, 7)]
    assert all(len(each) == 1 for each in names)
    assert len({each[0] for each in names}) > 2
    assert pushed(0, 3) == names[2]
    assert [pushed(1, step) for step in range(1, 7)] != names


def test_small_matrices_are_left_out_of_the_term():
    run = tiny_run(rank_loss_weight=1.0, rank_loss_scope="all", rank_loss_min_side=64)
    run.hook.before_optimizer_step(1)
    assert all(site.small.values.grad is None for site in sites(run.model))


def test_broken_weights_get_no_term():
    run = tiny_run()
    site = sites(run.model)[0]
    with torch.no_grad():
        site.small.values[0] = torch.nan
    assert torch.equal(rank_loss_gradient(site), torch.zeros_like(site.small.values))


def test_the_second_selection_keeps_what_is_still_small_and_changes_no_output_by_a_bit():
    run = tiny_run(reselect_at=0.5).train(range(1, 4))
    tokens = token_batch()
    causal_loss(run.model, token_batch(4)).backward()
    run.optimizer.step()
    before, first = logits(merged(run.model), tokens), sara.num_selected(run.model)
    expected = {
        site.name: int((site.small.values.abs() < THRESHOLD).sum()) for site in sites(run.model)
    }
    run.hook.on_optimizer_step(4)
    assert sara.num_selected(run.model) == expected
    assert sum(expected.values()) < sum(first.values())
    assert torch.equal(logits(run.model, tokens), before)


def test_entries_frozen_by_the_second_selection_do_not_move_any_more():
    run = tiny_run(reselect_at=0.5, weight_decay=0.5).train(range(1, 5))
    before = weights(run.model)
    frozen = {
        site.name: site.small.indices[~site.small.trained].long() for site in sites(run.model)
    }
    run.train(range(5, 9))
    after = weights(run.model)
    assert sum(len(places) for places in frozen.values()) > 0
    for name, places in frozen.items():
        assert torch.equal(after[name].take(places), before[name].take(places)), name
    assert any(not torch.equal(after[name], before[name]) for name in after)


def test_frozen_entries_get_no_gradient_and_no_low_rank_term():
    run = tiny_run(
        reselect_at=0.5, rank_loss_weight=1e-6, rank_loss_scope="all", rank_loss_min_side=8
    ).train(range(1, 5))
    frozen = [~site.small.trained for site in sites(run.model)]
    assert any(each.any() for each in frozen)
    causal_loss(run.model, token_batch()).backward()
    after_backward = [
        site.small.values.grad[each] for site, each in zip(sites(run.model), frozen, strict=True)
    ]
    run.hook.before_optimizer_step(5)
    after_term = [
        site.small.values.grad[each] for site, each in zip(sites(run.model), frozen, strict=True)
    ]
    assert not any(each.any() for each in after_backward + after_term)


def test_the_optimizer_can_start_again_at_the_second_selection():
    run = tiny_run(reselect_at=0.5, restart_optimizer=True).train(range(1, 9))
    assert {int(state["step"]) for state in run.optimizer.state.values()} == {4}
    run.hook.optimizer = None
    with pytest.raises(ValueError, match="restart_optimizer needs the optimizer"):
        run.hook.on_optimizer_step(1)


def test_a_second_selection_of_nothing_is_left_out_with_a_warning():
    run = tiny_run(reselect_at=0.5)
    with torch.no_grad():
        for site in sites(run.model):
            site.small.values.fill_(1.0)
    before = sara.num_selected(run.model)
    with pytest.warns(UserWarning, match="second selection is left out"):
        run.hook.reselect()
    assert sara.num_selected(run.model) == before


def test_without_second_selection_everything_stays_selected():
    run = tiny_run()
    before = sara.num_selected(run.model)
    assert sara.num_selected(run.train(range(1, 9)).model) == before
