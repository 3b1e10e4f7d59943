"""``adarankgrad train`` as people use it, from a shell."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_inputs import call, tiny_flags, write_inputs

from adarankgrad.train.files import read_jsonl

SUMMARY_KEYS = {
    "optimizer",
    "steps",
    "samples",
    "tokens",
    "training_flops",
    "train_loss",
    "val_loss",
    "perplexity",
    "state_bytes",
    "projected_state_bytes",
    "adamw_projected_state_bytes",
    "weight_bytes",
    "gradient_bytes",
    "peak_bytes",
    "peak_bytes_source",
    "mean_rank",
    "skipped_steps",
    "tokens_per_second",
    "optimizer_s",
    "elapsed_s",
    "paths",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def without_figures(monkeypatch):
    """Leave out plots and report, which take longer than the runs here."""
    monkeypatch.setattr("adarankgrad.train.plots.write_plots", lambda run_dir: [])
    monkeypatch.setattr("adarankgrad.train.report.write_report", lambda run_dir: run_dir)


def config_of(run: Path) -> str:
    return (run / "config.toml").read_text()


def test_a_run_leaves_a_model_metrics_ranks_plots_and_a_report(folder, capfd):
    flags = tiny_flags(optimizer="adarankgrad", max_rank=8, energy=0.9, lr=1e-2)
    assert call("train", *flags, "--json") == 0
    out, err = capfd.readouterr()
    run = folder / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert json.loads(out.splitlines()[-1]) == summary
    assert summary.keys() == SUMMARY_KEYS
    assert summary["steps"] == 6 and summary["tokens"] == 6 * 2 * 16
    assert 0 < summary["projected_state_bytes"] < summary["adamw_projected_state_bytes"]
    assert 1 <= summary["mean_rank"] <= 8
    assert 0 < summary["optimizer_s"] < summary["elapsed_s"]
    assert "validation loss" in err and "tokens/s" in err
    for name in ("plots/loss.png", "plots/ranks.png", "plots/memory.png", "report.html"):
        assert (run / name).stat().st_size > 1000
    assert list((run / "tensorboard").glob("events.*"))
    check_metrics(run)
    check_model(run / "model")


def check_metrics(run):
    rows = read_jsonl(run / "metrics.jsonl")
    logged = [row for row in rows if "loss" in row]
    assert [row["step"] for row in logged] == [2, 4, 6]
    assert logged[0].keys() == {
        "step",
        "tokens",
        "training_flops",
        "loss",
        "lr",
        "tokens_per_second",
        "elapsed_s",
        "mean_rank",
        "state_bytes",
        "grad_norm",
        "skipped_steps",
    }
    evaluated = [row for row in rows if "val_loss" in row]
    assert [row["step"] for row in evaluated] == [3, 6]
    assert evaluated[0].keys() == {"step", "tokens", "training_flops", "val_loss", "perplexity"}
    ranks = read_jsonl(run / "ranks.jsonl")
    assert [row["step"] for row in ranks] == [2, 4, 6]
    assert len(ranks[0]["layers"]) == 14
    assert ranks[0]["layers"][0].keys() == {
        "name",
        "shape",
        "rank",
        "max_rank",
        "captured_energy",
        "steps_since_refresh",
        "refresh_reason",
        "num_refreshes",
        "num_skipped_refreshes",
    }


def check_model(path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = "line 7 of a text"
    ids = tokenizer(text, return_tensors="pt")
    assert tokenizer.decode(ids["input_ids"][0]) == text
    output = model.generate(
        input_ids=ids["input_ids"],
        attention_mask=ids["attention_mask"],
        max_new_tokens=3,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    assert output.shape[1] > ids["input_ids"].shape[1]
    assert model.config.eos_token_id == tokenizer.eos_token_id


def test_adamw_reports_the_state_of_the_same_projected_weights(folder, capfd, without_figures):
    assert call("train", *tiny_flags(), "--json") == 0
    adamw = json.loads(capfd.readouterr().out.splitlines()[-1])
    flags = tiny_flags(optimizer="adarankgrad-published", output="other", max_rank=8)
    assert call("train", *flags, "--json") == 0
    adarankgrad = json.loads(capfd.readouterr().out.splitlines()[-1])
    # 2 blocks of 4 matrices 32 x 32 and 3 of 32 x 64, two float32 moments each.
    assert adamw["projected_state_bytes"] == 2 * (4 * 32 * 32 + 3 * 32 * 64) * 8
    assert adamw["adamw_projected_state_bytes"] == adamw["projected_state_bytes"]
    assert adarankgrad["adamw_projected_state_bytes"] == adamw["projected_state_bytes"]
    assert adamw["mean_rank"] is None
    assert not (folder / "run" / "ranks.jsonl").exists()


def test_low_memory_projects_embeddings_and_head_as_well(folder, without_figures):
    flags = tiny_flags(
        optimizer="adarankgrad-low-memory", precision="bfloat16", accumulate_in_backward=True
    )
    assert call("train", *flags) == 0
    names = [layer["name"] for layer in read_jsonl(folder / "run" / "ranks.jsonl")[-1]["layers"]]
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(names)


def test_activations_computed_again_change_nothing(folder, monkeypatch, without_figures):
    from transformers.models.llama.modeling_llama import LlamaMLP

    calls = 0
    forward = LlamaMLP.forward

    def counted(self, hidden):
        nonlocal calls
        calls += 1
        return forward(self, hidden)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    losses, counts = [], []
    for output, again in (("run", None), ("other", True)):
        calls = 0
        assert call("train", *tiny_flags(output=output, activation_checkpointing=again)) == 0
        losses.append([row.get("loss") for row in read_jsonl(folder / output / "metrics.jsonl")])
        counts.append(calls)
    assert losses[0] == losses[1]
    assert counts[1] - counts[0] == 6 * 2  # once more in each of six steps, in two layers


@pytest.mark.parametrize("optimizer", ["galore", "fira"])
def test_methods_of_fixed_rank_train_at_the_rank_asked_for(
    folder, capfd, without_figures, optimizer
):
    flags = tiny_flags(optimizer=optimizer, optimizer_args="rank=4,refresh_every=5")
    assert call("train", *flags, "--json") == 0
    summary = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert summary["mean_rank"] == 4.0
    assert summary["projected_state_bytes"] < summary["adamw_projected_state_bytes"] / 3


def test_a_corrected_bfloat16_run_saves_the_float32_weights_it_trained(
    folder, capfd, without_figures
):
    flags = tiny_flags(
        optimizer="adarankgrad",
        precision="bfloat16",
        optimizer_args="weight_rounding=corrected,state_dtype=int8",
    )
    assert call("train", *flags, "--json") == 0
    summary = json.loads(capfd.readouterr().out.splitlines()[-1])
    weights = load_file(folder / "run" / "model" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert '"float32"' in (folder / "run" / "model" / "config.json").read_text()
    for name, weight in weights.items():  # more than bfloat16 holds, no more than 24 bits
        assert not torch.equal(weight, weight.bfloat16().float()), name
        assert not (weight.view(torch.int32) & 0xFF).any(), name
    num_weights = sum(weight.numel() for weight in weights.values())
    assert summary["weight_bytes"] == 3 * num_weights


def test_flags_override_the_config_file_and_both_override_defaults(folder, capfd, without_figures):
    (folder / "run.toml").write_text(
        'optimizer = "adamw"\nlr = 0.003\nseed = 5\nmax_rank = 0.5\n'
        "[optimizer_args]\nbetas = [0.9, 0.95]\n"
    )
    flags = tiny_flags(config="run.toml", optimizer=None, seed=6)
    assert call("train", *flags) == 0
    config = config_of(folder / "run")
    assert "lr = 0.003\n" in config and "seed = 6\n" in config and "max_rank = 0.5\n" in config
    assert 'optimizer_args = "betas=[0.9, 0.95]"' in config
    assert "warmup_steps = 0\n" in config and "vocab_size = 300\n" in config
    assert call("train", "--config", "run/config.toml", "--output", "again") == 0
    assert config_of(folder / "again").replace("again", "run") == config


def test_the_same_settings_give_the_same_weights(folder, without_figures):
    for name in ("one", "two"):
        assert call("train", *tiny_flags(optimizer="adarankgrad", output=name)) == 0
    assert_same_weights(folder / "one", folder / "two")


def assert_same_weights(first, second):
    weights = [load_file(run / "model" / "model.safetensors") for run in (first, second)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_overwrite_replaces_a_run_of_ours(folder, without_figures):
    assert call("train", *tiny_flags()) == 0
    (folder / "run" / "plots" / "note.txt").parent.mkdir(exist_ok=True)
    (folder / "run" / "plots" / "note.txt").write_text("of the old run")
    assert call("train", *tiny_flags(seed=1), "--overwrite") == 0
    assert not (folder / "run" / "plots" / "note.txt").exists()
    assert "seed = 1\n" in config_of(folder / "run")


def test_a_trained_model_can_be_continued_with_its_own_tokenizer(folder, capfd, without_figures):
    assert call("train", *tiny_flags(vocab_size=280)) == 0
    flags = tiny_flags(model="run/model", output="more", lr=1e-9)
    assert call("train", *flags, "--json") == 0
    summary = json.loads(capfd.readouterr().out.splitlines()[-1])
    first = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["val_loss"] == pytest.approx(first["val_loss"], abs=1e-4)
    first, second = (folder / run / "model" / "tokenizer.json" for run in ("run", "more"))
    assert first.read_text() == second.read_text()


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_checkpoints(folder, capfd):
    assert call("train", *tiny_flags(lr=1e35, steps=60, save_every=1, max_grad_norm=0)) == 3
    err = capfd.readouterr().err
    last = err.strip().splitlines()[-1]
    assert last.startswith("adarankgrad: error: ") and "Lower --lr" in last
    assert "Traceback" not in err
    assert not (folder / "run" / "summary.json").exists()


def start(folder, *flags):
    return subprocess.Popen(
        [sys.executable, "-m", "adarankgrad", "train", *flags],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_step(run, step, process):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        path = run / "metrics.jsonl"
        if path.exists() and any(row["step"] >= step for row in read_jsonl(path)):
            return
        time.sleep(0.005)
    raise AssertionError(f"the run never came to step {step}: {process.communicate()}")


LONG = {
    "optimizer": "adarankgrad",
    "steps": 200,
    "save_every": 15,
    "log_every": 5,
    "eval_every": 100,
}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """An uninterrupted run in one thread, as many as the interrupted ones use."""
    folder = tmp_path_factory.mktemp("whole")
    write_inputs(folder)
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("adarankgrad.train.plots.write_plots", lambda run_dir: [])
        patch.setattr("adarankgrad.train.report.write_report", lambda run_dir: run_dir)
        torch.set_num_threads(1)
        assert call("train", *tiny_flags(**LONG)) == 0
        yield folder / "run"
        torch.set_num_threads(threads)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_ended_by_a_signal_resumes_to_the_same_model(
    whole_run, folder, capfd, without_figures, number
):
    process = start(folder, *tiny_flags(**LONG))
    wait_for_step(folder / "run", 40, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 128 + number
        assert "adarankgrad train --resume --output run" in err.splitlines()[-1]
    capfd.readouterr()
    assert call("train", "--resume", "--output", "run") == 0
    assert int(capfd.readouterr().err.partition("after step ")[2].split()[0]) >= 40 - 15
    assert_same_weights(whole_run, folder / "run")


@pytest.mark.parametrize("package", ["typer", "transformers"])
def test_a_missing_extra_is_said_in_one_line(folder, capfd, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    for name in [
        name
        for name in sys.modules
        if name.startswith(("adarankgrad.train.run", "adarankgrad.cli.train"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    assert call("train", *tiny_flags()) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and 'pip install "adarankgrad[train]"' in lines[0]
    assert not (folder / "run").exists()


def test_the_version_is_printed(capfd):
    assert call("--version") == 0
    assert capfd.readouterr().out.startswith("adarankgrad ")
