"""The model that a run leaves is set up as the one that it began with."""

from __future__ import annotations

import json

import pytest
from transformers import AutoConfig

from adarankgrad.train import TrainConfig, train


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    monkeypatch.setattr("adarankgrad.train.plots.write_plots", lambda run_dir: [])
    monkeypatch.setattr("adarankgrad.train.report.write_report", lambda run_dir: run_dir)


@pytest.mark.parametrize("uses_cache", [True, False])
@pytest.mark.parametrize(
    "changes", [{}, {"progressive_depth": {"layers": (1, 2), "starts": (0, 1)}}], ids=str
)
def test_its_cache_is_on_or_off_as_before(uses_cache, changes, settings, inputs, tmp_path):
    tiny = json.loads((inputs / "tiny" / "config.json").read_text())
    model = tmp_path / "config.json"
    model.write_text(json.dumps({**tiny, "use_cache": uses_cache}))
    train(TrainConfig.from_settings(settings(model=str(model), steps=2, save_every=1, **changes)))
    for folder in ("model", "checkpoints/checkpoint-1", "checkpoints/checkpoint-2"):
        assert AutoConfig.from_pretrained(tmp_path / "run" / folder).use_cache is uses_cache
