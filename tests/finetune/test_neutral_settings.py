"""A method at the setting that changes nothing trains as without it, bit for bit."""

import pytest
import torch
from safetensors.torch import load_file
from test_runs import ADAPTERS

from run_folders import rows

MEASURED = {
    "max_batch_size": 64,
    "eta": float("inf"),
    "statistics": "per-sample",
    "test": "augmented",
}
CASES = {
    "powers": ("full", {"powerprop": {"alpha": 1}}),
    "extrapolation": ("full", {"extrapolation": {"step": 0}}),
    "depth": ("full", {"progressive_depth": {"layers": [2]}}),
    "extrapolated SaRA": ("sara", {"extrapolation": {"step": 0}}),
    # In micro-batches that are padded; PRILoRA's norms of inputs are those of training alone.
    **{f"noise of {each}": (each, {"adadagrad": MEASURED}) for each in ("full", "lora", "sora")},
    "noise of prilora": ("prilora", {"adadagrad": MEASURED}),
}


def weights(folder):
    (path,) = (folder / "model").glob("*.safetensors")
    return load_file(path)


@pytest.mark.parametrize(("method", "neutral"), CASES.values(), ids=CASES)
def test_a_neutral_setting_trains_as_without_it_to_the_bit(method, neutral, tune, tmp_path):
    shared = {"method": method, "adapter": ADAPTERS.get(method, {}), "batch_size": 2}
    shared |= {"gradient_accumulation": 2, "log_every": 1, "eval_every": 100, "save_every": 100}
    for name, changes in (("plain", {}), ("neutral", neutral)):
        tune(**shared, **changes, output=name)
    before, after = (weights(tmp_path / name) for name in ("plain", "neutral"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    if "adadagrad" in neutral:
        scales = [row["noise_scale"] for row in rows(tmp_path / "neutral") if "loss" in row]
        assert all(scale is None or scale > 0 for scale in scales) and any(scales)
