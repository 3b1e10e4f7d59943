"""``adarankgrad sparsify`` evaluates a fine-tuned run by its own task and data."""

import json

import pytest
from task_inputs import TASK_INPUTS

from adarankgrad.cli import main

SHORT = {"steps": 2, "eval_every": 2, "save_every": 2, "powerprop": {"alpha": 2}}
MORE = {
    "instruction": {"generate_examples": 1, "max_new_tokens": 2},
    "masked-lm": {"split_characters": True, "powerprop": {"alpha": 2, "exclude": "decoder"}},
}


def sparsify(run):
    with pytest.raises(SystemExit) as end:
        flags = ("--run", str(run), "--device", "cpu", "--densities", "0.05,1", "--json")
        main.main(["sparsify", *flags])
    return int(end.value.code or 0)


@pytest.mark.parametrize("task", TASK_INPUTS)
def test_a_tuned_model_gives_its_metrics_at_full_density_and_others_pruned(
    task, tune, tmp_path, capfd
):
    summary = tune(task, **(SHORT | MORE.get(task, {})))
    capfd.readouterr()
    assert sparsify(tmp_path / "run") == 0
    curve = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert json.loads((tmp_path / "run" / "sparsity.json").read_text()) == curve
    assert (tmp_path / "run" / "plots" / "sparsity.png").stat().st_size > 1000
    dense, pruned = curve["points"]
    assert curve["metric"] == summary["best_metric"]
    # The same weights, from a float32 file, on the same batches.
    assert dense["val_loss"] == pytest.approx(summary["val_loss"], rel=1e-6)
    for name in set(summary["metrics"]) & set(dense):
        assert dense[name] == pytest.approx(summary["metrics"][name], rel=1e-6, nan_ok=True)
    assert dense["val_loss"] != pruned["val_loss"]
    assert dense["num_kept"] == dense["num_weights"] > 15 * pruned["num_kept"]


def test_a_run_that_left_an_adapter_is_refused_in_one_line(tune, tmp_path, capfd):
    tune(method="lora", steps=1)
    capfd.readouterr()
    assert sparsify(tmp_path / "run") == 2
    assert "left an adapter (lora)" in capfd.readouterr().err
    assert not (tmp_path / "run" / "sparsity.json").exists()


def test_a_run_without_its_data_is_refused_without_talk_of_resuming(tune, tmp_path, capfd):
    tune(**SHORT)
    (tmp_path / "run" / "data" / "validation.jsonl").unlink()
    capfd.readouterr()
    assert sparsify(tmp_path / "run") == 2
    err = capfd.readouterr().err.strip()
    assert len(err.splitlines()) == 1 and "validation.jsonl is missing" in err
    assert "resume" not in err
