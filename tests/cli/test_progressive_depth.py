"""``adarankgrad train --progressive-depth``: neutral at full depth, resumable, whole in the end."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from train_inputs import TINY_MODEL, call, tiny_flags, write_inputs
from transformers import AutoModelForCausalLM, LlamaConfig

from adarankgrad.schedules.depth import DepthConfig
from adarankgrad.train import TrainConfig
from adarankgrad.train.files import read_jsonl
from adarankgrad.train.flow import Flow
from adarankgrad.train.growing_depth import growing_depth
from adarankgrad.train.paired import PairedOptimizer
from same_values import assert_same_values

NUM_LAYERS = 4
STAGES = "layers=(1,2,4),starts=(0,2,4)"
TIMES = ("elapsed_s", "tokens_per_second")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_inputs(tmp_path)
    model = TINY_MODEL | {"num_hidden_layers": NUM_LAYERS}
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(model))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("adarankgrad.train.plots.write_plots", lambda run_dir: [])
    monkeypatch.setattr("adarankgrad.train.report.write_report", lambda run_dir: run_dir)
    return tmp_path


def weights_of(run):
    return load_file(run / "model" / "model.safetensors")


def rows_of(run):
    rows = read_jsonl(run / "metrics.jsonl")
    return [{key: row[key] for key in row if key not in TIMES} for row in rows]


def assert_same(first, second):
    assert rows_of(first) == rows_of(second)
    assert_same_values(weights_of(first), weights_of(second))
    newest = "checkpoints/checkpoint-6/optimizer.pt"
    assert_same_values(*(torch.load(run / newest, weights_only=True) for run in (first, second)))


def stop_after(monkeypatch, step):
    original = Flow.on_step_end

    def on_step_end(self, args, state, control, **options):
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, args, state, control, **options)

    monkeypatch.setattr(Flow, "on_step_end", on_step_end)


def test_full_depth_from_the_start_trains_as_without_it_to_the_bit(folder):
    flags = {"optimizer": "adarankgrad", "weight_decay": 0.1}
    stages = "layers=(4,4),starts=(0,3),sampling=uniform"
    assert call("train", *tiny_flags(output="plain", **flags)) == 0
    assert call("train", *tiny_flags(output="neutral", progressive_depth=stages, **flags)) == 0
    assert_same(folder / "plain", folder / "neutral")


def test_a_run_stopped_within_and_between_stages_resumes_to_the_bit(folder, monkeypatch, capfd):
    flags = {
        "optimizer": "adarankgrad",
        "optimizer_args": "state_dtype=int8,refresh_max_gap=2",
        "weight_decay": 0.1,
        "gradient_accumulation": 2,
        "progressive_depth": "layers=(1,2,4),starts=(0,100,256),unit=tokens",
    }
    assert call("train", *tiny_flags(output="whole", **flags)) == 0
    for stop in (3, 4):
        given = (
            ["--resume", "--output", "parts"] if stop == 4 else tiny_flags(output="parts", **flags)
        )
        with monkeypatch.context() as patch:
            stop_after(patch, stop)
            assert call("train", *given) == 128 + signal.SIGTERM
        checkpoint = folder / "parts" / "checkpoints" / f"checkpoint-{stop}"
        state = torch.load(checkpoint / "progressive_depth.pt", weights_only=True)
        assert state == {"num_layers": 2}
    assert call("train", "--resume", "--output", "parts") == 0
    assert_same(folder / "whole", folder / "parts")

    model = AutoModelForCausalLM.from_pretrained(folder / "parts" / "model")
    assert model.state_dict().keys() == load_file(checkpoint / "model.safetensors").keys()
    assert model.config.num_hidden_layers == NUM_LAYERS
    capfd.readouterr()
    again = tiny_flags(output="again", model="parts/model", progressive_depth=STAGES)
    assert call("train", *again) == 2
    assert "upper layers of parts/model, which has trained weights" in capfd.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adarankgrad", "accumulate_in_backward": True, "gradient_accumulation": 2},
        {"optimizer": "adamw", "powerprop": "alpha=2,decay_on=weight", "weight_decay": 0.1},
    ],
    ids=["in backward", "powerprop"],
)
def test_state_is_copied_with_other_methods(folder, changes):
    stages = "layers=(1,2,4),starts=(0,1,2),sampling=constant_high"
    assert call("train", *tiny_flags(steps=3, progressive_depth=stages, **changes)) == 0
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["val_loss"] < 8
    assert summary["state_bytes"] > 0


def test_state_is_copied_in_each_part_of_a_paired_optimizer():
    model = AutoModelForCausalLM.from_config(LlamaConfig(**TINY_MODEL))
    weights = list(model.parameters())
    matrices = [weight for weight in weights if weight.dim() > 1]
    others = [weight for weight in weights if weight.dim() == 1]
    parts = [torch.optim.SGD(matrices, lr=0.1, momentum=0.9), torch.optim.AdamW(others)]
    stages = {"layers": (1, 2), "starts": (0, 1), "optimizer_state": "copied"}
    config = TrainConfig(data="data", output="run", progressive_depth=stages)
    optimizer = PairedOptimizer(parts)
    depth = growing_depth(config, model, optimizer).depth
    depth.begin_step(0)
    ids = torch.arange(16).view(2, 8)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    depth.begin_step(1)
    first, second = ([*layer.parameters()] for layer in model.model.layers)
    for part, kind in ((parts[0], matrices), (parts[1], others)):
        of_part = {id(weight) for weight in kind}
        pairs = [(a, b) for a, b in zip(first, second, strict=True) if id(a) in of_part]
        for weight, copied in pairs:
            assert part.state[weight]
            assert_same_values(part.state[copied], part.state[weight])


def test_operations_are_counted_at_one_depth_for_all_micro_batches_of_a_step(folder):
    stages = f"{STAGES},sampling=uniform"
    assert call("train", *tiny_flags(progressive_depth=stages, gradient_accumulation=2)) == 0
    config = DepthConfig(layers=(1, 2, 4), starts=(0, 2, 4), sampling="uniform")
    depths = [config.sample_depth(config.layers_at(step), 0, step) for step in range(6)]
    assert len(set(depths)) > 2
    head = 300 * 32
    layer = 4 * 32 * 32 + 3 * 32 * 64
    tokens, length, width = 2 * 2 * 16, 16, 32
    costs = [tokens * (6 * head + depth * (6 * layer + 12 * length * width)) for depth in depths]
    for row in read_jsonl(folder / "run" / "metrics.jsonl"):
        assert row["training_flops"] == sum(costs[: row["step"]])
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["training_flops"] == sum(costs)


@pytest.mark.parametrize(
    ("setting", "changes", "message"),
    [
        ("starts=(0,2)", {}, "--progressive-depth has no layers: give those of each stage"),
        ("layer=(1,4)", {}, "unknown setting of --progressive-depth 'layer': did you mean layer"),
        ("layers=(4,2),starts=(0,2)", {}, "layers must not fall from stage to stage, got 4, 2"),
        ("layers=(2,8),starts=(0,2)", {}, "layers must end with the 4 layers of the model, got 8"),
        ("layers=(1,2),starts=(0,2)", {}, "layers must end with the 4 layers of the model, got 2"),
        ("layers=(2,4),starts=(2,0)", {}, "starts must rise from stage to stage, got 2, 0"),
        ("layers=(2,4),starts=(0,6)", {}, "at 6 steps, and the last of 6 steps begins at 5"),
        (
            "layers=(2,4),starts=(0,161),unit=tokens",
            {},
            "at 161 tokens, and the last of 6 steps begins at 160",
        ),
        (
            # 24 samples of 16 tokens, of which the last step takes 8 at most.
            "layers=(2,4),starts=(0,257),unit=tokens",
            {"gradient_accumulation": 2, "adadagrad": "max_batch_size=8"},
            "at 257 tokens, and the last step may begin at 256",
        ),
        (
            "layers=(2,4),starts=(0,2)",
            {"optimizer": "adarankgrad", "optimizer_args": "memory_budget=0.5"},
            "optimizer_state='copied' would multiply state",
        ),
        (
            "layers=(2,4),starts=(0,2)",
            {"model": "none/config.json"},
            "has several lists of 4 layers",
        ),
    ],
)
def test_stages_that_cannot_be_trained_are_refused_in_one_line(
    folder, capfd, setting, changes, message
):
    write_model_without_list(folder / "none")
    before = sorted(folder.rglob("*"))
    assert call("train", *tiny_flags(progressive_depth=setting, **changes)) == 2
    err = capfd.readouterr().err
    assert len(err.strip().splitlines()) == 1 and message in err
    assert sorted(folder.rglob("*")) == before


def write_model_without_list(folder):
    """Write the configuration of an XLM, which keeps attention and feed-forward layers apart."""
    folder.mkdir()
    config = {"model_type": "xlm", "emb_dim": 32, "n_layers": 4, "n_heads": 2, "n_words": 300}
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
