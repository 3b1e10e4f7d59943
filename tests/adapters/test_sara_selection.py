"""SaRA: which weights are selected, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from adarankgrad.adapters import SaRAConfig, sara

from .models import tiny_bert, tiny_llama
from .sara_runs import THRESHOLD


def test_weights_below_the_threshold_are_selected_in_every_tensor():
    base = tiny_llama()
    model = sara.apply(tiny_llama(), SaRAConfig(threshold=THRESHOLD))
    selected = sara.num_selected(model)
    for name, param in base.named_parameters():
        assert selected.get(name, 0) == int((param.abs() < THRESHOLD).sum()), name
    assert not any("norm" in name for name in selected)


def test_zero_biases_are_selected_as_a_whole():
    model = sara.apply(tiny_bert(), SaRAConfig(threshold=1e-9))
    biases = [n for n, p in tiny_bert().named_parameters() if p.dim() == 1 and not p.any()]
    assert set(biases) <= set(sara.num_selected(model))


def test_a_quantile_selects_its_share_of_all_weights():
    model = sara.apply(tiny_llama(), SaRAConfig(quantile=0.1))
    num_all = sum(param.numel() for param in tiny_llama().parameters())
    assert sum(sara.num_selected(model).values()) == math.ceil(0.1 * num_all)
    assert 0.0 < sara.threshold_of(model) < 0.02


def test_a_quantile_that_zeros_make_select_far_more_warns():
    model = tiny_llama()
    nn.init.zeros_(model.model.layers[0].mlp.up_proj.weight)
    with pytest.warns(UserWarning, match="quantile 0.01 selects 1,536 of 19,424 weights.* 7.9%"):
        sara.apply(model, SaRAConfig(quantile=0.01))


def test_ties_of_half_precision_weights_at_the_threshold_do_not_warn():
    model = sara.apply(tiny_llama().to(torch.bfloat16), SaRAConfig(quantile=0.05))
    num_all = sum(param.numel() for param in tiny_llama().parameters())
    assert sum(sara.num_selected(model).values()) >= 0.05 * num_all


def test_patterns_choose_tensors():
    model = sara.apply(
        tiny_llama(),
        SaRAConfig(threshold=THRESHOLD, include="layers", exclude=["mlp", "k_proj"]),
    )
    kinds = {name.split(".")[-2] for name in sara.num_selected(model)}
    assert kinds == {"q_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 1e-12}, "threshold 1e-12 selects none of .* smallest magnitude is"),
        ({"threshold": 100.0}, r"threshold 100 selects all .* full fine-tuning"),
        ({"include": "conv"}, "include pattern 'conv' matches no trainable parameter"),
        ({"exclude": ["mlp", "bias"]}, "exclude pattern 'bias' matches no trainable"),
        ({"train_fully": "classifier"}, "train_fully pattern 'classifier' matches no trainable"),
        ({"include": "mlp", "exclude": "mlp"}, "no trainable parameter is left to select from"),
    ],
)
def test_a_selection_of_nothing_or_of_everything_is_refused_and_changes_nothing(settings, message):
    model = tiny_llama()
    with pytest.raises(ValueError, match=message):
        sara.apply(model, SaRAConfig(**{"threshold": THRESHOLD} | settings))
    assert all(param.requires_grad for param in model.parameters())
    assert not any(parametrize.is_parametrized(module) for module in model.modules())


def test_a_second_selection_on_top_is_refused():
    model = sara.apply(tiny_llama(), SaRAConfig())
    with pytest.raises(ValueError, match="carries SaRA already; merge it first"):
        sara.apply(model, SaRAConfig())


def test_recurrent_layers_are_refused_before_anything_changes():
    model = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4))
    with pytest.raises(ValueError, match="cannot train '1.weight_ih_l0': a LSTM"):
        sara.apply(model, SaRAConfig(threshold=0.1))
    assert model[0].weight.requires_grad and not parametrize.is_parametrized(model[0])
    sara.apply(model, SaRAConfig(threshold=0.1, exclude="^1"))


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings_with_sparse_gradients_are_refused_before_anything_changes(kind):
    model = nn.Sequential(kind(8, 4, sparse=True), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=f"cannot train '0.weight': this {kind.__name__} gives"):
        sara.apply(model, SaRAConfig(threshold=0.1))
    assert model[1].weight.requires_grad and not parametrize.is_parametrized(model[1])
    sara.apply(model, SaRAConfig(threshold=0.1, exclude="^0"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 0.0}, "threshold must be"),
        ({"quantile": 0.0}, r"quantile must be in \(0, 1\)"),
        ({"quantile": 1.0}, r"quantile must be in \(0, 1\)"),
        ({"reselect_at": 1.0}, r"reselect_at must be in \(0, 1\)"),
        ({"rank_loss_weight": -1.0}, "rank_loss_weight must be"),
        ({"rank_loss_scope": "one"}, "rank_loss_scope must be one of random, all"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_a_setting_out_of_range_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        SaRAConfig(**settings)


def test_the_published_rate_falls_with_the_threshold():
    # 1e-3 * exp(-0.7), the paper's 4.97e-4.
    assert sara.suggested_lr(2e-3) == pytest.approx(4.97e-4, rel=1e-3)
