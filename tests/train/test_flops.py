"""Operations by formula against torch's own count, and what a loss cost in them."""

import pytest
import torch
from fake_run import write_counted_run
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from adarankgrad.schedules.depth import DepthConfig, ProgressiveDepth
from adarankgrad.train.comparison import comparison_table, write_comparison
from adarankgrad.train.flops import TrainingFlops
from adarankgrad.train.plots import plot_makers
from adarankgrad.train.record import load_run
from adarankgrad.train.report import write_report

LLAMA = LlamaConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=1,
    attn_implementation="eager",
)
GPT2 = GPT2Config(
    vocab_size=50, n_embd=16, n_layer=4, n_head=2, n_positions=32, attn_implementation="eager"
)
IDS = torch.arange(1, 21).view(2, 10)


def counted(model) -> int:
    """Operations of a forward and backward pass, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        model(input_ids=IDS, labels=IDS).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_the_formula_is_what_torch_counts(config):
    model = AutoModelForCausalLM.from_config(config)
    assert TrainingFlops(model).of(20, 10) == counted(model)


def test_the_depth_of_the_step_counts():
    model = AutoModelForCausalLM.from_config(GPT2)
    stages = DepthConfig(layers=(1, 4), starts=(0, 1), sampling="uniform")
    depth = ProgressiveDepth(model, stages, seed=2)
    flops = TrainingFlops(model, depth)
    depth.begin_step(0)
    assert 1 < depth.depth < 4
    assert flops.of(20, 10) == counted(model)
    depth.begin_step(1)
    assert flops.of(20, 10) == TrainingFlops(model).of(20, 10)


def test_frozen_weights_cost_no_gradient_of_their_own():
    model = AutoModelForCausalLM.from_config(LLAMA)
    whole = TrainingFlops(model).of(3, 10)
    frozen = model.model.layers[1].mlp.up_proj
    frozen.requires_grad_(False)
    assert whole - TrainingFlops(model).of(3, 10) == 3 * 2 * frozen.weight.numel()


@pytest.mark.parametrize("layer", [nn.Conv1d(4, 4, 3), nn.Bilinear(2, 2, 2)])
def test_what_the_formula_does_not_cover_is_not_counted_at_all(layer):
    assert TrainingFlops(nn.Sequential(nn.Linear(4, 4), layer)).of(1, 1) is None
    assert TrainingFlops(nn.Sequential(nn.Linear(4, 4))).of(2, 1) == 2 * 6 * 16


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("counted")
    return {
        "full": write_counted_run(
            folder / "full", per_token=100, is_growing=False, training_flops=16_384_000
        ),
        "growing": write_counted_run(
            folder / "growing", per_token=50, is_growing=True, training_flops=8_192_000
        ),
    }


def test_a_loss_is_reached_between_two_evaluations(runs):
    run = load_run(runs["full"])
    (first, second) = run.evals
    assert run.flops_to_loss(first["val_loss"]) == first["training_flops"]
    assert run.flops_to_loss(first["val_loss"] + 1) == first["training_flops"]
    middle = (first["val_loss"] + second["val_loss"]) / 2
    between = (first["training_flops"] + second["training_flops"]) / 2
    assert run.flops_to_loss(middle) == pytest.approx(between, rel=1e-12)
    assert run.flops_to_loss(second["val_loss"] - 0.01) is None
    del first["training_flops"]
    assert run.flops_to_loss(middle) is None


def test_a_comparison_says_what_the_first_runs_loss_cost(runs, tmp_path):
    table = comparison_table(runs)
    cells = [list(column.cells) for column in table.columns]
    rows = dict(zip(cells[0], zip(*cells[1:], strict=True), strict=True))
    assert rows["Training operations"] == ("16.4 M", "8.19 M", "x 0.50")
    assert rows["Operations to the loss of full"] == ("16.4 M", "8.19 M", "x 0.50")
    page = write_comparison(runs, tmp_path / "page", "Depths").read_text()
    assert "Loss over operations" in page
    assert (tmp_path / "page" / "plots" / "loss_over_operations.png").exists()


def test_a_run_that_grew_has_a_figure_over_operations(runs):
    assert "Loss over operations" in write_report(runs["growing"]).read_text()
    figures = {name: list(plot_makers(load_run(run))) for name, run in runs.items()}
    assert figures["growing"] == ["loss", "memory", "loss_over_operations"]
    assert figures["full"] == ["loss", "memory"]
