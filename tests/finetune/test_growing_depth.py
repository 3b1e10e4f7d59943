"""A pretrained model that grows deeper while it is fine-tuned, by copies of its layers."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from adarankgrad.train import UserError

STILL = {"optimizer": "adamw", "lr": 1e-30, "plain_lr": 1e-30, "weight_decay": 0.0}


@pytest.mark.parametrize(
    ("layer_map", "sources"), [("interpolate", [0, 0, 1, 1]), ("stack", [0, 1, 0, 1])]
)
def test_new_layers_are_copies_of_pretrained_ones(layer_map, sources, tune, inputs, tmp_path):
    stages = {"layers": [2, 4], "starts": [0, 5], "layer_map": layer_map}
    tune(**STILL, progressive_depth=stages)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    base = AutoModelForSequenceClassification.from_pretrained(inputs / "bert")
    assert model.config.num_hidden_layers == 4
    for layer, source in zip(model.bert.encoder.layer, sources, strict=True):
        copied = base.bert.encoder.layer[source].state_dict()
        for name, value in layer.state_dict().items():
            torch.testing.assert_close(value, copied[name], rtol=0, atol=1e-28)  # of the rate


def test_a_language_model_with_a_setting_for_each_layer_grows(tune, tmp_path):
    summary = tune("causal-lm", progressive_depth={"layers": [2, 3], "starts": [0, 2]})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert len(model.model.layers) == model.config.num_hidden_layers == 3
    assert summary["best_step"] in (4, 8)


def test_the_best_model_is_one_of_all_layers(tune, tmp_path):
    """At a rate that ruins the model, early evaluations are better."""
    summary = tune(
        optimizer="adamw",
        lr=0.5,
        metric="loss",
        eval_every=1,
        progressive_depth={"layers": [2, 4], "starts": [0, 6]},
    )
    assert summary["best_step"] in (7, 8)


@pytest.mark.parametrize(
    ("stages", "changes", "message"),
    [
        ({"layers": [1, 2], "starts": [0, 1]}, {}, "the pretrained .* has 2: give layers=.2,...."),
        ({"layers": [4]}, {}, "the pretrained .* has 2"),
        ({"layers": [2, 4], "starts": [0, 8]}, {}, "last stage at 8 steps, and the last of 8"),
        (
            {"layers": [2, 4], "starts": [0, 10**6], "unit": "tokens"},
            {},
            "last stage at 1000000 tokens",
        ),
        ({"layers": [2, 1], "starts": [0, 2]}, {}, "must not fall"),
        ({"layers": [2, 4], "starts": [0, 2]}, {"method": "lora"}, "an adapter is of a model"),
    ],
)
def test_stages_that_do_not_fit_are_refused_before_weights_are_read(
    stages, changes, message, tune, tmp_path, monkeypatch
):
    monkeypatch.setattr("adarankgrad.finetune.run.load_model", None)
    with pytest.raises(UserError, match=message):
        tune(progressive_depth=stages, **changes)
    assert not (tmp_path / "run").exists()
