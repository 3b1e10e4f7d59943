"""A run learns, keeps its best checkpoint, and what it leaves loads without us."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from adarankgrad.train.files import read_jsonl


def outputs(folder, auto_model, text):
    model = auto_model.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(**AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")).logits


def test_a_classifier_learns_and_its_model_gives_its_predictions(tune, tmp_path):
    summary = tune(steps=40, eval_every=20, save_every=40)
    assert summary["metrics"]["accuracy"] == 1.0
    predictions = read_jsonl(tmp_path / "run" / "predictions.jsonl")
    assert [p["prediction"] for p in predictions] == [p["label"] for p in predictions]
    for prediction in predictions[:3]:
        logits = outputs(
            tmp_path / "run" / "model", AutoModelForSequenceClassification, prediction["text"]
        )
        # The probability was of a padded batch: equal up to rounding, a few 1e-7.
        assert logits.softmax(-1).max().item() == pytest.approx(prediction["probability"], abs=1e-5)
        assert str(logits.argmax().item()) == prediction["prediction"]
